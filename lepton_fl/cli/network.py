"""`lepton-fl demo network`: a deployment on one machine, through the commands that a user would type."""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
import typer

from lepton_fl.cli.budgets import budgets
from lepton_fl.cli.children import Children, Ended
from lepton_fl.cli.demo_agent import DATA_SET
from lepton_fl.cli.desk import Desk, open_desk
from lepton_fl.cli.running import NATURAL, logged_to, read_tables
from lepton_fl.cli.terminal import console, make_writable, print_json, print_table, say
from lepton_fl.cli.texts import policy_text, study_text
from lepton_fl.data import Contract, dealt
from lepton_fl.errors import ConfigError, ConnectionFailed, LeptonError, PolicyRefused, VerificationFailed
from lepton_fl.files import write_atomic
from lepton_fl.fleet.server.studies import RoundRow, Run, Studies
from lepton_fl.privacy import Guarantee
from lepton_fl.simulation import Drop
from lepton_fl.simulation.run import first_model, prepare, split_sites, write_study
from lepton_fl.study import Study, load_study, override
from lepton_fl.tasks import model_hash

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE_S = 120.0
"""For each thing that is waited for; a run has this long for its next round."""
_POLL_S = 0.1
_LOOPBACK = "127.0.0.1"
_SERVER = ("-c", "server/server.toml")
_STUDY = "heart-disease"
_DELTA = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What is shown."""

    sites: int | None
    """Artificial ones; None: the four hospitals that the data come from."""
    rounds: int
    seed: int | None
    """Of noise that protects nobody; None: as at an institution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSaw:
    """A run, as one of its sites saw it."""

    site: str
    rounds: int
    """In whose model its update is."""
    charged: int
    missed: Mapping[str, str]
    """Rounds, as `5` or `5-9`, and why."""
    bytes_sent: int
    epsilon_spent: float
    epsilon_allowed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Saw:
    """What all of them saw."""

    rounds: int
    seconds: float
    model: str
    labels: tuple[str, ...]
    promoted: str
    """The version, or why not."""
    sites: tuple[SiteSaw, ...]
    killed: str
    """The site whose agent was killed."""
    returned: bool
    """It was in a later round; else the run was over before."""
    unit: str
    delta: float
    """Of every epsilon here."""
    holds_against: str
    """Whom every epsilon here holds against, and on which condition."""
    simulation: str | None
    """The command that gave the same model."""


def run_demo(demo: Demo, folder: Path | None, *, keep: bool, as_json: bool) -> None:
    """Show it, in `folder` or in a temporary one that is removed unless it is to be kept.

    Raises:
        LeptonError: a step failed; every process has ended all the same.
    """
    if folder is not None:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder}: is not empty", fix="name a new folder")
        home, keep = make_writable(folder).resolve(), True
    else:
        home = Path(tempfile.mkdtemp(prefix="lepton-fl-demo-"))
    try:
        with Children(home) as children:
            saw = _Network(demo, home, children).show()
    except LeptonError as error:
        if not keep:
            error.fix = error.fix or "the same with --keep, and look into the logs"
        raise
    finally:
        if keep:
            say(f"all files: {home}")
        else:
            shutil.rmtree(home)
    if as_json:
        print_json(asdict(saw))
    else:
        _print(saw)


