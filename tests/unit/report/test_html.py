from __future__ import annotations

import json
import re
import subprocess
import sys

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from lepton_fl.report import html
from lepton_fl.report.html import render_html
from lepton_fl.results import Arm, Bounded, Interval, Pooled, Results


def without_plotly(page: str) -> str:
    return page.replace(get_plotlyjs(), "")


def section(page: str, name: str) -> str:
    """The part of the page under the heading `name`."""
    return re.search(rf'<section aria-labelledby="{name}">(.*?)</section>', page, re.S)[1]


def text(markup: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", markup).split())


@pytest.fixture
def page(hospitals: Results) -> str:
    return without_plotly(render_html(hospitals))


def test_plotly_is_inlined_once(hospitals):
    """The page carries plotly.js itself, and only one copy of it."""
    page = render_html(hospitals)

    assert page.count(get_plotlyjs()) == 1


def test_nothing_is_loaded(page):
    """No script, style, image or font comes from anywhere but the file."""
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)""", page, re.I)
    assert "<link" not in page
    assert not re.search(r"url\(|@import", page)


def test_browser_is_told_to_load_nothing(page):
    """The content security policy starts from nothing and names no address."""
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]

    assert policy.startswith("default-src &#39;none&#39;;")
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    assert "unsafe-inline" not in re.search(r"script-src([^;]*);", policy)[1]


def test_names_cannot_run_as_script(hostile):
    """A study or a site called <script> appears as text, in tables and in the charts' data."""
    page = without_plotly(render_html(hostile))

    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<script") == page.count("</script") == 3


def test_names_cannot_be_links_in_a_chart(hospitals):
    """plotly reads tags in the text it draws: it is handed names with their tags escaped."""
    link = '<a href=\\"https://bank.example\\">hungary</a>'
    named = Results.model_validate_json(hospitals.model_dump_json().replace("hungary", link))

    drawn = json.dumps(html._figures(named))

    assert "<a " not in drawn
    assert "&lt;a " in drawn


def test_sections_come_in_order(page):
    """The reader meets the parts in the order that the contract gives them."""
    parts = ["band", "verdict", "tiles", "by-site", "precision-recall", "roc", "utility", "point-table"]
    parts += ["recall-at", "recall-table", "top-table", "calibration-before", "calibration-after"]
    parts += [
        "calibration-table",
        "promise-table",
        "ledger-table",
        "epsilon-by-round",
        "time-line",
        "drops-table",
        "reproduce-table",
    ]
    body = page[page.index("<body>") :]
    found = [re.search(rf'(class|id)="{part}"', body).start() for part in parts]

    assert found == sorted(found)


def test_labels_are_in_the_band(page, hospitals):
    """What a reader must know before any figure stands at the top, visibly."""
    band = re.search(r'<aside class="band".*?</aside>', page, re.S)[0]

    assert all(f"<li>{label}</li>" in band for label in hospitals.labels)
    assert "SIMULATED" in hospitals.labels


@pytest.mark.parametrize("status", ["interrupted", "stopped"])
def test_unfinished_run_says_so_in_the_band(hospitals, status):
    """Figures of half a run are not mistaken for those of a whole one."""
    half = hospitals.model_copy(update={"status": status, "rounds": hospitals.rounds[:17]})

    band = re.search(r'<aside class="band".*?</aside>', render_html(half), re.S)[0]

    assert status in band
    assert "17 of 40 rounds" in band


def test_every_site_is_told_what_joining_did(page):
    """Worse for certain, better for certain or neither: in the site's row, and below the chart."""
    rows = re.findall(r"<tr><th scope=\"row\">([^<]*)</th>(.*?)</tr>", section(page, "sites"), re.S)
    told = {site: re.findall(r'class="advice (\w+)">([^<]*)<', cells) for site, cells in rows}

    assert told == {
        "cleveland": [("unclear", "no clear difference")],
        "hungary": [("gains", "gains")],
        "switzerland": [],
        "long-beach": [("keep", "keep your own model")],
    }
    assert "Keep your own model : long-beach; no clear difference : cleveland; gains : hungary." in text(
        section(page, "sites")
    )


