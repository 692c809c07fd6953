"""Ledgers under witness: put back, cloned, replaced or lost, they are found before anything is charged."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fleet_harness import (
    PARTY,
    RUN,
    SITES,
    Consortium,
    Front,
    Puppet,
    agents,
    apps_of,
    channel,
    charged,
    close_site,
    content_of,
    fleet_of,
    make_site,
    once,
    outcome_of,
    request,
    sites_at,
    until,
)

from lepton_fl.cli.client import client_receipts
from lepton_fl.errors import ConfigError, VerificationFailed
from lepton_fl.fleet.agent.agent import Agent
from lepton_fl.fleet.agent.ledger import StatedLedger
from lepton_fl.fleet.agent.member import EnrolledSite
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.server.hub import Reply, Session
from lepton_fl.fleet.server.ledgers import SERVER
from lepton_fl.messages import JOIN, TRAIN
from lepton_fl.privacy import Ledger
from lepton_fl.privacy.ledger import Head, Receipt, Statement, recover
from lepton_fl.privacy.ledger.receipts import from_file
from lepton_fl.site import Site, client_app
from lepton_fl.study import Study

LEDGER_REFUSED = 1000 + VerificationFailed.exit_code


class Fleet:
    """Sites with their folders, and a server with its own; any of it can be put back, or lost."""

    def __init__(self, consortium: Consortium, study: Study, folder: Path) -> None:
        self.consortium, self.study, self.folder = consortium, study, folder

    def home(self, name: str) -> Path:
        return self.folder / "sites" / name

    def member(self, name: str) -> EnrolledSite:
        return self.consortium.member(name, self.home(name) / "pki")

    def front(self, name: str = "server") -> Front:
        return Front(self.consortium, self.folder / name)

    @contextlib.asynccontextmanager
    async def up(self, *names: str, server: str = "server") -> AsyncIterator[Front]:
        """The server and these sites, connected; of each, what it has seen is countersigned at the end."""
        async with fleet_of(self.consortium, self.folder, names, server=server) as (front, sites):
            yield front
            front.ledgers.relay(set(front.hub.sessions))
            for site in sites.values():
                await until(lambda site=site: witnesses(site) >= {SERVER, *names} - {site.name})

    async def trained(self, *rounds: int) -> None:
        """The bank has trained these rounds, the server and a clinic have seen it, and all are down again."""
        async with self.up("bank", "clinic") as front:
            await self.train(front, "bank", *rounds)

    async def train(self, front: Front, name: str, *rounds: int) -> None:
        """Have a site train these rounds of a run."""
        for number in rounds:
            content_of(await self.ask(front, name, number))

    def ask(self, front: Front, name: str, number: int) -> asyncio.Future[Reply]:
        return front.ask(name, request(self.study, TRAIN, number=number), number=number)

    @contextlib.contextmanager
    def open(self, name: str, home: Path | None = None) -> Any:
        """A site, with what remains of its folder."""
        site = make_site(name, home or self.home(name), self.member(name))
        try:
            yield site
        finally:
            close_site(site)

    def agent(self, front: Front, site: Site[Any], home: Path | None = None) -> Agent:
        credentials = self.consortium.site(site.name)
        return Agent(
            client_app(site),
            lambda: channel(self.consortium, credentials, front.port),
            (home or self.home(site.name)) / "state",
            insecure_seed=True,
            member=self.member(site.name),
        )


def witnesses(site: Site[Any]) -> set[str]:
    """Who has given receipts for where the ledger ends now."""
    ledger = site.surroundings.ledger
    return {one.witness for one in ledger.kept if one.statement.head == ledger.head()}


@pytest.fixture
def fleet(consortium: Consortium, study: Study, tmp_path: Path) -> Fleet:
    return Fleet(consortium, study, tmp_path)


def backup(folder: Path) -> Path:
    return shutil.copytree(folder, folder.with_name(f"{folder.name}.backup"))


def put_back(copy: Path) -> None:
    folder = copy.with_name(copy.name.removesuffix(".backup"))
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)


@pytest.mark.parametrize("judges", [True, False])
def test_a_state_folder_put_back_is_found_before_anything_is_charged(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, judges: bool
) -> None:
    """By the server, or by the agent itself, whatever it is asked next. It recovers, and goes on."""

    async def main() -> None:
        await fleet.trained(1)
        old = backup(fleet.home("bank"))
        await fleet.trained(2, 3)
        put_back(old)
        async with fleet.front() as front:
            asked: list[asyncio.Future[Reply]] = []
            if not judges:
                monkeypatch.setattr(front.ledgers, "take", lambda *_: None)
                enter = front.hub.enter

                def entered(session: Session) -> None:
                    enter(session)
                    asked.append(fleet.ask(front, "bank", 4))

                monkeypatch.setattr(front.hub, "enter", entered)
            with fleet.open("bank") as site:
                with pytest.raises(VerificationFailed, match="ledger") as caught:
                    await fleet.agent(front, site).run()
                assert charged(site, RUN) == [1]
            assert "lepton-fl budget recover" in caught.value.fix
            assert len(asked) == (not judges)
            for exchange in front.hub.open_for(PARTY["bank"]):
                front.hub.cancel(exchange)

            receipts = front.witness.receipts("bank")
            ledger = fleet.home("bank") / "ledger.db"
            assert recover(ledger, receipts, site="bank").charged == 2
        await fleet.trained(4)
        with closing(Ledger(ledger)) as again:
            rounds = [(row["round"], row["outcome"]) for row in again.history("bank-records")]
            assert rounds == [(1, "released"), (2, "recovered"), (3, "recovered"), (4, "released")]

    once(main)


def test_a_clone_is_found_at_its_first_word_and_takes_nobodys_place(fleet: Fleet) -> None:
    """Two agents on copies of one ledger: the other one works on, and is not sent away for it."""

    async def main() -> None:
        await fleet.trained(1)
        clone = backup(fleet.home("bank"))
        async with fleet.up("bank", "clinic") as front:
            await fleet.train(front, "bank", 2)
            with fleet.open("bank", clone) as second:
                with pytest.raises(VerificationFailed):
                    await fleet.agent(front, second, clone).run()
                assert charged(second, RUN) == [1]
            await fleet.train(front, "bank", 3)

            assert front.heard.refusals == ["ledger"]

    once(main)


def test_a_ledger_in_anothers_place_is_found(fleet: Fleet) -> None:
    """All of the folder is new, with a key of its own and nothing spent."""

    async def main() -> None:
        await fleet.trained(1)
        shutil.rmtree(fleet.home("bank"))
        async with fleet.front() as front:
            with fleet.open("bank") as site:
                with pytest.raises(VerificationFailed, match="another ledger"):
                    await fleet.agent(front, site).run()
                assert charged(site, RUN) == []
            with pytest.raises(VerificationFailed, match="another ledger of this site"):
                Ledger(fleet.home("bank") / "ledger.db")

    once(main)


@pytest.mark.parametrize("lost", ["put back", "replaced"])
def test_a_server_that_hides_what_it_has_seen_is_caught_out_by_the_peers(fleet: Fleet, lost: str) -> None:
    """Or has lost it. The peer's receipts reach the site, and tell the server as well."""

    async def main() -> None:
        await fleet.trained(1)
        old = backup(fleet.home("bank"))
        await fleet.trained(2)
        if lost == "put back":
            put_back(old)
        else:
            shutil.rmtree(fleet.home("bank"))
        async with fleet.up("clinic", server="another") as front:
            with fleet.open("bank") as site:
                with pytest.raises(VerificationFailed, match="clinic has seen"):
                    await fleet.agent(front, site).run()
                assert 2 not in charged(site, RUN)

            assert 2 in [one.statement.round for one in front.witness.receipts("bank")]

    once(main)