class _Network:
    """A server and its sites, each in a folder of its own under `home`."""

    def __init__(self, demo: Demo, home: Path, children: Children) -> None:
        self._demo = demo
        self._home = home
        self._children = children
        self._sites = sorted(site for site, _, _ in dealt(DATA_SET, demo.sites))
        self._ports = _free_ports(3)

    def show(self) -> Saw:
        """All of it, from `ca init` to what each saw."""
        self._write_files()
        self._begin()
        with open_desk(self._home / "server" / "server.toml") as desk:
            self._enrol(desk)
            study = load_study(self._home / "study.toml")
            self._agree(desk.studies, study)
            run, victim, returned = self._run(desk.studies, study)
            saw = self._what_was_seen(desk.studies, study, run, victim, returned=returned)
        self._children.end()
        return saw

    def _type(self, *words: str, allowed: tuple[int, ...] = (0,)) -> Ended:
        """Run a command and show it."""
        say(f"$ lepton-fl {shlex.join(words)}")
        return self._children.run(*words, allowed=allowed)

    def _start(self, name: str, *words: str, log: str) -> None:
        """Start a command that stays, and show it."""
        say(f"$ lepton-fl {shlex.join(words)} &")
        self._children.start(name, *words, log=self._home / log)

    def _until(self, what: str, done: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not done():
            self._children.check()
            if time.monotonic() > until:
                raise ConnectionFailed(f"{what}: not within {PATIENCE_S:.0f} s")
            time.sleep(_POLL_S)

    # Before the run

    def _write_files(self) -> None:
        demo, home = self._demo, self._home
        dealing = () if demo.sites is None else ("--sites", str(demo.sites))
        self._type("data", "write", DATA_SET, "tables", *dealing)
        fleet, enrolment, status = (f"{_LOOPBACK}:{port}" for port in self._ports)
        server = {
            "server": {"name": "demo", "insecure_demo": demo.seed is not None},
            "listen": {"fleet": fleet, "enrolment": enrolment, "status": status},
            # So that the others are seen to go on without the agent that is killed.
            "runs": {"grace_s": 1.0, "settle_s": 1.0},
        }
        self._write("server/server.toml", tomli_w.dumps(server))
        self._write("server/passphrase", secrets.token_hex(16), mode=0o600)
        for site in self._sites:
            table = {"site": {"id": site}, "data": {"source": f"../tables/{site}.csv"}}
            self._write(f"{site}/site.toml", tomli_w.dumps(table))
            self._write(f"{site}/policy.toml", _policy(site))
        self._write("study.toml", study_text(DATA_SET, epsilon=1.0))
        changes: dict[str, object] = {"train.rounds": demo.rounds, "secure_aggregation.enabled": True}
        # All but one: the round in which an agent is killed is to go on without it.
        changes |= dict.fromkeys(
            ("secure_aggregation.min_sites", "secure_aggregation.min_survivors"), len(self._sites) - 1
        )
        study = override(load_study(home / "study.toml"), changes)
        write_study(home / "study.toml", study)

    def _write(self, name: str, text: str, *, mode: int = 0o644) -> None:
        path = self._home / name
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, text.encode(), mode=mode)

    def _begin(self) -> None:
        """Make the consortium and start its server."""
        self._type("ca", "init", *_SERVER, "--host", _LOOPBACK, "--passphrase-file", "server/passphrase")
        self._start("server", "server", "start", *_SERVER, log="server/server.log")
        self._until("the server listens", lambda: all(map(_listens, self._ports)))

    def _enrol(self, desk: Desk) -> None:
        """Invite, join and approve every site."""
        server = f"{_LOOPBACK}:{self._ports[1]}"
        for site in self._sites:
            token = self._type("enroll", "invite", site, *_SERVER).out.strip()
            words = ("enroll", "join", token, "--server", server, "-c", f"{site}/site.toml")
            say(f"$ lepton-fl enroll join TOKEN --server {server} -c {site}/site.toml &")
            self._children.start(f"{site} joining", *words, log=self._home / site / "join.log")

        def in_state(state: str) -> Callable[[], bool]:
            return lambda: [row.site for row in desk.sites() if row.state == state] == self._sites

        self._until("the sites have asked to join", in_state("requested"))
        for site in self._sites:
            passphrase = ("--passphrase-file", "server/passphrase")
            self._type("enroll", "approve", site, "--yes", *_SERVER, *passphrase)
        for site in self._sites:
            self._children.check(f"{site} joining")
            if self._children.wait(f"{site} joining"):
                raise ConnectionFailed(f"{site}: was approved and did not come in")

    def _agree(self, studies: Studies, study: Study) -> None:
        """Propose the study, connect the agents, and have each site approve it."""
        first: tuple[str, ...] = ()
        if self._demo.seed is not None:
            first = ("--first-model", self._first_model(study, self._demo.seed))
        self._type("study", "submit", "study.toml", *_SERVER, *first)
        for site in self._sites:
            self._start_agent(site)

        def all_say(state: str) -> Callable[[], bool]:
            return lambda: [a.site for a in studies.answers(study.id) if a.state == state] == self._sites

        self._until("the sites know of the study", all_say("waiting"))
        for site in self._sites:
            words = ("study", "approve", _STUDY, "-c", f"{site}/site.toml", "--yes")
            self._start(f"{site} approving", *words, log=f"{site}/approve.log")
        self._until("the sites approve the study", all_say("approved"))
        for site in self._sites:
            self._children.wait(f"{site} approving")

    def _first_model(self, study: Study, seed: int) -> str:
        """What `simulate` with this seed begins with."""
        from safetensors.numpy import save

        arrays = first_model(study, Contract.of(study).width, seed)
        write_atomic(self._home / "first.safetensors", save(arrays))
        return "first.safetensors"

    def _start_agent(self, site: str) -> None:
        log = f"{site}/agent.log"
        if self._demo.seed is None:
            self._start(site, "client", "start", "-c", f"{site}/site.toml", log=log)
            return
        words = (f"{site}/site.toml", str(self._demo.seed))
        say(f"$ python -m lepton_fl.cli.demo_agent {' '.join(words)} &")
        program = ("-P", "-m", "lepton_fl.cli.demo_agent")
        self._children.start(site, *words, log=self._home / log, program=program)

    # The run

    def _run(self, studies: Studies, study: Study) -> tuple[Run, str, bool]:
        """Start it, kill an agent in the middle, start that again, and wait for the end.

        The run, the agent's site, and whether it was in a round again before the end.
        """
        self._type("study", "start", _STUDY, *_SERVER)
        run = studies.runs(study.id)[0]
        victim = self._sites[1]
        with _Progress(study.train.rounds) as show:

            def follow(enough: Callable[[RoundRow], bool]) -> bool:
                return self._follow(studies, run.id, show, enough)

            follow(lambda last: last.number >= study.train.rounds // 8)
            show(f"kill -9 {victim}")
            self._children.kill(victim)
            follow(lambda last: victim not in last.sites)
            show(f"the others go on without {victim}; it is started again")
            self._start_agent(victim)
            back = follow(lambda last: victim in last.sites)
            if back:
                show(f"{victim} is back")
            follow(lambda _: False)
        # Also where the run was too short for it to come back.
        self._until(
            f"{victim} is connected",
            lambda: any(row.site == victim and row.connected for row in studies.sessions()),
        )
        run = studies.run(run.id)
        if run.state != "finished":
            raise ConnectionFailed(f"the run is {run.state}: {run.reason}")
        return run, victim, back

    def _follow(self, studies: Studies, run: str, show: _Show, enough: Callable[[RoundRow], bool]) -> bool:
        """Show the run's rounds until one is `enough`; False if the run ended before."""
        seen, until = 0, time.monotonic() + PATIENCE_S
        while studies.run(run).active:
            for last in studies.rounds(run, last=1):
                if last.number > seen:
                    seen, until = last.number, time.monotonic() + PATIENCE_S
                    show(last)
                if enough(last):
                    return True
            self._children.check()
            if time.monotonic() > until:
                raise ConnectionFailed(f"the run: no round for {PATIENCE_S:.0f} s")
            time.sleep(_POLL_S)
        return False

    # After the run

    def _what_was_seen(self, studies: Studies, study: Study, run: Run, victim: str, *, returned: bool) -> Saw:
        rounds = studies.rounds(run.id)
        missed = {site: _missed(site, rounds) for site in self._sites}
        ledgers = {found.site: found for found in budgets([self._home / s for s in self._sites], None)}
        # What a known seed has had a part in is refused.
        allowed = 0 if self._demo.seed is None else PolicyRefused.exit_code
        promoted = self._type("study", "promote", _STUDY, *_SERVER, allowed=(allowed,))
        return Saw(
            rounds=len(rounds),
            seconds=round(sum(row.seconds for row in rounds), 1),
            model=str(run.outcome["model"]),
            labels=tuple(run.outcome["labels"]),
            promoted=promoted.last if promoted.code else promoted.out.strip(),
            sites=tuple(
                SiteSaw(
                    site=site,
                    rounds=sum(site in row.sites for row in rounds),
                    charged=len(ledgers[site].history()),
                    missed=missed[site],
                    bytes_sent=_bytes_sent(self._home / site / "agent.log"),
                    epsilon_spent=ledgers[site].spent(),
                    epsilon_allowed=ledgers[site].allowed,
                )
                for site in self._sites
            ),
            killed=victim,
            returned=returned,
            unit=study.privacy.unit,
            delta=_DELTA,
            holds_against=Guarantee.of(study).holds_against,
            simulation=None
            if self._demo.seed is None
            else self._simulate(study, self._demo.seed, missed, run),
        )

    def _simulate(self, study: Study, seed: int, missed: Mapping[str, Mapping[str, str]], run: Run) -> str:
        """The same run in this process, with the same sites away; returns it as a command.

        Raises:
            VerificationFailed: it gave another model.
        """
        drops = [f"{site}@{_span(rounds)}" for site, spans in missed.items() for rounds in spans]
        say(f"the same in one process, {', '.join(drops) or 'no site'} away")
        with logged_to(self._home / "simulated.log"):
            found = self._simulated(study, seed, drops)
        model = str(run.outcome["model"])
        if found != model:
            raise VerificationFailed(f"model sha256 {model}, of the simulation {found}")
        words = ["lepton-fl", "simulate", "study.toml", "--data", "tables", "--engine", "process"]
        words += ["--compare", "federated", "--seed", str(seed)]
        return shlex.join([*words, *(word for drop in drops for word in ("--drop", drop))])

    def _simulated(self, study: Study, seed: int, drops: Sequence[str]) -> str:
        """SHA-256 of the simulation's model."""
        tables = read_tables(
            study, dataset_name=None, data=self._home / "tables", sites=None, how=NATURAL, seed=seed
        )
        simulated = prepare(
            study,
            split_sites(tables, study, seed),
            seed,
            drops=[Drop.parse(drop) for drop in drops],
            engine="process",
        )
        try:
            simulated.start()
        finally:
            simulated.close()
        return model_hash(simulated.federation.model)


_Show = Callable[[RoundRow | str], None]
"""Shows the last round, or a remark."""


class _Progress:
    """A bar on a terminal, some lines elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._told = 0
        self._bar: Progress | None = None

    def __enter__(self) -> _Show:
        out = console(stderr=True)
        if out.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

            columns = (
                "round",
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                "{task.description}",
            )
            self._bar = Progress(*columns, console=out)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total)
        return self._show

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show(self, what: RoundRow | str) -> None:
        if isinstance(what, str):
            # Above the bar, where there is one.
            say(what)
        elif self._bar is not None:
            self._bar.update(self._task, completed=what.number, description=", ".join(what.sites))
        elif what.number * 10 // self._total > self._told:
            self._told = what.number * 10 // self._total
            say(f"round {what.number} of {self._total}: {', '.join(what.sites)}")


def _missed(site: str, rounds: Iterable[RoundRow]) -> dict[str, str]:
    """The rounds that went on without `site`, those in a row together, and why the first of them did."""
    spans: list[tuple[int, int, str]] = []
    for row in rounds:
        if site in row.sites:
            continue
        if spans and spans[-1][1] == row.number - 1:
            first, _, why = spans.pop()
        else:
            first, why = row.number, row.dropped.get(site, "not connected")
        spans.append((first, row.number, why))
    return {f"{first}" if first == last else f"{first}-{last}": why for first, last, why in spans}


def _span(rounds: str) -> str:
    return rounds if "-" in rounds else f"{rounds}-{rounds}"


def _bytes_sent(log: Path) -> int:
    """The bytes of updates that an agent's own log says have left."""
    total = 0
    for line in log.read_text().splitlines():
        if line.startswith("{"):
            said: dict[str, Any] = json.loads(line)
            total += said.get("bytes", 0) if said.get("event") == "answered" else 0
    return total


def _print(saw: Saw) -> None:
    rows = [
        (
            site.site,
            str(site.rounds),
            "; ".join(f"{rounds}: {why}" for rounds, why in site.missed.items()) or "none",
            f"{site.charged}",
            f"{site.bytes_sent:,}",
            f"{site.epsilon_spent:.3f} of {site.epsilon_allowed:g}",
        )
        for site in saw.sites
    ]
    columns = ("site", "rounds in", "rounds out", "rounds charged", "bytes sent", "epsilon spent")
    print_table("What each site saw", columns, rows, right=(1, 3, 4))
    typer.echo(f"epsilon: at delta {saw.delta:g} per {saw.unit} of that site, against {saw.holds_against}")
    again = (
        "was in later rounds" if saw.returned else "the run was over before it was back: try more --rounds"
    )
    typer.echo(f"killed: the agent of {saw.killed}, and started again; {again}")
    typer.echo(f"server: {saw.rounds} rounds in {saw.seconds:.1f} s, model sha256 {saw.model}")
    for label in saw.labels:
        typer.echo(f"label: {label}")
    typer.echo(f"promote: {saw.promoted}")
    if saw.simulation is not None:
        typer.echo(f"the same model, bit by bit, comes from: {saw.simulation}")


def _policy(site: str) -> str:
    return policy_text(
        data_id=f"{site}-disease",
        epsilon_total=2.0,
        epsilon_per_study=2.0,
        delta_total=_DELTA,
        privacy_unit="record",
        min_rows=20,
        min_positives=5,
        approval="manual",
    )


def _free_ports(number: int) -> list[int]:
    """Ports of this machine that nobody listens on now."""
    held = [socket.create_server((_LOOPBACK, 0)) for _ in range(number)]
    try:
        return [sock.getsockname()[1] for sock in held]
    finally:
        for sock in held:
            sock.close()


def _listens(port: int) -> bool:
    try:
        socket.create_connection((_LOOPBACK, port), timeout=1.0).close()
    except OSError:
        return False
    return True