def test_table_sets_federated_against_the_better_own_model(page):
    """Both own models have a column; the difference is paired, and to the better of the two."""
    row = re.search(r'<th scope="row">hungary</th>(.*?)</tr>', section(page, "sites"), re.S)[1]

    assert text(row) == (
        "88 (32) 0.832 [0.741, 0.909] 0.851 [0.765, 0.922] 0.887 [0.811, 0.948] 0.893 [0.819, 0.951] "
        "+0.036 [+0.004, +0.071] gains"
    )


def test_file_without_pairs_still_renders(old):
    """An older results.json has one own model and no paired interval: nothing is called certain."""
    page = without_plotly(render_html(old))
    tile = text(re.search(r'id="tile-gain">.*?<div class="tile"', page, re.S)[0])
    sites = text(section(page, "sites"))

    assert "own boosting 0.799" in tile
    assert "logistic" not in tile
    assert "+0.023 (no interval) no clear difference" in sites
    assert "paired" not in sites
    assert "the better of the site's own models" not in sites
    assert len(html._figures(old)["by-site"]["data"]) == 3


def test_undefined_metric_is_worded(page):
    """Switzerland has no AUC, and the reason is given instead of a number."""
    words = "AUC not defined: only one class among the held-out records"

    assert f"switzerland : {words}" in text(section(page, "sites"))
    assert "None" not in text(page)


def test_release_without_noise_is_red(page):
    """What left a site un-noised is printed in red, at that site."""
    red = re.findall(r'<(?:p|span) class="released">(.*?)</', section(page, "privacy"))

    assert "hungary released without noise: AUC on held-out records" in red
    assert "released without noise: AUC on held-out records" in red
    assert re.search(r"\.released \{ color: var\(--red\)", page)


def test_gain_shows_its_paired_interval(page):
    """The first tile says how sure the difference is, and that it may be nothing."""
    tile = text(re.search(r'id="tile-gain">.*?<div class="tile"', page, re.S)[0])

    assert "Federated against each site's own best +0.003 AUC" in tile
    assert "[-0.014, +0.022] : it may be nothing" in tile
    assert "federated 0.814 [0.757, 0.866] own boosting 0.799 [0.738, 0.853]" in tile
    assert "own logistic regression 0.803 [0.744, 0.857]" in tile


def test_gain_without_pairs_is_the_difference_of_the_means(old):
    """A run that compared nothing in pairs shows the difference, and no interval for it."""
    page = without_plotly(render_html(old))
    tile = text(re.search(r'id="tile-gain">.*?<div class="tile"', page, re.S)[0])

    assert "+0.015 AUC" in tile
    assert "may be nothing" not in tile


def test_epsilon_tile_shows_the_most_spent_site(page):
    """6.4412 of 8 at hungary, rounded up, with its unit, delta and whom it holds against."""
    tile = text(re.search(r'id="tile-epsilon">.*?<div class="tile"', page, re.S)[0])

    assert "6.45 of 8 allowed" in tile
    assert "per record at hungary, delta 1e-4" in tile
    assert "holds against: the server and readers of the model" in tile


def test_study_without_noise_has_no_bound(hospitals):
    """noise = none never shows an epsilon, whatever earlier studies spent."""
    promise = hospitals.promise.model_copy(
        update={"noise": "none", "epsilon": None, "delta": None, "noise_multiplier": None}
    )
    rounds = tuple(r.model_copy(update={"epsilon": None}) for r in hospitals.rounds)
    bare = hospitals.model_copy(update={"promise": promise, "rounds": rounds})

    page = without_plotly(render_html(bare))

    assert "no bound" in re.search(r'id="tile-epsilon">.*?<div class="tile"', page, re.S)[0]
    assert "The study promises no privacy per record" in text(section(page, "privacy"))
    assert 'id="epsilon-by-round"' not in page


def test_every_caption_states_its_evidence(page):
    """n, seeds and the interval stand under every chart: of the bootstrap, or that of one seed's records."""
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.S)
    bootstrapped = "n = 276 test records at 4 sites; 3 seeds; 1,000 bootstrap resamples; intervals are 95 %"
    one_seed = "n = 276 held-out records of all sites as one list, 156 positive; seed 1 alone."

    assert page.count('class="chart"') == 9
    assert len(captions) == 7
    for caption in captions:
        assert bootstrapped in caption or one_seed in caption
        assert re.search(r"95 %|No band: the intervals .* are in the table", caption)


