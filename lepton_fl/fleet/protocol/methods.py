"""The services of fleet.proto as gRPC names them, for both sides."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio

from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.limits import MESSAGE_LIMIT

PROTOCOL = 1
FLEET = "lepton_fl.fleet.v1.Fleet"
ENROLMENT = "lepton_fl.fleet.v1.Enrolment"

OPTIONS: list[tuple[str, int]] = [("grpc.max_receive_message_length", MESSAGE_LIMIT)]
"""gRPC's settings for the stream, at both ends."""

Connect = Callable[
    [AsyncIterator[pb.FromAgent], "grpc.aio.ServicerContext[pb.FromAgent, pb.ToAgent]"], Awaitable[None]
]
Renew = Callable[
    [pb.RenewRequest, "grpc.aio.ServicerContext[pb.RenewRequest, pb.RenewReply]"], Awaitable[pb.RenewReply]
]
Consortium = Callable[
    [pb.ConsortiumRequest, "grpc.aio.ServicerContext[pb.ConsortiumRequest, pb.ConsortiumReply]"],
    Awaitable[pb.ConsortiumReply],
]
Join = Callable[
    [pb.JoinRequest, "grpc.aio.ServicerContext[pb.JoinRequest, pb.JoinReply]"], Awaitable[pb.JoinReply]
]


def fleet_handlers(connect: Connect, renew: Renew) -> grpc.GenericRpcHandler:
    """The service `Fleet`, to be added to a server."""
    return grpc.method_handlers_generic_handler(
        FLEET,
        {
            "Connect": grpc.stream_stream_rpc_method_handler(
                connect,
                request_deserializer=pb.FromAgent.FromString,
                response_serializer=pb.ToAgent.SerializeToString,
            ),
            "Renew": grpc.unary_unary_rpc_method_handler(
                renew,
                request_deserializer=pb.RenewRequest.FromString,
                response_serializer=pb.RenewReply.SerializeToString,
            ),
        },
    )


def connect_method(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamMultiCallable[pb.FromAgent, pb.ToAgent]:
    """`Fleet.Connect` as an agent calls it."""
    return channel.stream_stream(
        f"/{FLEET}/Connect",
        request_serializer=pb.FromAgent.SerializeToString,
        response_deserializer=pb.ToAgent.FromString,
    )


def renew_method(
    channel: grpc.aio.Channel,
) -> grpc.aio.UnaryUnaryMultiCallable[pb.RenewRequest, pb.RenewReply]:
    """`Fleet.Renew` as an agent calls it."""
    return channel.unary_unary(
        f"/{FLEET}/Renew",
        request_serializer=pb.RenewRequest.SerializeToString,
        response_deserializer=pb.RenewReply.FromString,
    )


def enrolment_handlers(consortium: Consortium, join: Join) -> grpc.GenericRpcHandler:
    """The service `Enrolment`, to be added to a server."""
    return grpc.method_handlers_generic_handler(
        ENROLMENT,
        {
            "Consortium": grpc.unary_unary_rpc_method_handler(
                consortium,
                request_deserializer=pb.ConsortiumRequest.FromString,
                response_serializer=pb.ConsortiumReply.SerializeToString,
            ),
            "Join": grpc.unary_unary_rpc_method_handler(
                join,
                request_deserializer=pb.JoinRequest.FromString,
                response_serializer=pb.JoinReply.SerializeToString,
            ),
        },
    )


def consortium_method(
    channel: grpc.Channel,
) -> grpc.UnaryUnaryMultiCallable[pb.ConsortiumRequest, pb.ConsortiumReply]:
    """`Enrolment.Consortium` as a site calls it."""
    return channel.unary_unary(
        f"/{ENROLMENT}/Consortium",
        request_serializer=pb.ConsortiumRequest.SerializeToString,
        response_deserializer=pb.ConsortiumReply.FromString,
    )


def join_method(channel: grpc.Channel) -> grpc.UnaryUnaryMultiCallable[pb.JoinRequest, pb.JoinReply]:
    """`Enrolment.Join` as a site calls it."""
    return channel.unary_unary(
        f"/{ENROLMENT}/Join",
        request_serializer=pb.JoinRequest.SerializeToString,
        response_deserializer=pb.JoinReply.FromString,
    )
