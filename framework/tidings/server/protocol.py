"""EventStoreDB's messages, taken from whichever client package is installed. It holds no message of its own."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

# The client packages bring protobuf, which has no types of its own.
from google.protobuf import any_pb2, empty_pb2, struct_pb2  # type: ignore[import-untyped]

from tidings.errors import ConfigurationError

if TYPE_CHECKING:
    from esdbclient.protos.Grpc import gossip_pb2 as gossip
    from esdbclient.protos.Grpc import persistent_pb2 as persistent
    from esdbclient.protos.Grpc import projections_pb2 as projections
    from esdbclient.protos.Grpc import shared_pb2 as shared
    from esdbclient.protos.Grpc import status_pb2 as status
    from esdbclient.protos.Grpc import streams_pb2 as streams

__all__ = [
    "PACKAGES",
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

PACKAGES: Final = {"esdbclient": "esdbclient.protos.Grpc", "kurrentdbclient": "kurrentdbclient.protos.v1"}
"""The packages that carry the messages, in the order in which they are looked for. One process cannot import both."""


def _messages(name: str) -> Any:
    for package, messages in PACKAGES.items():
        if find_spec(package) is not None:
            return import_module(f"{messages}.{name}_pb2")
    raise ConfigurationError(
        "EventStoreDB's messages come with its client package, and none is installed: "
        "pip install 'tidings[eventstoredb]'"
    )


if not TYPE_CHECKING:
    shared = _messages("shared")
    status = _messages("status")
    streams = _messages("streams")
    persistent = _messages("persistent")
    gossip = _messages("gossip")
    projections = _messages("projections")


def packed(message: Any) -> bytes:
    """A message as it travels."""
    data: bytes = message.SerializeToString()
    return data
