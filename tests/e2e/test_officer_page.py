"""docs/officer.md, typed as it stands there; every line that it says is printed is printed."""

import re
import subprocess
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "officer.md").read_text(encoding="utf-8")
LOOP = re.compile(r"for n in ([\d ]+); do (.*); done")


def commands(block):
    """The lines of a block, each pass of a loop by itself, and the exit code that is said beside each."""
    for line in block.splitlines():
        command, _, said = line.partition("   # exit ")
        loop = LOOP.fullmatch(command)
        for n in loop[1].split() if loop else [""]:
            yield (loop[2].replace("$n", n) if loop else command), int(said or 0)


def plain(text):
    """One blank for any number of them."""
    return " ".join(text.split())


def test_the_page_is_true_as_it_is_typed(lepton, tmp_path):
    """From the budget to the audit: what is printed, the exit codes, and one line for each refusal."""
    printed, checked = "", 0
    for kind, block in re.findall(r"^```(sh|text)\n(.*?)^```$", PAGE, flags=re.M | re.S):
        if kind == "text":
            for line in block.splitlines():
                pattern = ".*".join(re.escape(part.strip()) for part in plain(line).split("..."))
                assert re.search(pattern, printed), f"{line}\nnot in:\n{printed}"
                checked += 1
            continue
        printed = ""
        for command, code in commands(block):
            if command.startswith("lepton-fl "):
                done = lepton(*command.split()[1:], typed="y\n")
                assert done.code == code, f"{command}\n{done.err}"
                refusals = [line for line in done.err.splitlines() if line.startswith("lepton-fl: ")]
                assert len(refusals) == bool(code)
                assert not refusals or done.last == refusals[0]
                printed += f"{plain(done.out)} {plain(done.err)} "
            else:
                subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert checked == 8