def test_large_counts_are_grouped_by_thousands(hospitals):
    """The card of the run writes its units as all captions write theirs."""
    sites = tuple(site.model_copy(update={"train_units": 50_000}) for site in hospitals.sites)
    page = without_plotly(render_html(hospitals.model_copy(update={"sites": sites})))

    assert f"{50_000 * len(sites):,} training units" in page


def test_empty_curve_says_how_to_get_one(hospitals):
    """Without a sweep there is a command instead of an empty chart."""
    page = without_plotly(render_html(hospitals.model_copy(update={"curve": ()})))

    assert "<pre>lepton-fl quickstart</pre>" in section(page, "utility")
    assert 'id="against-epsilon"' not in page


def test_both_own_models_are_lines_across_the_curve(hospitals):
    """Each own model is a horizontal line; the better one alone has a band, so that all stay visible."""
    traces = html._figures(hospitals)["against-epsilon"]["data"]
    lines = {t["line"]["color"]: t["y"] for t in traces if t.get("name", "").startswith("own ")}
    bands = [t["fillcolor"] for t in traces if t.get("fill") == "toself"]

    assert lines == {"--local": [0.799, 0.799], "--linear": [0.803, 0.803]}
    assert bands == ["--linear-band", "--noise-local-band", "--noise-shared-band"]


def test_only_rounds_with_drops_are_listed(page):
    """The short table names the three disturbed rounds and why; the others stay folded away."""
    table = re.search(r'<table id="drops-table">.*?</table>', page, re.S)[0]

    assert re.findall(r'<tr><td class="n">(\d+)', table) == ["13", "14", "29"]
    assert "switzerland: connection lost" in table


def test_everything_needed_to_reproduce_is_there(page, hospitals):
    """Command, study id, model digest, versions, hardware, seeds, start and duration."""
    found = text(section(page, "reproduce"))

    assert hospitals.command in found
    assert hospitals.study_id in found
    assert hospitals.model.sha256 in found
    assert hospitals.data_sha256 in found
    assert "flwr 1.41.0" in found
    assert "seeds 1, 2, 3" in found
    assert "duration 2 min 13 s" in found


def test_auprc_is_spelt_out(hospitals):
    """AUPRC is named in full, and is not drawn against the chance level of AUC."""
    fraud = hospitals.model_copy(update={"metric": "auprc"})

    page = without_plotly(render_html(fraud))

    assert "AUPRC (average precision)" in text(section(page, "sites"))
    assert "as good as chance" not in page


def test_figures_are_valid_to_plotly(hospitals):
    """plotly's own validators accept every figure once its colours are looked up."""
    figures = re.sub(r'"--[a-z-]+"', '"#123456"', json.dumps(html._figures(hospitals)))

    drawn = [go.Figure(figure) for figure in json.loads(figures).values()]

    assert [len(figure.data) for figure in drawn] == [4, 4, 5, 4, 5, 5, 7, 2, 3]


def test_every_colour_of_a_figure_is_in_the_style(hospitals, page):
    """A colour that report.css does not define would be drawn as nothing."""
    used = set(re.findall(r'"(--[a-z-]+)"', json.dumps(html._figures(hospitals))))
    defined = set(re.findall(r"(--[a-z-]+):", page[: page.index("@media screen")]))

    assert used <= defined


def test_long_names_leave_room_for_the_bars(hospitals):
    """An axis label is cut; the bars still stand under the whole name, so no two sites merge."""
    name = "universitaetsklinikum-am-see-kardiologie-"
    data = hospitals.model_dump_json()
    data = data.replace('"hungary"', f'"{name}1"').replace('"cleveland"', f'"{name}2"')

    figure = html._figures(Results.model_validate_json(data))["by-site"]

    assert f"{name}1" in figure["data"][0]["y"]
    assert len(set(figure["data"][0]["y"])) == 4
    assert max(map(len, figure["layout"]["yaxis"]["ticktext"])) == 24


def test_whiskers_reach_the_interval(hospitals):
    """mean plus and minus the whisker are the ends of the interval; none where undefined."""
    federated = html._figures(hospitals)["by-site"]["data"][2]

    assert federated["name"] == "federated"
    assert federated["error_x"]["array"] == pytest.approx([0.055, 0.061, 0, 0.149])
    assert federated["error_x"]["arrayminus"] == pytest.approx([0.068, 0.076, 0, 0.159])


