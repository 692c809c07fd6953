"""`lepton-fl study`: what the operator proposes and runs, and what the people of a site say to it.

Which side a command is on is told by the file that it is given: server.toml or site.toml.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lepton_fl.cli.desk import open_desk, server_files
from lepton_fl.cli.keys import new_key, read_key
from lepton_fl.cli.options import SERVER_TOML, Json, ServerFile, SiteFile
from lepton_fl.cli.server import progress, round_lines, run_json, study_json, when
from lepton_fl.cli.terminal import Commands, fail, make_writable, print_json, print_table, printable, say
from lepton_fl.errors import ConfigError, ConnectionFailed, LeptonError

if TYPE_CHECKING:
    from lepton_fl.cli.desk import Desk
    from lepton_fl.fleet.server.studies import Run, Submitted
    from lepton_fl.site.approvals import StudySignature
    from lepton_fl.study import Study

ON_ITS_WAY_S = 5.0
"""How long a site waits for an offer that its running agent may be about to hear."""
FOLLOW_S = 0.3
"""Between two looks of `--follow`."""
_LAST_ROUNDS = 10

study_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    suggest_commands=False,
    help="Studies: submit, start and promote them (on the server's machine, with -c server.toml); see and "
    "approve them (at a site, with -c site.toml).",
)
StudyText = Annotated[str, typer.Argument(help="Name, beginning of the id, or study.toml.", metavar="STUDY")]
SubmittedText = Annotated[str, typer.Argument(help="Name, or beginning of the id.", metavar="STUDY")]
EitherFile = Annotated[
    Path | None, typer.Option("-c", "--config", help="server.toml of the consortium, or a site's site.toml.")
]
Follow = Annotated[bool, typer.Option("--follow", help="Tell of each round until the run ends.")]


def _is_site(config: Path) -> bool:
    """Whether a file is a site's site.toml, and not a server.toml."""
    from lepton_fl.config import read_toml

    return "site" in read_toml(config)


# Both sides


@study_app.command("list")
def study_list(config: EitherFile = SERVER_TOML, as_json: Json = False) -> None:
    """The studies that were submitted, or at a site, that were offered to it.

    Example: lepton-fl study list -c server.toml
    """
    if config is not None and config.exists() and _is_site(config):
        _list_offers(config, as_json=as_json)
        return
    with open_desk(config or SERVER_TOML) as desk:
        studies = desk.studies.studies()
        if as_json:
            print_json([study_json(desk, study) for study in studies])
            return
        rows = []
        for study in studies:
            runs = desk.studies.runs(study.id)
            last = f"{runs[0].state}, {progress(runs[0], study)}" if runs else "no run yet"
            rows.append((study.name, study.id[:12], when(study.submitted_at), _hides(study.study()), last))
        print_table("studies", ("study", "id", "submitted", "the server sees", "last run"), rows)


def _hides(study: Study) -> str:
    secure = study.secure_aggregation
    return f"sums over {secure.min_sites} sites or more" if secure.enabled else "each site's update"


def _list_offers(config: Path, *, as_json: bool) -> None:
    from lepton_fl.fleet.agent.offers import offers_of

    offered = offers_of(config).list()
    if as_json:
        print_json(
            [
                {"study": o.study.study.name, "id": o.study.id, "state": o.state, "reason": o.reason}
                for o in offered
            ]
        )
        return
    rows = [
        (o.study.study.name, o.study.id[:12], o.study.study.purpose, _hides(o.study), o.state, o.reason)
        for o in offered
    ]
    columns = ("study", "id", "purpose", "the server sees", "this site", "reason")
    print_table("studies offered to this site", columns, rows)


@study_app.command("show")
def study_show(text: StudyText, config: EitherFile = None, as_json: Json = False) -> None:
    """What a study is, what would leave a site, and what it promises, in plain sentences.

    With -c server.toml also who has approved it, who waits and who refuses, and its runs; with -c site.toml,
    what this site says to it.

    Example: lepton-fl study show study.toml

    Example: lepton-fl study show card-fraud-2026q4 -c server.toml
    """
    if config is None and not Path(text).exists() and SERVER_TOML.exists():
        config = SERVER_TOML
    if config is None or Path(text).is_file():
        _show(_from_file(text), {}, as_json=as_json)
    elif _is_site(config):
        from lepton_fl.fleet.agent.offers import offers_of

        judged = offers_of(config).judge(_offered(text, config))
        said = {"this_site": judged.state + (f": {judged.reason}" if judged.reason else "")}
        _show(judged.study, said, as_json=as_json)
        if judged.state == "waiting":
            say(f"next: lepton-fl study approve {text} -c {config}, or study refuse")
    else:
        with open_desk(config) as desk:
            _show_submitted(desk, desk.studies.find(text), as_json=as_json)


