"""The report as Markdown, short enough for an issue tracker."""

from __future__ import annotations

import re

from lepton_fl.report import wording
from lepton_fl.report.figures import ARMS
from lepton_fl.report.findings import (
    Comparison,
    arm,
    at_point,
    by_advice,
    comparisons,
    first_seeds,
    fprs,
    gain,
    most_spent,
    recall_at,
    without_threshold,
)
from lepton_fl.results import Results

_SPECIAL = re.compile(r"([\\`*_\[\]#|~$])")


def render_markdown(results: Results) -> str:
    """Verdict, table by site, operating point, calibration, the privacy line and how to reproduce.

    Names from the study and the sites are escaped: they can open no tag and no table cell.
    """
    labels = list(results.labels)
    if results.status != "completed":
        labels.insert(0, wording.STATUS[results.status])
    lines = [f"# {_plain(results.study_name)}", ""]
    if labels:
        lines += ["> " + " · ".join(f"**{_plain(label)}**" for label in labels), ""]
    lines += [_plain(results.verdict), ""]
    lines += _sites(results)
    lines += _operating(results)
    lines += _calibration(results)
    lines += ["## Privacy", "", *_privacy(results), ""]
    lines += ["## Reproduce", "", f"    {_one_line(results.command)}", ""]
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    lines += [
        f"- study id `{_code(results.study_id)}`, run `{_code(results.run_id)}`",
        f"- model SHA-256 `{_code(results.model.sha256)}`" if results.model else "- no model",
        f"- data SHA-256 `{_code(results.data_sha256)}`" if results.data_sha256 else "- data not known",
        f"- seeds {', '.join(map(str, results.seeds))}; {_plain(versions)}",
        f"- {_plain(results.hardware)}",
        f"- started {_plain(results.started)}, took {wording.duration(results.seconds)}",
    ]
    return "\n".join(lines) + "\n"


def _sites(results: Results) -> list[str]:
    named = {name: arm(results, name) for name in ARMS}
    heads = [_plain(a.label) if a else name for name, a in named.items()]
    lines = [
        f"## {wording.METRIC[results.metric]} by site",
        "",
        f"| site | test records (positive) | {' | '.join(heads)} | federated minus own best | advice |",
        f"|---|---:|{'---|' * len(named)}---|---|",
    ]
    for row in comparisons(results):
        cells = [
            _plain(row.site.site),
            f"{row.site.test_records:,} ({row.site.test_positives:,})",
            *(wording.interval(found) for found in row.intervals),
            wording.change(row.gain) if row.gain else "",
            _advice(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    means = (wording.interval(a.mean) if a else wording.NOT_MEASURED for a in named.values())
    found = gain(results)
    overall = wording.change(found) if found else ""
    lines.append(f"| **mean of the sites** | | {' | '.join(means)} | {overall} | |")
    told = "; ".join(
        f"{wording.ADVICE[advice]}: {', '.join(_plain(row.site.site) for row in rows)}"
        for advice, rows in by_advice(results).items()
    )
    if told:
        explained = f" {wording.OWN_BEST}" if named["local"] and named["linear"] else ""
        lines += ["", f"{told[0].upper()}{told[1:]}.{explained}"]
    return [*lines, "", wording.evidence(results), ""]


def _operating(results: Results) -> list[str]:
    rates = fprs(results)
    if not rates:
        return []
    arms = [a for a in results.arms if a.recall]
    lines = ["## Operating point", "", wording.operating_point(results), ""]
    found = at_point(results)
    if found:
        lines += [
            "| per 10,000 records | found | missed | false alarms | recall | precision | FPR achieved |",
            "|---|---:|---:|---:|---|---|---|",
        ]
        for point in found:
            c = point.total
            cells = [
                wording.ARM[point.arm.arm],
                *(
                    wording.per_10000(n, c.records)
                    for n in (c.true_positives, c.false_negatives, c.false_positives)
                ),
                wording.share(c.recall),
                wording.share(c.precision),
                wording.rate(c.fpr),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        left_out = without_threshold(results)
        named = f" Left out: {', '.join(map(_plain, left_out))}." if left_out else ""
        records = wording.count(found[0].total.records, "held-out record")
        lines += [
            "",
            f"{wording.thresholds(results)} n = {records}, one seed, 95 % Wilson intervals.{named}",
            "",
        ]
    heads = " | ".join(wording.ARM[a.arm] for a in arms)
    lines += [f"| recall, mean of the sites | {heads} |", f"|---|{'---|' * len(arms)}"]
    for fpr in rates:
        recalls = [recall_at(a, fpr) for a in arms]
        cells = [wording.recall(r.mean if r else None) for r in recalls]
        lines.append(f"| at {wording.percent(fpr)} FPR | {' | '.join(cells)} |")
    return [*lines, "", wording.recall_undefined(rates), ""]


def _calibration(results: Results) -> list[str]:
    seen = first_seeds(results)
    if not seen:
        return []
    lines = [
        "## Calibration",
        "",
        "| before -> after scaling at each site | expected error | log-loss | Brier score |",
        "|---|---|---|---|",
    ]
    for found, first in seen.values():
        pairs = [c for c in (first.calibration, first.recalibrated) if c]
        cells = [
            " -> ".join(f"{value:.4f}" for value in values)
            for values in (
                [c.expected_error for c in pairs],
                [c.log_loss for c in pairs],
                [c.brier for c in pairs],
            )
        ]
        lines.append(f"| {wording.ARM[found.arm]} | {' | '.join(cells)} |")
    return [*lines, "", wording.one_seed(next(iter(seen.values()))[1]), ""]


def _advice(row: Comparison) -> str:
    if row.advice is None:
        return ""
    words = wording.ADVICE[row.advice]
    return f"**{words}**" if row.advice == "keep" else words


def _privacy(results: Results) -> list[str]:
    promise = results.promise
    said = [wording.guarantee(promise), wording.by_who_looks(promise), promise.unit_said, promise.leaves]
    if results.secure_aggregation is not None:
        said += [results.secure_aggregation.hides, wording.secure_run(results.secure_aggregation) + "."]
    lines = [_plain(" ".join(filter(None, said)))]
    most = most_spent(results)
    if most is not None:
        lines.append(
            f"Most spent: epsilon {wording.spent_of(most.epsilon, most.site.epsilon_allowed)} "
            f"at {_plain(most.site.site)}, all studies on "
            f"{_plain(most.site.data_set)}, at delta {wording.delta(most.site.delta_total)} "
            f"{_plain(wording.unit(results.promise))}."
        )
    for site in results.sites:
        if site.released_exact:
            released = _plain(", ".join(site.released_exact))
            lines += ["", f"**{_plain(site.site)} released without noise: {released}**"]
    if pooled := [_plain(line) for line in wording.pooled(results)]:
        lines += ["", pooled[0], "", *(f"* {line}" for line in pooled[1:])]
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _code(text: str) -> str:
    return _one_line(text).replace("`", "'")


def _plain(text: str) -> str:
    """`text` on one line, with every character that Markdown or HTML would act on made harmless."""
    escaped = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", escaped)
