"""Whole runs: what a fleet makes is what one process makes, and a bad site costs the run that site only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleet_harness import (
    PARTY,
    PATIENCE,
    RUN,
    SITES,
    Consortium,
    Front,
    agents,
    apps_of,
    charged,
    content_of,
    first_model,
    make_study,
    once,
    outcome_of,
    request,
    sites_at,
    undisturbed,
    until,
)
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from lepton_fl.messages import ARRAYS, CONFIG, METRICS, TRAIN, WEIGHT, from_record, to_record
from lepton_fl.site import SiteApp
from lepton_fl.study import Study


class Spoilt:
    """A site's app whose updates are changed before they leave."""

    def __init__(self, app: SiteApp[Any], change: Callable[[RecordDict], RecordDict]) -> None:
        self.app, self.site, self._change = app, app.site, change

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.app(message, context)
        if message.metadata.message_type != TRAIN:
            return reply
        return Message(self._change(reply.content), reply_to=message)


class Held:
    """A site's app that does not end a round before a test lets it."""

    def __init__(self, app: SiteApp[Any], number: int) -> None:
        self.app, self.site, self._number = app, app.site, number
        self.begun, self.free = threading.Event(), threading.Event()

    def __call__(self, message: Message, context: Context) -> Message:
        if message.content.config_records[CONFIG]["server-round"] == self._number:
            self.begun.set()
            self.free.wait(PATIENCE)
        return self.app(message, context)


