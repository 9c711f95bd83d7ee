"""EventStoreDB's messages, taken from whichever client package is installed. It holds no message of its own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# The client packages bring protobuf, which has no types of its own.
from google.protobuf import any_pb2, empty_pb2, struct_pb2  # type: ignore[import-untyped]

from tidings.stores.eventstoredb.protos import PROTOS, shared_pb2, streams_pb2

if TYPE_CHECKING:
    from esdbclient.protos.Grpc import gossip_pb2 as gossip
    from esdbclient.protos.Grpc import persistent_pb2 as persistent
    from esdbclient.protos.Grpc import projections_pb2 as projections
    from esdbclient.protos.Grpc import status_pb2 as status

__all__ = [
    "any_pb2",
    "empty_pb2",
    "gossip",
    "packed",
    "persistent",
    "projections",
    "shared",
    "status",
    "streams",
    "struct_pb2",
]

shared, streams = shared_pb2, streams_pb2
if not TYPE_CHECKING:
    gossip, persistent, projections, status = (
        import_module(f"{PROTOS}.{name}_pb2") for name in ("gossip", "persistent", "projections", "status")
    )


def packed(message: Any) -> bytes:
    """A message as it travels."""
    data: bytes = message.SerializeToString()
    return data
