"""The services of fleet.proto as gRPC names them, for both sides."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio

from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.payload import CHUNK

PROTOCOL = 1
FLEET = "lepton_fl.fleet.v1.Fleet"
ENROLMENT = "lepton_fl.fleet.v1.Enrolment"

MESSAGE_LIMIT = CHUNK + (64 << 10)
"""Bytes of one message of the stream; gRPC refuses longer ones before it has read them."""

Connect = Callable[
    [AsyncIterator[pb.FromAgent], "grpc.aio.ServicerContext[pb.FromAgent, pb.ToAgent]"], Awaitable[None]
]
Renew = Callable[
    [pb.RenewRequest, "grpc.aio.ServicerContext[pb.RenewRequest, pb.RenewReply]"], Awaitable[pb.RenewReply]
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