def _show(study: Study, more: Mapping[str, object], *, as_json: bool) -> None:
    from lepton_fl.cli.planning import describe

    found = {**describe(study), **more}
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        typer.echo(printable(f"{name.replace('_', ' ')}: {value}"))


def _show_submitted(desk: Desk, study: Submitted, *, as_json: bool) -> None:
    if as_json:
        _show(study.study(), study_json(desk, study), as_json=True)
        return
    _show(study.study(), {}, as_json=False)
    connected = desk.connected()
    said = {answer.party: answer for answer in desk.studies.answers(study.id)}
    rows = []
    for site in desk.sites():
        if site.state != "enrolled" or site.party is None:
            continue
        answer = said.get(site.party)
        rows.append(
            (
                site.site,
                "connected" if site.party in connected else "not connected",
                "has not answered" if answer is None else answer.state,
                "" if answer is None else when(answer.at),
                "" if answer is None else answer.reason,
            )
        )
    print_table(
        f"sites: the study asks at least {study.min_sites}", ("site", "is", "says", "since", "reason"), rows
    )
    for run in desk.studies.runs(study.id):
        typer.echo(printable(f"run {run.id}: {run.state}, {progress(run, study)}"))
        lines = round_lines(desk, run, last=_LAST_ROUNDS)
        if lines:
            print_table("its last rounds", ("round", "at", "seconds", "sites", "dropped"), lines)


def _from_file(text: str) -> Study:
    from lepton_fl.study import load_study

    return load_study(Path(text))


# At a site