def test_run_that_never_began_still_has_a_report(hospitals):
    """No arm, no round, no site: the page says so instead of failing."""
    nothing = hospitals.model_copy(
        update={
            "status": "stopped",
            "arms": (),
            "curve": (),
            "rounds": (),
            "sites": (),
            "labels": (),
            "model": None,
        }
    )

    page = render_html(nothing)

    assert "0 of 40 rounds" in page
    assert get_plotlyjs() not in page


def test_interval_without_bounds_is_not_invented(hospitals):
    """A single seed without bootstrap has a mean and no whisker."""
    bare = Interval(mean=0.8)
    arm = Arm(arm="federated", label="f", privacy="p", per_site={"hungary": bare}, mean=bare, seeds=1)

    page = without_plotly(render_html(hospitals.model_copy(update={"arms": (arm,)})))

    assert "0.800 (no interval)" in page
    assert "not measured" in page


def test_importing_the_report_is_cheap():
    """plotly and jinja2 are loaded by the first page, not by the import."""
    code = "import sys, lepton_fl.report; sys.exit(bool({'plotly', 'jinja2'} & sys.modules.keys()))"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_time_line_has_a_mark_for_every_site_and_round(hospitals):
    """Took part, dropped and why, or answered in a round that was lost."""
    traces = {t["name"]: t for t in html._figures(hospitals)["time-line"]["data"]}
    marks = {name: len(t["x"]) for name, t in traces.items()}
    dropped = traces["dropped"]

    assert marks == {"took part": 153, "dropped": 3, "answered, but the round was lost": 4}
    assert set(traces["answered, but the round was lost"]["x"]) == {21}
    assert dict(zip(dropped["x"], dropped["y"], strict=True))[29] == "switzerland"
    assert any(why.startswith("dropped: connection lost, ") for why in dropped["customdata"])


def test_a_stopped_run_promises_no_less(hospitals):
    """When to stop was decided by what had been released."""
    page = render_html(hospitals.model_copy(update={"stopped_early": "the updates cancel"}))

    assert "This run stopped early" in page
    assert "what it promises is the study's epsilon" in page
    assert "This run stopped early" not in render_html(hospitals)


def test_site_that_was_never_asked_has_no_mark_in_a_lost_round(hospitals):
    """A refused site did not answer in the round that was lost either."""
    rounds = tuple(
        r.model_copy(
            update={
                "sites": tuple(s for s in r.sites if s != "hungary"),
                "dropped": {s: why for s, why in r.dropped.items() if s != "hungary"},
            }
        )
        for r in hospitals.rounds
    )

    traces = html._figures(hospitals.model_copy(update={"rounds": rounds}))["time-line"]["data"]

    assert all("hungary" not in t["y"] for t in traces)


def test_operating_point_is_counted_per_10000(page):
    """What each arm finds, misses and raises in vain, with achieved rate and how the threshold was set."""
    part = text(section(page, "operating"))
    row = re.search(r'<th scope="row">federated</th>(.*?)</tr>', section(page, "operating"), re.S)[1]

    assert "The study asks for a false positive rate of at most 10 %." in part
    assert re.match(r"[\d,]+ [\d,]+ [\d,]+ [\d,]+ 0\.\d{3} \[", text(row))
    assert "Each site sets its threshold on its own training records" in part
    assert "95 % Wilson intervals over the records." in part


@pytest.mark.parametrize(
    ("point", "agreed", "words"),
    [
        ({"fpr": 0.01}, False, "The study names no operating point; shown is a false positive rate of"),
        ({"alerts_per_day": 200}, True, "Not evaluated: nothing says how many records a day has."),
        ({"cost_fn": 250, "cost_fp": 5}, True, "The study asks for least cost, 250 for a missed positive"),
    ],
)
def test_operating_point_is_named(hospitals, point, agreed, words):
    """The study's, the report's own choice, or why there is none."""
    raw = json.loads(hospitals.model_dump_json())
    raw |= {"operating_point": point, "operating_point_agreed": agreed}
    if "alerts_per_day" in point:
        for arm in raw["arms"]:
            arm["first_seed"]["at_point"] = {}

    part = section(without_plotly(render_html(Results.model_validate_json(json.dumps(raw)))), "operating")

    assert words in text(part)
    assert ("<table" in part.split("Recall at low")[0]) == ("alerts_per_day" not in point)
    assert ("Without any model" in part) == ("cost_fn" in point)