def test_a_ledger_that_goes_back_in_mid_run_is_out_and_the_run_goes_on(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that is not honest: its update is not taken, and its people are told why."""
    state = StatedLedger.state

    def dishonest(self: StatedLedger, data_set: str, *, run: str = "", round: int = 0) -> Statement:
        if self._site == "bank" and round == 3:
            before = state(self, data_set, run=run, round=2)
            key, head = self._ledger._key, before.entry
            return Statement.issue(key, site="bank", data_set=data_set, head=head, run=run)
        return state(self, data_set, run=run, round=round)

    monkeypatch.setattr(StatedLedger, "state", dishonest)
    monkeypatch.setattr(StatedLedger, "leaving", lambda _, told: told.signed)
    events: list[dict[str, Any]] = []

    async def main() -> None:
        with sites_at(fleet.folder / "sites") as sites:
            async with fleet.front() as front:
                bank = Agent(
                    client_app(sites["bank"]),
                    lambda: channel(fleet.consortium, fleet.consortium.site("bank"), front.port),
                    fleet.home("bank") / "state",
                    insecure_seed=True,
                )
                running = asyncio.create_task(bank.run())
                others = {name: app for name, app in apps_of(sites).items() if name != "bank"}
                async with agents(fleet.consortium, front.port, others, fleet.folder / "sites"):
                    await until(front.connected(*SITES))
                    finished = await front.run(fleet.study, progress=events.append)
                with pytest.raises(VerificationFailed, match="the server does not take this site's ledger"):
                    await running

        rounds = {event["round"]: event for event in events if event["event"] == "round"}
        assert "two agents write it" in outcome_of(finished)["refused"]["bank"]
        assert [rounds[number]["sites"] for number in (2, 4)] == [list(SITES), ["clinic", "ward"]]
        assert "bank" in rounds[3]["dropped"]

    once(main)


def test_a_site_that_states_nothing_is_not_let_in(consortium: Consortium, tmp_path: Path) -> None:
    """Nor one that states another's ledger, or a round that it was not asked for."""

    async def main() -> None:
        async with Front(consortium, tmp_path) as front:
            for statement in (b"", b"nothing", Puppet(consortium, "clinic", 1)._state()):
                async with Puppet(consortium, "bank", front.port) as bank:
                    await bank.hello(statement=statement)
                    assert (await bank.farewell()).code == pb.Goodbye.LEDGER
            async with Puppet(consortium, "bank", front.port) as bank:
                await bank.hello()
                await until(front.connected("bank"))

    once(main)


@pytest.mark.parametrize("kind", [JOIN, TRAIN])
def test_a_reply_without_a_statement_is_none(
    consortium: Consortium, study: Study, tmp_path: Path, kind: str
) -> None:
    """The run is told that the site refuses, and the site why."""
    number = 0 if kind == JOIN else 1

    async def main() -> None:
        async with Front(consortium, tmp_path) as front, Puppet(consortium, "bank", front.port) as bank:
            await bank.hello()
            await until(front.connected("bank"))
            asked = front.ask("bank", request(study, kind, number=number), kind=kind, number=number)
            assign = (await bank.hear("assign")).assign
            await bank.say(
                result=pb.Result(
                    exchange=assign.exchange, size=1, sha256=bytes(32), inline=b"x", statement=b"nothing"
                )
            )
            answer = await asked

            assert answer.error_code == LEDGER_REFUSED
            assert (await bank.farewell()).code == pb.Goodbye.LEDGER

    once(main)


def test_a_server_that_was_killed_remembers_what_it_was_told(fleet: Fleet) -> None:
    """Its files are as they are while it runs: nothing was closed or written to its end."""

    async def main() -> None:
        await fleet.trained(1)
        old = backup(fleet.home("bank"))
        async with fleet.up("bank", "clinic") as front:
            await fleet.train(front, "bank", 2)
            shutil.copytree(front.folder, fleet.folder / "killed")
        put_back(old)
        async with fleet.front("killed") as front, Puppet(fleet.consortium, "bank", front.port) as bank:
            with fleet.open("bank") as site:
                ledger = site.surroundings.ledger
                await bank.hello(statement=ledger.state(site="bank", data_set=site.budget.data_set).signed)
            assert (await bank.farewell()).code == pb.Goodbye.LEDGER

    once(main)


def test_an_agent_that_died_after_a_charge_is_welcome(fleet: Fleet) -> None:
    """Its ledger went on, and nobody has seen it: what was charged stays charged."""

    async def main() -> None:
        await fleet.trained(1)
        with fleet.open("bank") as site:
            last = site.ledger.data_set(site.budget.data_set)
            charge = site.ledger._entry(last.round(RUN, 1).seq).content
            site.ledger.charge(replace(charge, round=2), rounds=8, budget=site.budget)
        await fleet.trained(3)
        with fleet.open("bank") as site:
            assert charged(site, RUN) == [1, 2, 3]

    once(main)


def test_a_peer_hands_over_what_it_has_seen(fleet: Fleet) -> None:
    """By a command of its own, beside its agent: each round, and where the ledger ends."""
    config = fleet.home("clinic") / "site.toml"
    file = fleet.folder / "bank.receipts"

    async def main() -> None:
        await fleet.trained(1, 2)
        config.write_text('[site]\nid = "clinic"\n[data]\nsource = "records.csv"\n')
        client_receipts("bank", file, config)
        found = from_file(file)

        assert {one.witness for one in found} == {"clinic"}
        assert [one.statement.round for one in found] == [1, 2, 2]
        with pytest.raises(ConfigError, match="nothing was seen of a ledger of 'ward'"):
            client_receipts("ward", file.with_suffix(".none"), config)

    once(main)


def test_forged_and_foreign_receipts_stop_nobody(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """A bit changed, another site's, by a key that is no witness's, a ledger that the site never signed."""

    async def main() -> None:
        async with fleet.up("bank", "clinic", "ward") as front:
            await fleet.train(front, "bank", 1)
            server = front.witness
            genuine = [one.signed for one in server.highest("bank")]
            key, foreign = server.key, [one.signed for one in server.highest("clinic")]
        flipped = bytearray(genuine[0])
        flipped[-1] ^= 1
        clinic = fleet.member("clinic").identity.identity_key
        stranger = Puppet(fleet.consortium, "bank", 1)._ledger
        with fleet.open("bank") as site, fleet.open("clinic") as other:
            high = Head(99, bytes(32))
            invented = Statement.issue(stranger, site="bank", data_set="bank-records", head=high)
            believed = Statement.issue(
                stranger, site="bank", data_set="bank-records", head=high, identity=clinic
            )
            own = site.surroundings.ledger.state(site="bank", data_set="bank-records")
            forged = [
                bytes(flipped),
                b"nothing",
                *foreign,
                Receipt.issue(stranger, witness=SERVER, statement=own).signed,
                Receipt.issue(stranger, witness="clinic", statement=own).signed,
                Receipt.issue(clinic, witness="ward", statement=own).signed,
                Receipt.issue(clinic, witness="clinic", statement=invented).signed,
                Receipt.issue(clinic, witness="clinic", statement=believed).signed,
            ]
            before = list(site.surroundings.ledger.kept)
            server_key = server._key
            forged += [
                # The server itself, of a ledger that it invented, or under names without end.
                Receipt.issue(server_key, witness=SERVER, statement=invented).signed,
                Receipt.issue(server_key, witness="any name", statement=own).signed,
            ]
            with closing(StatedLedger(site, fleet.member("bank"), fleet.home("bank") / "state")) as stated:
                stated.take(forged, key)
                assert list(site.surroundings.ledger.kept) == before
                assert len([r for r in caplog.records if r.message == "receipt not taken"]) == len(forged)
                stated.take(genuine * 2, key)

                # And as a witness: of itself, of a stranger, of a site by another's key.
                assert stated.witness([own.signed]) == []
                assert stated.witness([invented.signed]) == []
                assert stated.witness([b"nothing"]) == []
                theirs = other.surroundings.ledger.state(
                    site="clinic", data_set="clinic-records", identity=clinic
                )
                (given,) = stated.witness([theirs.signed])
                assert Receipt.read(given).witness == "bank"

    once(main)


def test_peers_that_are_many_have_few_witnesses_each(fleet: Fleet) -> None:
    """Four each, so that a time costs what the number of sites does."""
    names = ("bank", "clinic", "ward", "e", "f", "g", "h")

    async def main() -> None:
        async with fleet.front() as front, contextlib.AsyncExitStack() as stack:
            puppets = {}
            for name in names:
                puppets[name] = await stack.enter_async_context(Puppet(fleet.consortium, name, front.port))
                await puppets[name].hello()
            await until(front.connected(*names))
            told: dict[int, list[int]] = {}
            for party, session in front.hub.sessions.items():
                session.outbox.put = told.setdefault(party, []).append  # type: ignore[method-assign]
            front.ledgers.relay(set(front.hub.sessions))
            heard = {
                party: {Statement.read(message.statements.signed[-1]).site for message in messages}
                for party, messages in told.items()
            }

            assert all(len(sites) == 4 for sites in heard.values())
            assert not any(front.hub.sessions[party].site in sites for party, sites in heard.items())

    once(main)


def test_a_site_that_connects_without_end_keeps_no_peer_at_work(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it states is verified by others, and costs them more than it."""
    monkeypatch.setattr("lepton_fl.fleet.server.ledgers._AGAIN_S", 1e9)

    async def main() -> None:
        async with fleet.front() as front, Puppet(fleet.consortium, "clinic", front.port) as clinic:
            await clinic.hello()
            await until(front.connected("clinic"))
            told: list[pb.ToAgent] = []
            front.hub.sessions[PARTY["clinic"]].outbox.put = told.append  # type: ignore[method-assign]
            for _ in range(8):
                async with Puppet(fleet.consortium, "bank", front.port) as bank:
                    await bank.hello()
                    await until(front.connected("bank", "clinic"))
            asked = [message for message in told if message.WhichOneof("kind") == "statements"]
            assert len(asked) == 1

    once(main)


def test_receipts_that_nobody_asked_for_end_the_connection(fleet: Fleet) -> None:
    """To verify them costs more than to send them. Nor may a site give another's."""

    async def main() -> None:
        async with fleet.front() as front, Puppet(fleet.consortium, "clinic", front.port) as clinic:
            await clinic.hello()
            await clinic.say(receipts=pb.Receipts())
            assert "nobody asked" in (await clinic.farewell()).reason
        async with (
            fleet.up("bank", server="another") as front,
            Puppet(fleet.consortium, "clinic", front.port) as clinic,
        ):
            await clinic.hello()
            (told,) = (await clinic.hear("statements")).statements.signed
            bank = fleet.member("bank").identity.identity_key
            anothers = Receipt.issue(bank, witness="bank", statement=Statement.read(told))
            await clinic.say(receipts=pb.Receipts(signed=[anothers.signed]))
            assert "is another's" in (await clinic.farewell()).reason

    once(main)