def _with_arrays(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Any:
    def changed(content: RecordDict) -> RecordDict:
        arrays = change(from_record(content.array_records[ARRAYS]))
        return RecordDict({ARRAYS: to_record(arrays), METRICS: MetricRecord({WEIGHT: 1.0})})

    return changed


def _with_weight(content: RecordDict) -> RecordDict:
    return RecordDict({ARRAYS: content.array_records[ARRAYS], METRICS: MetricRecord({WEIGHT: 1e12})})


def _claiming(content: RecordDict) -> RecordDict:
    members = ConfigRecord({"members": [PARTY["bank"], PARTY["clinic"]]})
    return RecordDict({**content, CONFIG: members})


def test_a_fleet_makes_the_model_that_one_process_makes(
    consortium: Consortium, study: Study, tmp_path: Path
) -> None:
    """Same sites, same noise, same order of summation: the same bytes; each round is charged once."""

    async def main() -> None:
        with sites_at(tmp_path / "sites") as sites:
            async with (
                Front(consortium, tmp_path / "server") as front,
                agents(consortium, front.port, apps_of(sites), tmp_path / "sites"),
            ):
                await until(front.connected(*SITES))
                finished = await front.run(study)
            spent = {name: charged(site, RUN) for name, site in sites.items()}

        assert outcome_of(finished)["model"] == undisturbed(study, tmp_path / "reference")
        assert spent == {name: [1, 2, 3, 4] for name in SITES}

    once(main)


@pytest.mark.slow
def test_sites_that_send_nonsense_are_dropped_and_named_and_the_run_goes_on(
    consortium: Consortium, study: Study, tmp_path: Path
) -> None:
    """NaN, another shape, another name, a huge weight, a sum over others: the model is the honest sites'."""
    spoilt: dict[str, tuple[Callable[[RecordDict], RecordDict], str]] = {
        "ward": (_with_arrays(lambda a: {n: np.full_like(v, np.nan) for n, v in a.items()}), "finite"),
        "e": (_with_arrays(lambda a: {n: np.repeat(v, 2, 0) for n, v in a.items()}), "shape"),
        "f": (_with_arrays(lambda a: {f"x.{n}": v for n, v in a.items()}), "names"),
        "g": (_with_weight, "weight"),
        "h": (_claiming, "config record"),
    }
    names = ("bank", "clinic", *spoilt)
    events: list[dict[str, Any]] = []

    async def main() -> None:
        with sites_at(tmp_path / "sites", names) as sites:
            apps: dict[str, Any] = apps_of(sites)
            for name, (change, _) in spoilt.items():
                apps[name] = Spoilt(apps[name], change)
            async with (
                Front(consortium, tmp_path / "server") as front,
                agents(consortium, front.port, apps, tmp_path / "sites"),
            ):
                await until(front.connected(*names))
                finished = await front.run(study, sites={PARTY[n]: n for n in names}, progress=events.append)
        about = outcome_of(finished)
        rounds = [event for event in events if event["event"] == "round"]

        assert about["model"] == undisturbed(study, tmp_path / "reference", ("bank", "clinic"))
        assert set(about["refused"]) == set(rounds[0]["dropped"]) == set(spoilt)
        assert all(word in rounds[0]["dropped"][name] for name, (_, word) in spoilt.items())
        assert [event["sites"] for event in rounds] == [["bank", "clinic"]] * 4

    once(main)


@pytest.mark.slow
def test_a_round_does_not_wait_beyond_its_deadline(consortium: Consortium, tmp_path: Path) -> None:
    """A site that is late is dropped for that round, by name; what it sends later counts for nothing."""
    study = make_study(train={"deadline": 4.0, "rounds": 2, "spare_rounds": 1})
    events: list[dict[str, Any]] = []

    async def main() -> None:
        with sites_at(tmp_path / "sites") as sites:
            apps: dict[str, Any] = apps_of(sites)
            late = apps["ward"] = Held(apps["ward"], 1)

            def heard(event: dict[str, Any]) -> None:
                events.append(event)
                if event["event"] == "round":
                    late.free.set()

            async with (
                Front(consortium, tmp_path / "server") as front,
                agents(consortium, front.port, apps, tmp_path / "sites"),
            ):
                await until(front.connected(*SITES))
                finished = await front.run(study, progress=heard)
            rounds = [event for event in events if event["event"] == "round"]

        assert rounds[0]["dropped"] == {"ward": "no answer before the deadline"}
        assert [event["sites"] for event in rounds] == [["bank", "clinic"], list(SITES)]
        assert outcome_of(finished)["done"] == 2

    once(main)


def test_a_slow_site_slows_no_other(consortium: Consortium, study: Study, tmp_path: Path) -> None:
    """Exchanges with the others begin and end while one site is still at its first."""

    async def main() -> None:
        with sites_at(tmp_path / "sites") as sites:
            apps: dict[str, Any] = apps_of(sites)
            slow = apps["ward"] = Held(apps["ward"], 1)
            async with (
                Front(consortium, tmp_path / "server") as front,
                agents(consortium, front.port, apps, tmp_path / "sites"),
            ):
                await until(front.connected(*SITES))
                first = front.ask("ward", request(study, TRAIN, number=1))
                await until(slow.begun.is_set)
                for number in (1, 2, 3):
                    for name in ("bank", "clinic"):
                        content_of(await front.ask(name, request(study, TRAIN, number=number), number=number))
                overtaken = not first.done()
                slow.free.set()
                content_of(await first)

        assert overtaken

    once(main)


def test_a_request_that_is_repeated_is_answered_with_the_same_bytes(
    consortium: Consortium, study: Study, tmp_path: Path
) -> None:
    """And charged once: a second training would be a second release."""

    async def main() -> None:
        with sites_at(tmp_path / "sites", ("bank",)) as sites:
            async with (
                Front(consortium, tmp_path / "server") as front,
                agents(consortium, front.port, apps_of(sites), tmp_path / "sites"),
            ):
                await until(front.connected("bank"))
                answers = [await front.ask("bank", request(study, TRAIN, number=1)) for _ in range(3)]
                for answer in answers:
                    content_of(answer)
            spent = charged(sites["bank"], RUN)

        assert len({answer.payload.sha256 for answer in answers if answer.payload is not None}) == 1
        assert spent == [1]

    once(main)


def test_a_round_number_is_answered_for_one_content_only(
    consortium: Consortium, study: Study, tmp_path: Path
) -> None:
    """A server that asks the same round of another model gets nothing: the ledger has that round."""

    async def main() -> None:
        other = {name: array + 0.5 for name, array in first_model(study).items()}
        with sites_at(tmp_path / "sites", ("bank",)) as sites:
            async with (
                Front(consortium, tmp_path / "server") as front,
                agents(consortium, front.port, apps_of(sites), tmp_path / "sites"),
            ):
                await until(front.connected("bank"))
                first = await front.ask("bank", request(study, TRAIN, number=1))
                second = await front.ask("bank", request(study, TRAIN, number=1, model=other))
            spent = charged(sites["bank"], RUN)

        assert first.payload is not None
        assert second.payload is None
        assert second.error_code != 0
        assert spent == [1]

    once(main)


def test_a_request_says_the_round_and_run_that_it_is_announced_as(
    consortium: Consortium, study: Study, tmp_path: Path
) -> None:
    """Cached by what is announced, charged by what is inside: where the two differ there is no answer."""

    async def main() -> None:
        with sites_at(tmp_path / "sites", ("bank",)) as sites:
            async with (
                Front(consortium, tmp_path / "server") as front,
                agents(consortium, front.port, apps_of(sites), tmp_path / "sites"),
            ):
                await until(front.connected("bank"))
                content = request(study, TRAIN, number=2)
                other_round = await front.ask("bank", content, number=1)
                other_run = await front.ask("bank", content, number=2, run="f" * 32)
            spent = charged(sites["bank"], RUN)

        assert other_round.payload is None
        assert other_run.payload is None
        assert spent == []

    once(main)


@pytest.mark.slow
def test_an_array_record_must_be_the_update(consortium: Consortium, study: Study, tmp_path: Path) -> None:
    """A reply of megabytes that nobody asked for drops its site, and leaves no file behind."""
    noise = to_record({"w": np.zeros(300_000, np.float32)})

    async def main() -> None:
        with sites_at(tmp_path / "sites") as sites:
            apps: dict[str, Any] = apps_of(sites)
            apps["ward"] = Spoilt(apps["ward"], lambda content: RecordDict({**content, "more": noise}))
            async with (
                Front(consortium, tmp_path / "server") as front,
                agents(consortium, front.port, apps, tmp_path / "sites"),
            ):
                await until(front.connected(*SITES))
                finished = await front.run(study)

        assert set(outcome_of(finished)["refused"]) == {"ward"}

    once(main)
