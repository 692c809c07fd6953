from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FromAgent(_message.Message):
    __slots__ = ("hello", "accept", "result", "chunk", "ack", "answer", "heartbeat", "goodbye", "receipts")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    accept: Accept
    result: Result
    chunk: Chunk
    ack: Ack
    answer: Answer
    heartbeat: Heartbeat
    goodbye: Goodbye
    receipts: Receipts
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., accept: _Optional[_Union[Accept, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., receipts: _Optional[_Union[Receipts, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "release", "site", "instance", "roster_version", "insecure_seed", "device", "probe", "statement")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    INSECURE_SEED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    release: str
    site: str
    instance: bytes
    roster_version: int
    insecure_seed: bool
    device: str
    probe: bool
    statement: bytes
    def __init__(self, protocol: _Optional[int] = ..., release: _Optional[str] = ..., site: _Optional[str] = ..., instance: _Optional[bytes] = ..., roster_version: _Optional[int] = ..., insecure_seed: bool = ..., device: _Optional[str] = ..., probe: bool = ..., statement: _Optional[bytes] = ...) -> None: ...

class Accept(_message.Message):
    __slots__ = ("exchange", "offset")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    exchange: bytes
    offset: int
    def __init__(self, exchange: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("exchange", "size", "sha256", "error_code", "error_reason", "inline", "statement")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_REASON_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    exchange: bytes
    size: int
    sha256: bytes
    error_code: int
    error_reason: str
    inline: bytes
    statement: bytes
    def __init__(self, exchange: _Optional[bytes] = ..., size: _Optional[int] = ..., sha256: _Optional[bytes] = ..., error_code: _Optional[int] = ..., error_reason: _Optional[str] = ..., inline: _Optional[bytes] = ..., statement: _Optional[bytes] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("study_id", "state", "reason")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[Answer.State]
        WAITING: _ClassVar[Answer.State]
        APPROVED: _ClassVar[Answer.State]
        REFUSED: _ClassVar[Answer.State]
    UNKNOWN: Answer.State
    WAITING: Answer.State
    APPROVED: Answer.State
    REFUSED: Answer.State
    STUDY_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    study_id: str
    state: Answer.State
    reason: str
    def __init__(self, study_id: _Optional[str] = ..., state: _Optional[_Union[Answer.State, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class ToAgent(_message.Message):
    __slots__ = ("welcome", "assign", "chunk", "proceed", "ack", "cancel", "offer", "heartbeat", "goodbye", "roster", "receipts", "statements")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ASSIGN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    PROCEED_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    STATEMENTS_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    assign: Assign
    chunk: Chunk
    proceed: Proceed
    ack: Ack
    cancel: Cancel
    offer: Offer
    heartbeat: Heartbeat
    goodbye: Goodbye
    roster: Roster
    receipts: Receipts
    statements: Statements
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., assign: _Optional[_Union[Assign, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., proceed: _Optional[_Union[Proceed, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., roster: _Optional[_Union[Roster, _Mapping]] = ..., receipts: _Optional[_Union[Receipts, _Mapping]] = ..., statements: _Optional[_Union[Statements, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "release", "heartbeat_s", "party", "open", "time", "witness")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    PARTY_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    WITNESS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    release: str
    heartbeat_s: float
    party: int
    open: _containers.RepeatedScalarFieldContainer[bytes]
    time: float
    witness: bytes
    def __init__(self, protocol: _Optional[int] = ..., release: _Optional[str] = ..., heartbeat_s: _Optional[float] = ..., party: _Optional[int] = ..., open: _Optional[_Iterable[bytes]] = ..., time: _Optional[float] = ..., witness: _Optional[bytes] = ...) -> None: ...

class Assign(_message.Message):
    __slots__ = ("exchange", "run", "study_id", "round", "type", "size", "sha256", "deadline_s", "inline")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    STUDY_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    exchange: bytes
    run: str
    study_id: str
    round: int
    type: str
    size: int
    sha256: bytes
    deadline_s: float
    inline: bytes
    def __init__(self, exchange: _Optional[bytes] = ..., run: _Optional[str] = ..., study_id: _Optional[str] = ..., round: _Optional[int] = ..., type: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[bytes] = ..., deadline_s: _Optional[float] = ..., inline: _Optional[bytes] = ...) -> None: ...

class Proceed(_message.Message):
    __slots__ = ("exchange", "offset")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    exchange: bytes
    offset: int
    def __init__(self, exchange: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("exchange",)
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    exchange: bytes
    def __init__(self, exchange: _Optional[bytes] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("canonical", "study_id", "signature")
    CANONICAL_FIELD_NUMBER: _ClassVar[int]
    STUDY_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    canonical: bytes
    study_id: str
    signature: bytes
    def __init__(self, canonical: _Optional[bytes] = ..., study_id: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("signed",)
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    signed: bytes
    def __init__(self, signed: _Optional[bytes] = ...) -> None: ...

class Statements(_message.Message):
    __slots__ = ("signed",)
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    signed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, signed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Receipts(_message.Message):
    __slots__ = ("signed",)
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    signed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, signed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("exchange", "offset", "data")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    exchange: bytes
    offset: int
    data: bytes
    def __init__(self, exchange: _Optional[bytes] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("exchange",)
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    exchange: bytes
    def __init__(self, exchange: _Optional[bytes] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("number", "state")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    number: int
    state: str
    def __init__(self, number: _Optional[int] = ..., state: _Optional[str] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("code", "reason")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[Goodbye.Code]
        LEAVING: _ClassVar[Goodbye.Code]
        REFUSED: _ClassVar[Goodbye.Code]
        REPLACED: _ClassVar[Goodbye.Code]
        FAULT: _ClassVar[Goodbye.Code]
        LEDGER: _ClassVar[Goodbye.Code]
    UNKNOWN: Goodbye.Code
    LEAVING: Goodbye.Code
    REFUSED: Goodbye.Code
    REPLACED: Goodbye.Code
    FAULT: Goodbye.Code
    LEDGER: Goodbye.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: Goodbye.Code
    reason: str
    def __init__(self, code: _Optional[_Union[Goodbye.Code, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class PayloadHeader(_message.Message):
    __slots__ = ("records", "sizes")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    records: bytes
    sizes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, records: _Optional[bytes] = ..., sizes: _Optional[_Iterable[int]] = ...) -> None: ...

class ConsortiumRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ConsortiumReply(_message.Message):
    __slots__ = ("document",)
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    document: bytes
    def __init__(self, document: _Optional[bytes] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("token_id", "token_secret", "site", "csr", "identity_key", "identity_proof")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SECRET_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_KEY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_PROOF_FIELD_NUMBER: _ClassVar[int]
    token_id: bytes
    token_secret: bytes
    site: str
    csr: bytes
    identity_key: bytes
    identity_proof: bytes
    def __init__(self, token_id: _Optional[bytes] = ..., token_secret: _Optional[bytes] = ..., site: _Optional[str] = ..., csr: _Optional[bytes] = ..., identity_key: _Optional[bytes] = ..., identity_proof: _Optional[bytes] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("state", "reason", "certificate", "chain", "identity_certificate", "roster", "fleet_address", "time")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[JoinReply.State]
        PENDING: _ClassVar[JoinReply.State]
        APPROVED: _ClassVar[JoinReply.State]
        REJECTED: _ClassVar[JoinReply.State]
    UNKNOWN: JoinReply.State
    PENDING: JoinReply.State
    APPROVED: JoinReply.State
    REJECTED: JoinReply.State
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    FLEET_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    state: JoinReply.State
    reason: str
    certificate: bytes
    chain: bytes
    identity_certificate: bytes
    roster: bytes
    fleet_address: str
    time: int
    def __init__(self, state: _Optional[_Union[JoinReply.State, str]] = ..., reason: _Optional[str] = ..., certificate: _Optional[bytes] = ..., chain: _Optional[bytes] = ..., identity_certificate: _Optional[bytes] = ..., roster: _Optional[bytes] = ..., fleet_address: _Optional[str] = ..., time: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("csr",)
    CSR_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    def __init__(self, csr: _Optional[bytes] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("certificate", "chain")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    chain: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., chain: _Optional[bytes] = ...) -> None: ...

class FromRunner(_message.Message):
    __slots__ = ("ready", "send", "cancel", "progress", "finished")
    READY_FIELD_NUMBER: _ClassVar[int]
    SEND_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ready: Ready
    send: Send
    cancel: Cancel
    progress: Progress
    finished: Finished
    def __init__(self, ready: _Optional[_Union[Ready, _Mapping]] = ..., send: _Optional[_Union[Send, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class Send(_message.Message):
    __slots__ = ("type", "round", "deadline_s", "sha256", "body", "to")
    class To(_message.Message):
        __slots__ = ("party", "exchange")
        PARTY_FIELD_NUMBER: _ClassVar[int]
        EXCHANGE_FIELD_NUMBER: _ClassVar[int]
        party: int
        exchange: bytes
        def __init__(self, party: _Optional[int] = ..., exchange: _Optional[bytes] = ...) -> None: ...
    TYPE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    type: str
    round: int
    deadline_s: float
    sha256: bytes
    body: Body
    to: _containers.RepeatedCompositeFieldContainer[Send.To]
    def __init__(self, type: _Optional[str] = ..., round: _Optional[int] = ..., deadline_s: _Optional[float] = ..., sha256: _Optional[bytes] = ..., body: _Optional[_Union[Body, _Mapping]] = ..., to: _Optional[_Iterable[_Union[Send.To, _Mapping]]] = ...) -> None: ...

class Body(_message.Message):
    __slots__ = ("inline", "file", "size")
    INLINE_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    inline: bytes
    file: str
    size: int
    def __init__(self, inline: _Optional[bytes] = ..., file: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("exit_code", "message", "json")
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    exit_code: int
    message: str
    json: str
    def __init__(self, exit_code: _Optional[int] = ..., message: _Optional[str] = ..., json: _Optional[str] = ...) -> None: ...

class ToRunner(_message.Message):
    __slots__ = ("connected", "arrived", "stop")
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    connected: Connected
    arrived: Arrived
    stop: Stop
    def __init__(self, connected: _Optional[_Union[Connected, _Mapping]] = ..., arrived: _Optional[_Union[Arrived, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ...) -> None: ...

class Connected(_message.Message):
    __slots__ = ("members",)
    class Member(_message.Message):
        __slots__ = ("party", "site", "insecure_seed")
        PARTY_FIELD_NUMBER: _ClassVar[int]
        SITE_FIELD_NUMBER: _ClassVar[int]
        INSECURE_SEED_FIELD_NUMBER: _ClassVar[int]
        party: int
        site: str
        insecure_seed: bool
        def __init__(self, party: _Optional[int] = ..., site: _Optional[str] = ..., insecure_seed: bool = ...) -> None: ...
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[Connected.Member]
    def __init__(self, members: _Optional[_Iterable[_Union[Connected.Member, _Mapping]]] = ...) -> None: ...

class Arrived(_message.Message):
    __slots__ = ("exchange", "body", "error_code", "error_reason", "lost")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_REASON_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    exchange: bytes
    body: Body
    error_code: int
    error_reason: str
    lost: bool
    def __init__(self, exchange: _Optional[bytes] = ..., body: _Optional[_Union[Body, _Mapping]] = ..., error_code: _Optional[int] = ..., error_reason: _Optional[str] = ..., lost: bool = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