@study_app.command("approve")
def study_approve(
    text: StudyText,
    config: SiteFile,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Approve a study at this site, for policies with `approval = "manual"`. The server hears of it.

    The approval is signed with the key of the site's ledger, which is begun where there is none. A signature
    in STUDY.sig beside a STUDY.toml is kept too, for policies with `approval = "signed-study"`.

    Example: lepton-fl study approve card-fraud-2026q4 -c site.toml
    """
    from lepton_fl.cli.planning import describe
    from lepton_fl.fleet.agent.offers import approving_key, offers_of
    from lepton_fl.site.config import files_of
    from lepton_fl.site.policy import admit_study, load_policy
    from lepton_fl.study import check_deployable

    offers, site = offers_of(config), files_of(config)
    study = _at_site(text, config)
    signature = _signature(Path(text), study)
    check_deployable(study, text)
    # Before anybody is asked: what the policy forbids cannot be approved.
    admit_study(load_policy(site.policy), study, cohort=None, file=str(site.policy), approvals=None)
    found = describe(study)
    for name in (
        "study",
        "id",
        "purpose",
        "leaves_the_site",
        "hiding",
        "promise",
        "epsilon_by_who_looks",
        "unit",
    ):
        if name in found:
            typer.echo(printable(f"{name.replace('_', ' ')}: {found[name]}"))
    if not yes and not typer.confirm(f"Approve this study at {site.name}?", default=False):
        fail("not approved", 4)
    make_writable(site.approvals.parent)
    # First: the agent looks again when the approvals change.
    if signature is not None:
        offers.take_signature(study, signature)
    offers.approve(study, approving_key(config))
    typer.echo(f"approved {study.id[:16]} in {site.approvals}")
    # By what is on disk now: an approval is not all that every policy asks for.
    judged = offers_of(config).judge(study)
    if judged.state == "refused":
        say(f"it does not run yet: {judged.reason}")


@study_app.command("refuse")
def study_refuse(
    text: StudyText,
    config: SiteFile,
    reason: Annotated[str, typer.Option(help="Told to the study's operator.")] = "",
) -> None:
    """Refuse a study at this site, whatever its policy says; also one that was approved.

    Example: lepton-fl study refuse card-fraud-2026q4 -c site.toml --reason "not before the audit"
    """
    from lepton_fl.fleet.agent.offers import offers_of
    from lepton_fl.site.config import files_of

    study, site = _at_site(text, config), files_of(config)
    make_writable(site.approvals.parent)
    offers_of(config).refuse(study, reason)
    typer.echo(f"refused {study.id[:16]} in {site.approvals}")


def _at_site(text: str, config: Path) -> Study:
    """A study by its file, or as it was offered."""
    return _from_file(text) if Path(text).is_file() else _offered(text, config)


def _offered(text: str, config: Path) -> Study:
    """A study by its name or id. One that was just proposed may still be on its way to the agent."""
    from lepton_fl.fleet.agent.local import socket_path
    from lepton_fl.fleet.agent.offers import offers_of
    from lepton_fl.site.config import files_of

    offers, until = offers_of(config), time.monotonic() + ON_ITS_WAY_S
    agent = socket_path(files_of(config).state)
    while True:
        try:
            return offers.find(text)
        except ConfigError:
            if not agent.exists() or time.monotonic() >= until:
                raise
        time.sleep(0.1)


def _signature(study_file: Path, study: Study) -> StudySignature | None:
    """The signature that lies beside a study.toml, verified; None where there is none."""
    from lepton_fl.site.approvals import StudySignature, signature_file

    path = signature_file(study_file)
    return StudySignature.load(path, study.id) if study_file.is_file() and path.exists() else None


# With a key that signs studies


@study_app.command("key")
def study_key(
    file: Annotated[Path, typer.Argument(help="Where to write the new key, mode 0600.", metavar="FILE")],
) -> None:
    """Make a key that signs studies; prints the lines for policies that let in what it has signed.

    Example: lepton-fl study key studies.pem
    """
    public = new_key(file)
    say(f"wrote {file}; sites that trust it put these lines under [require] in policy.toml:")
    typer.echo(f'approval = "signed-study"\nstudy_key = "{public}"')


@study_app.command("sign")
def study_sign(
    study_file: Annotated[Path, typer.Argument(help="study.toml", metavar="STUDY.toml")],
    key: Annotated[Path, typer.Option("--key", help="As `study key` made it, mode 0600.", metavar="FILE")],
) -> None:
    """Sign a study, for policies with `approval = "signed-study"`: written to STUDY.sig beside it.

    `study submit` sends it along. Any change of the study is another study, and needs another signature.

    Example: lepton-fl study sign study.toml --key studies.pem
    """
    from lepton_fl.site.approvals import StudySignature, signature_file
    from lepton_fl.study import load_study

    study, place = load_study(study_file), signature_file(study_file)
    make_writable(place.absolute().parent)
    StudySignature.sign(read_key(key), study.id).save(place)
    typer.echo(str(place))
    say(f"signed {study.study.name}, study id {study.id[:16]}")


# On the server's machine


@study_app.command("submit")
def study_submit(
    study_file: Annotated[Path, typer.Argument(help="study.toml", metavar="STUDY.toml")],
    config: ServerFile = SERVER_TOML,
    first_model: Annotated[
        Path | None,
        typer.Option(help="Model that each run begins with, as safetensors (default: drawn anew)."),
    ] = None,
) -> None:
    """Propose a study to every enrolled site. Nothing is trained before their people agree.

    With its signature, where one lies in STUDY.sig beside it; also for a study that was submitted before.

    Example: lepton-fl study submit study.toml -c server.toml
    """
    from lepton_fl.files import write_atomic
    from lepton_fl.study import load_study

    study = load_study(study_file)
    signature = _signature(study_file, study)
    with open_desk(config) as desk:
        digest = None
        if first_model is not None:
            from lepton_fl.tasks.arrays import model_hash
            from lepton_fl.tasks.model_file import read_model

            try:
                content = first_model.read_bytes()
            except OSError as error:
                raise ConfigError(f"{first_model}: cannot be read: {error.strerror}") from None
            digest = model_hash(read_model(content, study, file=str(first_model)))
            place = desk.files.first_model(digest)
            place.parent.mkdir(mode=0o700, exist_ok=True)
            # Before the study: a run must find it.
            write_atomic(place, content, mode=0o600)
        signed = b"" if signature is None else signature.to_bytes()
        new = desk.studies.submit(study, first_model=digest, signature=signed)
        down = desk.server is None
    typer.echo(study.id)
    how = "" if signature is None else f", signed by {signature.key.hex()[:16]}"
    say((f"submitted {study.study.name}" if new else f"{study.study.name} was submitted before") + how)
    if down:
        say(f"the server is down; sites hear of it after: lepton-fl server start -c {config}")
    say(f"next: lepton-fl study show {study.study.name} -c {config}     (who approves)")


@study_app.command("start")
def study_start(
    text: SubmittedText,
    config: ServerFile = SERVER_TOML,
    sites: Annotated[
        str, typer.Option(help="Only these may take part, as a,b,c (default: all that approve).")
    ] = "",
    wait: Annotated[
        bool, typer.Option("--wait", help="Begin by itself once enough sites approve and are connected.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Also after a finished run: the sites are charged once more.")
    ] = False,
    follow: Follow = False,
) -> None:
    """Start a run of a study over the sites that have approved it. Exit 6 where they are too few.

    Example: lepton-fl study start card-fraud-2026q4 -c server.toml --follow
    """
    from lepton_fl.fleet.server.studies import ready

    with open_desk(config) as desk:
        study = desk.studies.find(text)
        named = [name.strip() for name in sites.split(",") if name.strip()]
        _check_names(desk, named)
        here = None
        if not wait:
            _check_server(desk)
            answers = desk.studies.answers(study.id)
            here = list(ready(answers, desk.connected(), sites=named).values())
        run = desk.studies.want(study, sites=named, ready=here, again=again)
        typer.echo(run.id)
        _went(desk, study, run, follow=follow)


@study_app.command("stop")
def study_stop(text: SubmittedText, config: ServerFile = SERVER_TOML) -> None:
    """Stop the run of a study after its round; `study resume` goes on with it.

    Example: lepton-fl study stop card-fraud-2026q4 -c server.toml
    """
    with open_desk(config) as desk:
        run = desk.studies.stop(desk.studies.find(text))
        say(f"run {run.id[:8]}: {run.state}")


@study_app.command("resume")
def study_resume(text: SubmittedText, config: ServerFile = SERVER_TOML, follow: Follow = False) -> None:
    """Go on with a run that was stopped, or has failed, at the round after the last one that was sent out.

    It begins when enough of its sites are connected.

    Example: lepton-fl study resume card-fraud-2026q4 -c server.toml --follow
    """
    with open_desk(config) as desk:
        study = desk.studies.find(text)
        run = desk.studies.resume(study)
        _went(desk, study, run, follow=follow)


def _check_names(desk: Desk, named: Sequence[str]) -> None:
    known = {row.site for row in desk.sites() if row.state == "enrolled"}
    if unknown := sorted(set(named) - known):
        raise ConfigError.at(
            "command line", "--sites", found=unknown[0], allowed=", ".join(sorted(known)) or "no site yet"
        )


def _check_server(desk: Desk) -> None:
    if desk.server is None:
        raise ConnectionFailed(
            "the server is down: no site is connected",
            fix=f"lepton-fl server start -c {desk.files.path}, or --wait",
        )


def _went(desk: Desk, study: Submitted, run: Run, *, follow: bool) -> None:
    if follow:
        _follow(desk, study, run)
        return
    say(f"run {run.id[:8]} of {study.name}: {run.state}")
    if desk.server is None:
        say(f"it begins after: lepton-fl server start -c {desk.files.path}")
    say(f"next: lepton-fl server status --watch -c {desk.files.path}")


def _follow(desk: Desk, study: Submitted, run: Run) -> None:
    """Tell of a run until it ends; the exit code is the run's."""
    told, state = 0, ""
    while True:
        # The state first: when it has ended, all of its rounds are written.
        run = desk.studies.run(run.id)
        for row in desk.studies.rounds(run.id)[told:]:
            told += 1
            how = f"{len(row.sites)} sites" if row.sites else "lost"
            dropped = "".join(f", without {site}: {why}" for site, why in sorted(row.dropped.items()))
            say(f"round {row.number}/{study.rounds}: {how}{dropped} ({row.seconds:.2f} s)")
        if run.state != state:
            state = run.state
            say(f"run {run.id[:8]}: {state}, {progress(run, study)}")
        if not run.active:
            break
        time.sleep(FOLLOW_S)
    if run.state == "failed":
        fail(f"study {study.name}: {run.reason}", run.exit_code or LeptonError.exit_code)
    if run.state == "finished":
        say(f"next: lepton-fl study promote {study.name} -c {desk.files.path}")


@study_app.command("promote")
def study_promote(text: SubmittedText, config: ServerFile = SERVER_TOML, as_json: Json = False) -> None:
    """Put the model of a study's finished run into use, as the next version of the study's name.

    STUDY may also be the beginning of a run's id. The model is copied to
    STATE/models/NAME/VERSION, and STATE/models/NAME/current points there.

    Example: lepton-fl study promote card-fraud-2026q4 -c server.toml
    """
    from lepton_fl.fleet.server.models import promote

    with open_desk(config) as desk:
        study = desk.studies.find(text)
        run, version, place = promote(desk.files, desk.studies, study, text)
        if as_json:
            print_json({"version": version, "folder": str(place), "run": run_json(desk, run)})
            return
    typer.echo(str(place))
    say(f"{study.name} version {version} is current: model {run.outcome['model'][:16]} of run {run.id[:8]}")


@study_app.command("rollback")
def study_rollback(
    name: Annotated[str, typer.Argument(help="The study's name.", metavar="NAME")],
    config: ServerFile = SERVER_TOML,
) -> None:
    """Put the version before the current one back into use.

    Example: lepton-fl study rollback card-fraud-2026q4 -c server.toml
    """
    from lepton_fl.fleet.server.models import rollback

    version, place = rollback(server_files(config), name)
    typer.echo(str(place))
    say(f"{name} version {version} is current")
