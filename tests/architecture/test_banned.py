"""Nothing that runs code from bytes, and no global generator, in what an institution installs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BANNED_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "random", "shelve"}
BANNED_NAMES = {
    "builtins.eval",
    "builtins.exec",
    "numpy.random.seed",
    "pandas.read_pickle",
    "torch.load",
    "torch.manual_seed",
    "yaml.load",
    "yaml.unsafe_load",
}
BUILTINS = {"eval", "exec"}

SOURCES = sorted((ROOT / "lepton_fl").rglob("*.py"))


def banned_in(source: str) -> list[str]:
    """What `source` uses of the above, as `line: name`, whatever it calls it."""
    tree = ast.parse(source)
    known = {name: f"builtins.{name}" for name in BUILTINS}
    used: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                used.append((node.lineno, alias.name))
                local = alias.asname or alias.name.split(".")[0]
                known[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                used.append((node.lineno, f"{node.module}.{alias.name}"))
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and (name := dotted(node)):
            first, _, rest = name.partition(".")
            if first in known:
                used.append((node.lineno, f"{known[first]}.{rest}".removesuffix(".")))
    return [
        f"{line}: {name}"
        for line, name in sorted(set(used))
        if name in BANNED_NAMES or name.split(".")[0] in BANNED_MODULES
    ]


def dotted(node: ast.expr) -> str:
    """`np.random.seed` for that expression; nothing where it does not begin with a plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def test_there_is_source_to_look_at():
    """An empty list of files would make the next test hold nothing."""
    assert ROOT / "lepton_fl" / "study.py" in SOURCES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_banned_is_used(path):
    """The file neither imports nor calls what is banned."""
    assert banned_in(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import random as r",
        "eval('1')",
        "import builtins; builtins.exec('1')",
        "import torch; torch.load('x')",
        "import torch as t; t.load('x')",
        "from torch import load",
        "from torch import load as read; read('x')",
        "import numpy as np; np.random.seed(1)",
        "from numpy import random as rng; rng.seed(1)",
        "import torch\ndef f():\n    torch.manual_seed(1)",
    ],
)
def test_what_is_banned_is_found(source):
    """However it is imported or named."""
    assert banned_in(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import numpy as np; np.random.default_rng(1)",
        "import torch; torch.Generator().manual_seed(1)",
        "from safetensors.torch import load; load(b'')",
        "'pickle and eval in a docstring'",
    ],
)
def test_what_only_looks_banned_is_let_through(source):
    """A name is judged by where it comes from, not by how it is spelt."""
    assert banned_in(source) == []
