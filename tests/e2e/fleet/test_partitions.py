"""The network on a bad day: cut in mid-byte, silent, slow. What is asked is answered, once, afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fleet_harness import (
    LARGE,
    PARTY,
    RUN,
    SITES,
    Consortium,
    Front,
    Proxy,
    agents,
    apps_of,
    charged,
    content_of,
    make_study,
    once,
    outcome_of,
    request,
    sites_at,
    undisturbed,
    until,
)

from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.server.hub import Session
from lepton_fl.messages import TRAIN
from lepton_fl.site import Simulated, Site
from lepton_fl.study import Study

LARGE_STUDY = make_study(model=LARGE)
MIB = 1 << 20


@contextlib.asynccontextmanager
async def one_site(
    consortium: Consortium, folder: Path, **more: Any
) -> AsyncIterator[tuple[Front, Proxy, Site[Simulated]]]:
    """`bank`, connected through a proxy."""
    with sites_at(folder / "sites", ("bank",)) as sites:
        async with (
            Front(consortium, folder / "server", **more) as front,
            Proxy(front.port) as proxy,
            agents(consortium, proxy.port, apps_of(sites), folder / "sites"),
        ):
            await until(front.connected("bank"))
            yield front, proxy, sites["bank"]


@pytest.mark.parametrize(
    ("way", "at"),
    [
        pytest.param("down", MIB // 2, marks=pytest.mark.slow),
        ("down", 3 * MIB),
        pytest.param("up", MIB // 2, marks=pytest.mark.slow),
        ("up", 3 * MIB),
    ],
)
def test_a_transfer_that_is_cut_is_gone_on_with(
    consortium: Consortium, tmp_path: Path, way: str, at: int
) -> None:
    """In the middle of a chunk, down or up: the answer arrives whole, and the round is charged once."""

    async def main() -> None:
        async with one_site(consortium, tmp_path) as (front, proxy, bank):
            proxy.cut_at[way] = proxy.carried[way] + at
            content_of(await front.ask("bank", request(LARGE_STUDY, TRAIN, number=1)))

            assert proxy.connections == 2
            assert charged(bank, RUN) == [1]

    once(main)


def test_a_download_goes_on_where_it_was(consortium: Consortium, tmp_path: Path) -> None:
    """Over a new connection the agent asks for what it has not got, and for nothing twice."""

    async def main() -> None:
        async with one_site(consortium, tmp_path) as (front, proxy, _):
            offsets: list[int] = []
            accept = front.hub.accept

            def heard(session: Session, said: pb.Accept) -> None:
                offsets.append(said.offset)
                accept(session, said)

            front.hub.accept = heard  # type: ignore[method-assign]
            proxy.pace = 0.001
            ended = front.ask("bank", request(LARGE_STUDY, TRAIN, number=1))
            spool = tmp_path / "sites" / "bank" / "state" / "spool"
            await until(lambda: sum(path.stat().st_size for path in spool.iterdir()) >= MIB)
            proxy.cut()
            proxy.pace = 0.0
            content_of(await ended)

            assert len(offsets) == 2
            assert offsets[0] == 0
            assert offsets[1] >= MIB

    once(main)


def test_a_silent_network_is_noticed_and_healed(consortium: Consortium, study: Study, tmp_path: Path) -> None:
    """Both ends give up a connection that carries nothing; the exchange waits, and is answered after."""

    async def main() -> None:
        async with one_site(consortium, tmp_path, heartbeat=0.3) as (front, proxy, bank):
            proxy.hold()
            ended = front.ask("bank", request(study, TRAIN, number=1))
            await until(front.connected())
            proxy.release()
            content_of(await ended)

            assert proxy.connections >= 2
            assert charged(bank, RUN) == [1]

    once(main)


def test_who_is_away_for_longer_than_the_grace_period_is_not_waited_for(
    consortium: Consortium, study: Study, tmp_path: Path
) -> None:
    """Its exchange ends as lost, long before the deadline, and it may be asked again when it is back."""

    async def main() -> None:
        async with one_site(consortium, tmp_path, heartbeat=0.3, grace=0.5) as (front, proxy, _):
            proxy.refuses = True
            proxy.cut()
            await until(front.connected())
            answer = await front.ask("bank", request(study, TRAIN, number=1), deadline=3600.0)
            proxy.refuses = False
            await until(front.connected("bank"))
            later = await front.ask("bank", request(study, TRAIN, number=2), number=2)
            content_of(later)

            assert answer.lost

    once(main)


def test_a_short_heartbeat_keeps_a_healthy_agent(consortium: Consortium, tmp_path: Path) -> None:
    """An agent says something as often as the server asks, from the first moment on."""

    async def main() -> None:
        async with one_site(consortium, tmp_path, heartbeat=0.5) as (front, proxy, _):
            session = front.hub.sessions[PARTY["bank"]]
            heard = session.heard
            await until(lambda: session.heard - heard > 2.0 or session.over)

            assert not session.over
            assert proxy.connections == 1

    once(main)


@pytest.mark.slow
def test_a_run_comes_through_cuts_in_every_round(consortium: Consortium, tmp_path: Path) -> None:
    """Every connection reset in the middle of the transfers: the same model, each round charged once."""
    study = make_study(model=LARGE)

    async def main() -> None:
        with sites_at(tmp_path / "sites") as sites:
            async with Front(consortium, tmp_path / "server") as front, Proxy(front.port) as proxy:

                async def bad_weather() -> None:
                    # One for each round; who is cut off again and again waits longer each time.
                    for _ in range(4):
                        start = proxy.carried["up"] + proxy.carried["down"]
                        await until(
                            lambda start=start: proxy.carried["up"] + proxy.carried["down"] > start + 9 * MIB
                        )
                        proxy.cut()

                async with agents(consortium, proxy.port, apps_of(sites), tmp_path / "sites"):
                    await until(front.connected(*SITES))
                    weather = asyncio.create_task(bad_weather())
                    finished = await front.run(study)
                    weather.cancel()
                    await asyncio.gather(weather, return_exceptions=True)
            spent = {name: charged(site, RUN) for name, site in sites.items()}

        assert proxy.connections > 3 * len(SITES)
        assert outcome_of(finished)["model"] == undisturbed(study, tmp_path / "reference")
        assert spent == {name: [1, 2, 3, 4] for name in SITES}

    once(main)


def test_a_slow_line_slows_its_own_site_only(consortium: Consortium, tmp_path: Path) -> None:
    """While one site still loads its request, the others' large exchanges begin and end."""

    async def main() -> None:
        with sites_at(tmp_path / "sites", ("bank", "clinic")) as sites:
            apps = apps_of(sites)
            async with (
                Front(consortium, tmp_path / "server") as front,
                Proxy(front.port) as proxy,
                agents(consortium, proxy.port, {"bank": apps["bank"]}, tmp_path / "sites"),
                agents(consortium, front.port, {"clinic": apps["clinic"]}, tmp_path / "sites"),
            ):
                await until(front.connected("bank", "clinic"))
                before = proxy.carried["down"]
                proxy.pace = 0.05
                slow = front.ask("bank", request(LARGE_STUDY, TRAIN, number=1))
                await until(lambda: proxy.carried["down"] > before + 16384)
                content_of(await front.ask("clinic", request(LARGE_STUDY, TRAIN, number=1)))
                overtaken = not slow.done()
                proxy.pace = 0.0
                content_of(await slow)

        assert overtaken

    once(main)
