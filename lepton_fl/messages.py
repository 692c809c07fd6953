"""The one adapter to Flower's records and messages: what a run's messages carry, and nothing else.

Every message to a site carries the whole study (canonical bytes), its id, the run, the round and the
cohort, so a site decides on each message by itself and no earlier message can have prepared the way.
"""

from __future__ import annotations

import io
import logging
import math
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import (
    DEFAULT_TTL,
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.task_identity import TaskIdentity

from lepton_fl.errors import AlreadyCharged, BadReply, BadRequest, LeptonError, Unwritable
from lepton_fl.secagg.context import DIGEST_BYTES
from lepton_fl.secagg.errors import SERVER, BadPhase, Phase, SecaggError
from lepton_fl.secagg.masks import Words
from lepton_fl.secagg.messages import MaskedUpdate, to_wire
from lepton_fl.secure_rounds import EVALUATE_SUM, TRAIN_SUM
from lepton_fl.study import NAME_PATTERN, Study, parse_canonical
from lepton_fl.tasks.arrays import MAX_MAGNITUDE, Arrays, check_like

# Flower logs each step of each round at INFO, to the console.
logging.getLogger("flwr").setLevel(logging.WARNING)

ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
COUNTS = "counts"
"""The array of a histogram of scores, and of the sum of all sites'."""
WEIGHT = "num-examples"
"""Flower's key for a reply's weight. Always the public constant 1: a count would be an un-noised release."""
ROUND = "server-round"
MEMBERS = "members"
"""On the reply of a summing grid only: the node ids whose updates are in it."""

SECAGG = "secagg"
"""The record that messages of a secure round carry, and their replies."""

JOIN = "query.join"
TRAIN = "train"
EVALUATE = "evaluate"
SUMS = {TRAIN: TRAIN_SUM, EVALUATE: EVALUATE_SUM}
"""What the messages that begin a secure round add up."""
PHASES: dict[Phase, str] = {
    phase: f"query.secagg_{phase.value}" for phase in Phase if phase is not Phase.OVER
}
"""The message type of each exchange. The first is asked with TRAIN or EVALUATE already; its own type asks for
it again, in another attempt."""

_WORDS = "words"
_TASK = 1
"""Flower draws the task ids of its own processes at random, from 64 bits."""
_ERROR_BASE = 1000
"""Above Flower's own error codes; the rest is the exit code of the error's class."""
_INTERNAL = _ERROR_BASE + 1
SITS_OUT = _ERROR_BASE + 50
"""Code of a reply that gives nothing for this round, and may for the next: beyond the exit codes, since those
of refusals are for good."""
_BLAMELESS = SITS_OUT + 1
RUN_ID = re.compile(r"[0-9a-f]{32}")
_MAX_STUDY = 4 << 20
"""Bytes. A study of ten thousand columns has about one million."""
_MAX_COHORT = 10_000
_MAX_BODY = 16 << 20
"""Bytes of a secure exchange, the vector aside. LSA1-PQ among ten thousand sites has about two million."""
_MAX_REASON = 200

# Exactly what numpy itself writes for a number type, format 1.0. Its own reader evaluates the header as a
# Python literal, and allocates what the header claims before it looks at the length.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(?P<size>..)(?P<header>\{'descr': '(?P<type><[fiu][248]|\|[biu]1)', "
    rb"'fortran_order': False, 'shape': (?P<shape>\([0-9, ]{0,200}\)), \} *\n)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureRequest:
    """What a message asks of a site in a secure round, beside its assignment."""

    kind: str
    """What is added up."""
    attempt: int
    roster: int
    """The version that the server goes by."""
    session: bytes = b""
    """That the server proposes to resume; empty for an ordinary attempt, and in later exchanges."""
    step: int = 0
    """Of the session."""
    body: bytes = b""
    """The protocol's request; empty where a site is asked to advertise."""

    def record(self) -> ConfigRecord:
        return ConfigRecord(
            {
                "kind": self.kind,
                "attempt": self.attempt,
                "roster": self.roster,
                "session": self.session,
                "step": self.step,
                "body": self.body,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a message asks a site to take part in."""

    study: Study
    run: str
    """128 random bits, 32 hexadecimal digits."""
    round: int
    """1, 2, ...; 0 in messages that belong to no round. Never used twice in a run."""
    cohort: tuple[str, ...]
    """Names of the sites of this round, sorted; empty in a `JOIN`, before there is one."""


def is_site_name(name: str) -> bool:
    """Whether `name` can be a site's: 1 to 64 letters, digits, dots, dashes and underscores."""
    return re.fullmatch(NAME_PATTERN, name) is not None


def identify(run: str, node: int) -> None:
    """Tell Flower who this process is; it cannot construct a message before. Once a process.

    A process that Flower itself started has been told, and its grid takes messages of that run only.
    """
    try:
        if TaskIdentity.task_id != _TASK:
            return
    except RuntimeError:
        pass
    TaskIdentity.run_id = int(run[:15], 16)
    TaskIdentity.task_id = _TASK
    TaskIdentity.node_id = node


def assignment_config(assignment: Assignment) -> ConfigRecord:
    """The config record that every message of a run carries."""
    return ConfigRecord(
        {
            "study": assignment.study.canonical,
            "study-id": assignment.study.id,
            "run": assignment.run,
            "cohort": list(assignment.cohort),
            ROUND: assignment.round,
        }
    )


def _config(content: RecordDict, name: str) -> ConfigRecord | None:
    """A config record, if there is one of this name.

    Past `RecordDict.config_records`, which makes a dictionary of all of them at each look.
    """
    record = content.get(name)
    return record if isinstance(record, ConfigRecord) else None


def read_assignment(message: Message) -> Assignment:
    """What `message` asks.

    Raises:
        BadRequest: a part is missing or of another type.
        VerificationFailed: the study's bytes are not those of its id.
        ConfigError: this release does not understand the study.
    """
    config = _config(message.content, CONFIG) if message.has_content() else None
    if config is None:
        raise BadRequest("message: carries no config record")
    canonical, study_id = config.get("study"), config.get("study-id")
    run, cohort, number = config.get("run"), config.get("cohort"), config.get(ROUND)
    if not (isinstance(canonical, bytes) and isinstance(study_id, str)):
        raise BadRequest("message: carries no study")
    if len(canonical) > _MAX_STUDY:
        raise BadRequest(f"message: a study of {len(canonical)} bytes, at most {_MAX_STUDY} are read")
    if not (isinstance(run, str) and RUN_ID.fullmatch(run)):
        raise BadRequest("message: carries no run id")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise BadRequest("message: carries no round")
    if not isinstance(cohort, list):
        raise BadRequest("message: carries no cohort")
    if len(cohort) > _MAX_COHORT:
        raise BadRequest(f"message: a cohort of {len(cohort)} sites, at most {_MAX_COHORT} are read")
    return _assigned(canonical, study_id, run, number, tuple(cohort))


@lru_cache(maxsize=16)
def _assigned(canonical: bytes, study_id: str, run: str, number: int, cohort: tuple[Any, ...]) -> Assignment:
    """Once for a round, not once a message: there are as many messages as names in each."""
    if not all(isinstance(name, str) for name in cohort):
        raise BadRequest("message: carries no cohort")
    names = tuple(str(name) for name in cohort)
    if not all(is_site_name(name) for name in names):
        raise BadRequest("message: the cohort names what is no site")
    if list(names) != sorted(set(names)):
        raise BadRequest("message: the cohort is not sorted, or names a site twice")
    return Assignment(study=_parsed(canonical, study_id), run=run, round=number, cohort=names)


def read_secure(message: Message) -> SecureRequest:
    """What `message` asks in a secure round.

    Raises:
        BadRequest: a part is missing or of another type.
    """
    record = _config(message.content, SECAGG) or ConfigRecord()
    kind, attempt, roster = record.get("kind"), record.get("attempt"), record.get("roster")
    body, session, step = record.get("body"), record.get("session"), record.get("step")
    if not isinstance(kind, str) or not isinstance(body, bytes):
        raise BadRequest("message: carries no request of a secure round")
    if len(body) > _MAX_BODY:
        raise BadRequest(f"message: an exchange of {len(body)} bytes, at most {_MAX_BODY} are read")
    if type(attempt) is not int or type(roster) is not int or min(attempt, roster) < 1:
        raise BadRequest("message: carries no attempt of a secure round, or no roster")
    if not isinstance(session, bytes) or type(step) is not int:
        raise BadRequest("message: says not whether a secure round is of a session")
    # A session is proposed where a round begins, and nowhere else.
    lengths = (0, DIGEST_BYTES) if message.metadata.message_type in SUMS else (0,)
    if len(session) not in lengths or step < 0 or (step and not session):
        raise BadRequest("message: proposes a session that is none")
    return SecureRequest(kind=kind, attempt=attempt, roster=roster, session=session, step=step, body=body)


def received(message: Message, template: Arrays) -> Arrays:
    """The parameters in a message to a site, checked against the study's model.

    Raises:
        ProtocolError: names, shapes or types are not the model's, or a value is not finite or is enormous.
            Decided before any record is touched, so that the answer tells nothing of the records.
    """
    record = message.content.array_records.get(ARRAYS)
    if record is None:
        raise BadRequest("message: carries no parameters")
    arrays = from_record(record)
    check_like(arrays, template, limit=MAX_MAGNITUDE)
    return arrays


def secure_reply(message: Message, body: bytes) -> Message:
    """A site's reply in a secure round."""
    return Message(RecordDict({SECAGG: ConfigRecord({"body": body})}), reply_to=message)


def masked_reply(message: Message, masked: MaskedUpdate) -> Message:
    """The reply that carries a masked update: the only one of a secure round that carries an array."""
    header, _ = to_wire(masked)
    content = RecordDict({SECAGG: ConfigRecord({"body": header})})
    content[ARRAYS] = to_record({_WORDS: masked.words.astype("<u4", copy=False)})
    return Message(content, reply_to=message)


def read_secure_reply(reply: Message, *, masked: bool = False) -> tuple[bytes, Words]:
    """Body and masked words of a site's reply; words are a view, and none but where `masked`.

    Raises:
        BadReply: it holds something else.
    """
    content = reply.content
    body = (_config(content, SECAGG) or ConfigRecord()).get("body")
    expected = {SECAGG, ARRAYS} if masked else {SECAGG}
    if set(content) != expected or not isinstance(body, bytes):
        raise BadReply("reply: is none of a secure round")
    if len(body) > _MAX_BODY:
        raise BadReply(f"reply: an exchange of {len(body)} bytes, at most {_MAX_BODY} are read")
    if not masked:
        return body, np.empty(0, np.uint32)
    arrays = content.array_records.get(ARRAYS)
    if arrays is None or list(arrays) != [_WORDS]:
        raise BadReply("reply: does not hold exactly the masked update")
    return body, from_record(arrays, copy=False)[_WORDS]


@lru_cache(maxsize=16)
def _parsed(canonical: bytes, study_id: str) -> Study:
    return parse_canonical(canonical, study_id)


def to_record(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    """Arrays by name as a Flower record."""
    record = ArrayRecord()
    for name, array in arrays.items():
        # One by one: given a dictionary of them, Flower makes each a second time.
        record[name] = _as_array(array)
    return record


def _as_array(array: np.ndarray) -> Array:
    """As Flower makes it of a numpy array, without its ten calls for each."""
    header = _header(array.dtype.str, array.shape)
    return Array(str(array.dtype), array.shape, "numpy.ndarray", header + array.tobytes())


@lru_cache(maxsize=256)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    written = io.BytesIO()
    np.lib.format.write_array_header_1_0(written, {"descr": dtype, "fortran_order": False, "shape": shape})
    return written.getvalue()


def from_record(record: ArrayRecord, *, copy: bool = True) -> dict[str, np.ndarray]:
    """A Flower record as arrays by name, copied out of the message.

    With `copy=False` they are read-only views of the message's own bytes, which live as long as a view does
    and cost no memory beyond it. The bytes may be `bytes` or a `memoryview`, of a mapped file say, whose
    content must not change any more.

    Raises:
        BadReply: an array's bytes are not what its header says.
    """
    views = {name: _view(name, array) for name, array in record.items()}
    return {name: view.copy() for name, view in views.items()} if copy else views


def _view(name: str, array: Array) -> np.ndarray:
    # Flower declares bytes; a transport may put a memoryview in their place.
    data = memoryview(array.data)
    found = _NPY.match(data) if array.stype == "numpy.ndarray" else None
    if found is None or len(found["header"]) != int.from_bytes(found["size"], "little"):
        raise BadReply(f"arrays: {name} is not numbers in NumPy's format 1.0")
    dtype = np.dtype(found["type"].decode())
    shape = tuple(int(n) for n in re.findall(rb"\d+", found["shape"]))
    size = math.prod(shape) * dtype.itemsize
    if repr(shape).encode() != found["shape"] or data.nbytes - found.end() != size:
        raise BadReply(f"arrays: {name} does not hold what its header says")
    try:
        view = np.frombuffer(data, dtype=dtype, offset=found.end()).reshape(shape)
    except (ValueError, OverflowError):
        # No bytes at all, and a shape that numpy cannot count.
        raise BadReply(f"arrays: {name} does not hold what its header says") from None
    view.flags.writeable = False
    return view


def is_reply(reply: Message, request: Message) -> bool:
    """Whether `reply` comes from where `request` went, and is of the same run and type."""
    found, asked = reply.metadata, request.metadata
    return (found.src_node_id, found.run_id, found.message_type) == (
        asked.dst_node_id,
        asked.run_id,
        asked.message_type,
    )


def update_reply(
    message: Message, delta: dict[str, np.ndarray], *, members: list[int] | None = None
) -> Message:
    """A reply with an update, of constant weight; `members` on a sum over several sites."""
    content = RecordDict({ARRAYS: to_record(delta), METRICS: MetricRecord({WEIGHT: 1.0})})
    if members is not None:
        content[CONFIG] = ConfigRecord({MEMBERS: members})
    return Message(content, reply_to=message)


def counts_reply(message: Message, counts_2B: np.ndarray, *, members: list[int] | None = None) -> Message:
    """A reply with a histogram of scores; `members` on a sum over several sites."""
    content = RecordDict({ARRAYS: to_record({COUNTS: counts_2B})})
    if members is not None:
        content[CONFIG] = ConfigRecord({MEMBERS: members})
    return Message(content, reply_to=message)


def error_reply(message: Message, error: LeptonError | None) -> Message:
    """A reply that refuses. Carries the public part of the error only; None is an internal fault."""
    if error is None:
        return Message(Error(_INTERNAL, "internal error at the site"), reply_to=message)
    code = SITS_OUT if _passes(error) else _ERROR_BASE + error.exit_code
    return Message(Error(code, error.public), reply_to=message)


def _passes(error: LeptonError) -> bool:
    """Whether a site that refuses so may be in the next round: this one is over, or another is at fault."""
    if isinstance(error, SecaggError):
        return error.retry or isinstance(error, BadPhase) or error.culprit not in (None, SERVER)
    # A disk that is full may have room again.
    return isinstance(error, AlreadyCharged | Unwritable)


def blameless_reply(message: Message, reason: str) -> Message:
    """A SummingGrid's reply in the name of a site that is not in this round, without a fault of its own."""
    return Message(Error(_BLAMELESS, as_remark(reason)), reply_to=message)


def relayed(reply: Message, message: Message) -> Message:
    """An error reply to some exchange of a round, as the reply to the message that began the round.

    That it is blameless no site says of itself.
    """
    code = SITS_OUT if blameless(reply) else reply.error.code
    return Message(Error(code, refusal_reason(reply)), reply_to=message)


def refusal_reason(reply: Message) -> str:
    """Why the sender of an error reply says that it refuses: its own words, so short and printable."""
    return as_remark(reply.error.reason or "") or "error at the site"


def as_remark(text: str) -> str:
    """`text` with words of another party in it, short and printable: for logs, databases and people."""
    return "".join(c for c in text[: 10 * _MAX_REASON] if c.isprintable())[:_MAX_REASON]


def refusal_exit_code(reply: Message) -> int:
    """The exit code that a refusal's error class has; 1 for faults that are no refusal."""
    if sits_out(reply):
        return AlreadyCharged.exit_code
    code = reply.error.code - _ERROR_BASE
    return code if 1 < code < 8 else 1


def round_of(message: Message) -> int:
    """The round that a message of ours belongs to; 0 if none."""
    found = (_config(message.content, CONFIG) or ConfigRecord()).get(ROUND)
    return found if isinstance(found, int) else 0


def incoming(content: RecordDict, *, kind: str, run: str, message_id: str) -> Message:
    """A message as it reaches a site over a transport of ours. Its reply carries the same run and id."""
    metadata = Metadata(
        run_id=int(run[:15], 16),
        message_id=message_id,
        src_node_id=1,
        dst_node_id=2,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=DEFAULT_TTL,
        message_type=kind,
    )
    # Flower's own way, which its types leave out: without it the process would be tied to one run.
    made: Message = Message(content=content, metadata=metadata)  # type: ignore[call-overload]
    return made


def sits_out(reply: Message) -> bool:
    """Whether the sender of an error reply refuses this round only, since it took part in it before."""
    return bool(reply.error.code in (SITS_OUT, _BLAMELESS))


def blameless(reply: Message) -> bool:
    """Whether a SummingGrid says that the site is not at fault. In a site's own reply it means nothing."""
    return bool(reply.error.code == _BLAMELESS)
