"""What an agent may say, and what becomes of it when it says something else."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from fleet_harness import PARTY, Consortium, Front, Puppet, channel, once, request, stated, until

from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.limits import MESSAGE_LIMIT
from lepton_fl.fleet.protocol.methods import FLEET
from lepton_fl.fleet.protocol.payload import CHUNK
from lepton_fl.fleet.server.hub import Reply
from lepton_fl.messages import TRAIN
from lepton_fl.secagg.identity import IdentityKey
from lepton_fl.study import Study

REPLY = os.urandom(3 * CHUNK + 17)
"""A result of four chunks; nobody on the way reads it."""
SHA256 = hashlib.sha256(REPLY).digest()
EXCHANGE = bytes(range(16))
REFUSED, REPLACED, FAULT = pb.Goodbye.REFUSED, pb.Goodbye.REPLACED, pb.Goodbye.FAULT


def announced(**changes: Any) -> pb.Result:
    return pb.Result(**{"exchange": EXCHANGE, "size": len(REPLY), "sha256": SHA256, **changes})


def inline(content: bytes = b"a small reply", **changes: Any) -> pb.Result:
    digest = hashlib.sha256(content).digest()
    return pb.Result(
        **{"exchange": EXCHANGE, "size": len(content), "sha256": digest, "inline": content, **changes}
    )


def chunk(number: int, **changes: Any) -> pb.Chunk:
    start = number * CHUNK
    return pb.Chunk(
        **{"exchange": EXCHANGE, "offset": start, "data": REPLY[start : start + CHUNK], **changes}
    )


@asynccontextmanager
async def asked(
    consortium: Consortium, study: Study, folder: Path, **more: Any
) -> AsyncIterator[tuple[Front, Puppet, asyncio.Future[Reply]]]:
    """A puppet of `bank` that has been asked for round 1, and has not answered yet."""
    async with Front(consortium, folder, **more) as front, Puppet(consortium, "bank", front.port) as bank:
        await bank.hello()
        ended = front.ask("bank", request(study, TRAIN, number=1), exchange=EXCHANGE)
        await bank.hear("assign")
        yield front, bank, ended
        if not ended.done():
            front.hub.cancel(EXCHANGE)


def taken(answer: Reply) -> bytes:
    """The bytes of an answer, of which no file stays."""
    assert answer.payload is not None
    content = bytes(answer.payload.open())
    if answer.payload.path is not None:
        answer.payload.path.unlink()
    return content


def test_a_result_that_is_repeated_counts_once(consortium: Consortium, study: Study, tmp_path: Path) -> None:
    """Each is acknowledged, so that the agent forgets it; a second end of the exchange would raise."""

    async def main() -> None:
        async with asked(consortium, study, tmp_path) as (_, bank, ended):
            for content in (b"first", b"first", b"another"):
                await bank.say(result=inline(content))
                assert (await bank.hear("ack")).ack.exchange == EXCHANGE

            assert taken(await ended) == b"first"

    once(main)


def test_a_large_result_arrives_as_it_was_sent(consortium: Consortium, study: Study, tmp_path: Path) -> None:
    """In chunks, from the offset that the server names."""

    async def main() -> None:
        async with asked(consortium, study, tmp_path) as (_, bank, ended):
            await bank.say(result=announced())
            assert (await bank.hear("proceed")).proceed.offset == 0
            for number in range(4):
                await bank.say(chunk=chunk(number))
            await bank.hear("ack")

            assert taken(await ended) == REPLY

    once(main)


def test_a_transfer_goes_on_where_the_connection_broke(
    consortium: Consortium, study: Study, tmp_path: Path
) -> None:
    """A second connection is asked for the bytes that are missing, and no more."""

    async def main() -> None:
        async with asked(consortium, study, tmp_path) as (front, bank, ended):
            await bank.say(result=announced())
            await bank.hear("proceed")
            await bank.say(chunk=chunk(0))
            await bank.say(chunk=chunk(1))
            # What was said before is read before: the heartbeat is how a test sees that.
            await bank.say(heartbeat=pb.Heartbeat(state="seen"))
            await until(lambda: front.hub.sessions[PARTY["bank"]].state == "seen")
            async with Puppet(consortium, "bank", front.port) as again:
                welcome = await again.hello()
                await again.hear("assign")
                await again.say(result=announced())
                offset = (await again.hear("proceed")).proceed.offset
                for number in (2, 3):
                    await again.say(chunk=chunk(number))
                await again.hear("ack")

                assert list(welcome.open) == [EXCHANGE]
                assert offset == 2 * CHUNK
                assert taken(await ended) == REPLY

    once(main)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param([announced(), chunk(1)], id="a chunk before the first"),
        pytest.param([announced(), chunk(0), chunk(0)], id="a chunk twice"),
        pytest.param([announced(), chunk(0), chunk(2)], id="a chunk left out"),
        pytest.param([announced(), chunk(0, offset=2**64 - 1)], id="an offset of 2^64 - 1"),
        pytest.param([announced(), chunk(0, data=b"")], id="no bytes"),
        pytest.param([announced(), chunk(0, data=b"x" * (CHUNK + 1))], id="more than a chunk"),
        pytest.param([announced(size=10), chunk(0, data=b"x" * 11)], id="more than was announced"),
        pytest.param([chunk(0)], id="a chunk of nothing announced"),
        pytest.param([announced(size=2**63)], id="more than any result may have"),
        pytest.param([announced(size=2**64 - 1)], id="2^64 - 1 bytes"),
        pytest.param([announced(size=0)], id="a result without bytes"),
        pytest.param([announced(sha256=b"short")], id="a digest that is none"),
        pytest.param([inline(sha256=bytes(32))], id="inline bytes of another digest"),
        pytest.param([inline(size=12)], id="inline bytes of another size"),
        pytest.param([pb.Hello(protocol=1)], id="hello again"),
        pytest.param([pb.FromAgent()], id="nothing"),
    ],
)
def test_who_breaks_the_protocol_is_told_so_and_cut_off(
    consortium: Consortium, study: Study, tmp_path: Path, said: list[Any]
) -> None:
    """The exchange stays open; the same site answers it over a new connection. Nothing else notices."""

    async def main() -> None:
        async with (
            asked(consortium, study, tmp_path) as (front, bank, ended),
            Puppet(consortium, "clinic", front.port) as clinic,
        ):
            await clinic.hello()
            for message in said:
                if isinstance(message, pb.FromAgent):
                    await bank._stream.write(message)
                else:
                    await bank.say(**{type(message).__name__.lower(): message})
            goodbye = await bank.farewell()
            async with Puppet(consortium, "bank", front.port) as again:
                await again.hello()
                await again.hear("assign")
                await again.say(result=inline(b"sound"))
                await again.hear("ack")

                assert goodbye.code == FAULT
                assert taken(await ended) == b"sound"
                assert front.connected("bank", "clinic")()

    once(main)


def test_bytes_of_another_digest_are_asked_for_again_and_not_for_ever(
    consortium: Consortium, study: Study, tmp_path: Path
) -> None:
    """Three transfers that do not match what was announced end the exchange with an error."""

    async def main() -> None:
        async with asked(consortium, study, tmp_path) as (_, bank, ended):
            await bank.say(result=announced(size=5, sha256=hashlib.sha256(b"right").digest()))
            for _ in range(3):
                assert (await bank.hear("proceed")).proceed.offset == 0
                await bank.say(chunk=chunk(0, data=b"wrong"))
            await bank.hear("ack")
            answer = await ended

            assert answer.payload is None
            assert answer.error_code != 0

    once(main)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"\xff" * 40, id="no protobuf"),
        pytest.param(b"x" * (MESSAGE_LIMIT + 1), id="too long"),
    ],
)
def test_bytes_that_are_no_message_end_their_stream_only(
    consortium: Consortium, study: Study, tmp_path: Path, raw: bytes
) -> None:
    """Garbage, or a message longer than any may be: refused before it is read."""

    async def main() -> None:
        async with asked(consortium, study, tmp_path) as (front, bank, ended):
            async with channel(consortium, consortium.site("clinic"), front.port) as wire:
                stream = wire.stream_stream(f"/{FLEET}/Connect")()
                told = stated(IdentityKey.generate(), "clinic")
                hello = pb.Hello(protocol=1, site="clinic", instance=bytes(16), statement=told)
                await stream.write(pb.FromAgent(hello=hello).SerializeToString())
                assert pb.ToAgent.FromString(await stream.read()).HasField("welcome")
                await stream.write(raw)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    while await stream.read() is not grpc.aio.EOF:
                        pass
            await until(front.connected("bank"))
            await bank.say(result=inline(b"undisturbed"))

            assert taken(await ended) == b"undisturbed"

    once(main)


def test_no_site_answers_for_another(consortium: Consortium, study: Study, tmp_path: Path) -> None:
    """It hears no more than that it may forget the exchange, whether there is one or not."""

    async def main() -> None:
        async with (
            asked(consortium, study, tmp_path) as (front, bank, ended),
            Puppet(consortium, "clinic", front.port) as clinic,
        ):
            await clinic.hello()
            await clinic.say(result=inline(b"forged"))
            await clinic.say(result=inline(b"forged", exchange=bytes(16)))
            await clinic.say(accept=pb.Accept(exchange=EXCHANGE))
            await clinic.say(chunk=chunk(0, data=b"forged"))
            known, unknown = await clinic.hear("ack"), await clinic.hear("ack")
            await clinic.say(heartbeat=pb.Heartbeat(state="seen"))
            await until(lambda: front.hub.sessions[PARTY["clinic"]].state == "seen")
            open_still = not ended.done()
            await bank.say(result=inline(b"mine"))

            assert taken(await ended) == b"mine"
            assert open_still
            assert clinic.heard == []
            assert (known.ack.exchange, unknown.ack.exchange) == (EXCHANGE, bytes(16))

    once(main)


def test_of_two_agents_of_one_site_the_later_one_stays(
    consortium: Consortium, study: Study, tmp_path: Path
) -> None:
    """It is asked what is open; the earlier one is told to go, and counts for nothing from then on."""

    async def main() -> None:
        async with (
            asked(consortium, study, tmp_path) as (front, first, ended),
            Puppet(consortium, "bank", front.port) as second,
        ):
            await second.hello()
            await second.hear("assign")
            goodbye = await first.farewell()
            await second.say(result=inline(b"second"))

            assert goodbye.code == REPLACED
            assert taken(await ended) == b"second"
            assert front.connected("bank")()

    once(main)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"protocol": 2}, "protocol 2"),
        ({"protocol": 0}, "protocol 0"),
        ({"site": "clinic"}, "certificate"),
        ({"instance": b"short"}, "instance"),
    ],
)
def test_a_hello_that_does_not_fit_is_refused(
    consortium: Consortium, tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    """Another protocol, another site's name: one line says what is wrong, and the stream ends."""

    async def main() -> None:
        async with Front(consortium, tmp_path) as front, Puppet(consortium, "bank", front.port) as bank:
            with pytest.raises(EOFError):
                await bank.hello(**changes)
            (goodbye,) = [said.goodbye for said in bank.heard]

            assert goodbye.code == REFUSED
            assert word in goodbye.reason
            assert front.connected()()

    once(main)


def test_a_stream_begins_with_hello(consortium: Consortium, study: Study, tmp_path: Path) -> None:
    """A result before it counts for nothing, and replaces no agent."""

    async def main() -> None:
        async with (
            asked(consortium, study, tmp_path) as (front, _, ended),
            Puppet(consortium, "bank", front.port) as hasty,
        ):
            await hasty.say(result=inline(b"hasty"))
            goodbye = await hasty.farewell()

            assert goodbye.code == REFUSED
            assert not ended.done()
            assert front.connected("bank")()

    once(main)
