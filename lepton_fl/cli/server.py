"""`lepton-fl server`: the process that a federation's agents connect to, and how it stands."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.cli.desk import open_desk, server_files
from lepton_fl.cli.options import SERVER_TOML, Json, OfSite, ReceiptsFile, ServerFile
from lepton_fl.cli.terminal import Commands, console, print_json, print_table, printable, say
from lepton_fl.errors import ConnectionFailed

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lepton_fl.cli.desk import Desk
    from lepton_fl.fleet.pki.authority import ServerIdentity
    from lepton_fl.fleet.server.lock import Running
    from lepton_fl.fleet.server.register import SiteRow
    from lepton_fl.fleet.server.studies import Run, SessionRow, Submitted

WATCH_S = 1.0
"""Between two looks of `--watch`."""
_STOP_S = 60.0
"""How much longer than `runs.leave_s` a server may take to end."""
_LAST_ROUNDS = 5

server_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    suggest_commands=False,
    help="Run the server of a federation, and see how it stands.",
)


@server_app.command("start")
def server_start(config: ServerFile = SERVER_TOML) -> None:
    """Run the server, in the foreground, until SIGTERM or Ctrl-C.

    Runs that it was working on go on when it is started again, also after a crash.

    Example: lepton-fl server start -c server.toml
    """
    from lepton_fl.fleet.server.process import announce, serve

    files = server_files(config)

    def started(found: Running, identity: ServerIdentity, sites: int) -> None:
        for line in announce(files, found, identity, sites):
            say(line)

    serve(files, started=started)


@server_app.command("stop")
def server_stop(config: ServerFile = SERVER_TOML) -> None:
    """Ask the server to end, and wait: runs finish their round, and go on when it is started again.

    Example: lepton-fl server stop -c server.toml
    """
    from lepton_fl.fleet.server.lock import running

    files = server_files(config)
    found = running(files)
    if found is None or not found.pid:
        raise ConnectionFailed(f"{files.state}: no server runs on this state folder")
    os.kill(found.pid, signal.SIGTERM)
    until = time.monotonic() + files.config.runs.leave_s + _STOP_S
    while running(files) is not None:
        if time.monotonic() > until:
            raise ConnectionFailed(f"process {found.pid} does not end", fix=f"kill -9 {found.pid}")
        time.sleep(0.1)
    say("server stopped")


@server_app.command("receipts")
def server_receipts(site: OfSite, file: ReceiptsFile, config: ServerFile = SERVER_TOML) -> None:
    """Write down all that the server has seen of a site's ledger: for that site's people, to recover it by.

    Also while the server runs.

    Example: lepton-fl server receipts bank-a bank-a.receipts -c server.toml
    """
    from lepton_fl.cli.budgets import write_receipts
    from lepton_fl.fleet.server.ledgers import open_witness

    files = server_files(config)
    write_receipts(files.witness, lambda: open_witness(files), site, file)


@server_app.command("status")
def server_status(
    config: ServerFile = SERVER_TOML,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Addresses, sites, studies and runs; also when the server is down, as it was last heard of.

    With --json, each run has all of its rounds: who was in, and who was dropped for what reason.

    Example: lepton-fl server status --watch
    """
    with open_desk(config) as desk:
        if as_json:
            print_json(status_json(desk))
        elif watch:
            _watch(desk)
        else:
            for title, columns, rows in _tables(desk):
                print_table(title if rows else f"{title}: none", columns if rows else (), rows)


# What there is to say


def status_json(desk: Desk) -> dict[str, Any]:
    """Everything, for programs."""
    server, sessions = desk.server, {row.party: row for row in desk.studies.sessions()}
    connected = desk.connected()
    return {
        "consortium": desk.files.config.server.name,
        "server": None if server is None else asdict(server),
        "sites": [
            {
                **row.as_json(),
                "connected": row.party in connected,
                "session": None if row.party not in sessions else asdict(sessions[row.party]),
            }
            for row in desk.sites()
        ],
        "studies": [study_json(desk, study) for study in desk.studies.studies()],
    }


def study_json(desk: Desk, study: Submitted) -> dict[str, Any]:
    """A study, what sites say to it, and its runs with all of their rounds."""
    return {
        "id": study.id,
        "name": study.name,
        "min_sites": study.min_sites,
        "rounds": study.rounds,
        "first_model": study.first_model,
        "submitted_at": study.submitted_at,
        "answers": [asdict(answer) for answer in desk.studies.answers(study.id)],
        "runs": [run_json(desk, run) for run in desk.studies.runs(study.id)],
    }


def run_json(desk: Desk, run: Run) -> dict[str, Any]:
    """A run with all of its rounds."""
    return {**asdict(run), "rounds": [asdict(row) for row in desk.studies.rounds(run.id)]}