def test_recall_that_is_not_defined_says_so(page):
    """276 records have too few negatives for 0.1 %; the page gives words and the reason, no number."""
    part = text(section(page, "operating"))

    assert "0.1 % FPR mean of the sites not defined not defined not defined not defined" in part
    assert "Not defined on fewer negatives than one false alarm takes (1,000 for 0.1 %" in part


def test_false_positive_axis_is_logarithmic(hospitals):
    """From one false alarm up; the recall at its left end is that of the last threshold within it."""
    figure = html._figures(hospitals)["roc"]
    axis, federated = figure["layout"]["xaxis"], figure["data"][2]

    assert axis["type"] == "log"
    assert 10 ** axis["range"][0] == pytest.approx(1 / 120)
    assert federated["x"][0] == 1 / 120
    assert min(federated["x"]) > 0


def test_calibration_before_and_after_share_their_axes(hospitals):
    """Two charts side by side are compared by eye."""
    before, after = (
        html._figures(hospitals)[f"calibration-{when}"]["layout"] for when in ("before", "after")
    )

    assert before["xaxis"]["range"] == after["xaxis"]["range"] == before["yaxis"]["range"]
    assert before["xaxis"].get("type") != "log"


def test_calibration_of_rare_events_is_logarithmic(hospitals):
    """Bins without a positive have no place there, and the caption says so."""
    raw = json.loads(hospitals.model_dump_json())
    for arm in raw["arms"]:
        arm["first_seed"]["positives"] = 13
    rare = Results.model_validate_json(json.dumps(raw))

    figure = html._figures(rare)["calibration-before"]

    assert figure["layout"]["xaxis"]["type"] == "log"
    assert all(y > 0 for trace in figure["data"] for y in trace["y"])
    assert "a bin without a positive has no mark" in render_html(rare)


def test_file_without_scores_still_renders(old):
    """An older results.json has no curve, no operating point and no calibration: their parts are left out."""
    page = without_plotly(render_html(old))

    assert 'id="operating"' not in page
    assert 'id="calibration"' not in page
    assert "data SHA-256 not known" in text(section(page, "reproduce"))


def test_held_out_records_of_one_class_have_no_curve(hospitals):
    """There is nothing to rank; calibration is still told."""
    raw = json.loads(hospitals.model_dump_json())
    for arm in raw["arms"]:
        arm["first_seed"] |= {"curve": None, "positives": 0}
    figures = html._figures(Results.model_validate_json(json.dumps(raw)))

    assert "roc" not in figures
    assert "calibration-before" in figures


def test_run_cut_off_before_the_first_look_points_at_its_ledgers(hospitals):
    """Rounds were charged although none of them noted its epsilon."""
    rounds = tuple(r.model_copy(update={"epsilon": None}) for r in hospitals.rounds[:5])

    page = render_html(hospitals.model_copy(update={"status": "interrupted", "rounds": rounds}))

    assert "what was spent is in the ledgers above" in page
    assert "No round was charged" not in page


def test_exact_figures_of_the_sites_are_red(hospitals):
    """One sum of all sites' scores, without noise; what is not shown says why."""
    figures = Pooled(
        release="exact",
        sites=4,
        epsilon=None,
        metric=Bounded(value=0.8123, low=0.81, high=0.815),
        recall={"0.01": Bounded(withheld="not defined on so few records")},
    )

    page = section(without_plotly(render_html(hospitals.model_copy(update={"pooled": figures}))), "privacy")

    said = "From one sum of the score histograms of 4 sites (exact figures: no noise):"
    assert f'<p class="released">{said}</p>' in page
    assert "AUC 0.812, between 0.810 and 0.815" in text(page)
    assert "recall at 1 % FPR not shown: not defined on so few records" in text(page)


def test_noisy_figures_of_the_sites_tell_their_epsilon(hospitals):
    """With its unit and delta, and not in red."""
    figures = Pooled(
        release="dp", sites=3, epsilon=0.8, metric=Bounded(value=0.8, low=0.7, high=0.9), recall={}
    )

    page = section(without_plotly(render_html(hospitals.model_copy(update={"pooled": figures}))), "privacy")

    assert "(with noise: epsilon 0.8 of the study, at delta 1e-5 per record):" in text(page)
    assert "AUC 0.800, between 0.700 and 0.900" in text(page)


def test_no_figures_of_the_sites_no_words(page):
    """Where no histogram was summed."""
    assert "histograms" not in section(page, "privacy")