def progress(run: Run, study: Submitted) -> str:
    """How far a run is, and what became of it, in a few words."""
    parts = [f"{run.done} of {study.rounds} rounds"]
    if run.version is not None:
        parts.append(f"promoted as version {run.version}")
    if model := run.outcome.get("model"):
        parts.append(f"model {model[:12]}")
    return ", ".join([*parts, *run.outcome.get("labels", ()), *filter(None, [run.reason])])


_Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def _tables(desk: Desk) -> list[_Table]:
    server, connected = desk.server, desk.connected()
    sessions = {row.party: row for row in desk.studies.sessions()}
    if server is None:
        about = "the server is down; below is what it last heard"
    else:
        open_to = f"agents {server.fleet}, enrolment {server.enrolment or 'closed'}"
        about = f"process {server.pid}, up since {when(server.since)}, {open_to}"
    tables: list[_Table] = [
        (
            f"{desk.files.config.server.name}: {about}",
            ("site", "party", "is", "since", "last heard", "release", "device", "certificate until"),
            [_site_line(row, sessions, connected) for row in desk.sites()],
        )
    ]
    studies = desk.studies.studies()
    lines: list[tuple[str, ...]] = []
    for study in studies:
        said = [answer.state for answer in desk.studies.answers(study.id)]
        counts = ", ".join(f"{said.count(s)} {s}" for s in ("approved", "waiting", "refused") if s in said)
        lines.append((study.name, study.id[:12], when(study.submitted_at), counts or "no answer yet"))
    tables.append(("studies", ("study", "id", "submitted", "sites"), lines))
    by_id = {study.id: study for study in studies}
    runs = desk.studies.runs()
    tables.append(
        (
            "runs",
            ("study", "run", "is", "since", "progress"),
            [
                (
                    by_id[run.study].name,
                    run.id[:8],
                    run.state,
                    when(run.changed_at),
                    progress(run, by_id[run.study]),
                )
                for run in runs
            ],
        )
    )
    if active := next((run for run in runs if run.active), None):
        tables.append(
            (
                f"last rounds of run {active.id[:8]}",
                ("round", "at", "seconds", "sites", "dropped"),
                round_lines(desk, active, last=_LAST_ROUNDS),
            )
        )
    return tables


def round_lines(desk: Desk, run: Run, *, last: int) -> list[tuple[str, ...]]:
    """The last rounds of a run, for a table."""
    return [
        (
            str(row.number),
            when(row.at),
            f"{row.seconds:.2f}",
            ", ".join(row.sites) or "lost",
            "; ".join(f"{site}: {why}" for site, why in sorted(row.dropped.items())),
        )
        for row in desk.studies.rounds(run.id, last=last)
    ]


def _site_line(
    row: SiteRow, sessions: dict[int, SessionRow], connected: dict[int, SessionRow]
) -> tuple[str, ...]:
    session = None if row.party is None else sessions.get(row.party)
    here = row.party in connected
    state: str = row.state if row.state != "enrolled" else "connected" if here else "not connected"
    if here and session is not None and session.state not in ("", "idle"):
        state = f"connected, {session.state}"
    return (
        row.site,
        "" if row.party is None else str(row.party),
        state,
        when(session.since) if here and session is not None else f"{row.since:%Y-%m-%d %H:%M:%S}",
        "" if session is None else when(session.heard),
        "" if session is None else session.release,
        "" if session is None else session.device,
        "" if row.until is None or row.party is None else f"{row.until:%Y-%m-%d %H:%M}",
    )


def when(seconds: float) -> str:
    """A moment, UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


def _watch(desk: Desk) -> None:
    """A live view in a terminal; elsewhere a line for whatever is new."""
    if console().is_terminal:
        from rich.live import Live

        with Live(_drawn(desk), console=console(), auto_refresh=False) as live:
            while True:
                time.sleep(WATCH_S)
                live.update(_drawn(desk), refresh=True)
    before: dict[str, str] = {}
    while True:
        now = dict(_news(desk))
        for what, how in now.items():
            if before.get(what) != how:
                typer.echo(printable(f"{when(time.time())} {what}: {how}"))
        for what in before.keys() - now.keys():
            typer.echo(printable(f"{when(time.time())} {what}: gone"))
        before = now
        time.sleep(WATCH_S)


def _news(desk: Desk) -> Iterator[tuple[str, str]]:
    """What may change, and how it is."""
    server = desk.server
    yield "server", "down" if server is None else f"up, process {server.pid}"
    connected = desk.connected()
    for row in desk.sites():
        here = row.state == "enrolled" and row.party in connected
        yield f"site {row.site}", "connected" if here else row.state
    for run in desk.studies.runs():
        study = desk.studies.study(run.study)
        yield f"study {study.name} run {run.id[:8]}", f"{run.state}, {progress(run, study)}"


def _drawn(desk: Desk) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for title, columns, rows in _tables(desk):
        if not rows:
            parts.append(Text(f"{printable(title)}: none"))
            continue
        table = Table(*columns, title=Text(printable(title)), title_justify="left")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        parts.append(table)
    return Group(*parts)
