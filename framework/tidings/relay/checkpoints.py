"""How far a relay has published, as it notes it in the log itself: one small stream per relay. It publishes nothing.

A checkpoint that is too low makes the relay repeat, which services recognise; one that is too high makes its first
marker say so, and they read the rest from the log. So it may be moved, but never above what the log holds.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tidings.errors import StoreUnavailable, StreamNotFound
from tidings.stores import ANY, MAX_POSITION, EventData, EventStore

__all__ = [
    "Checkpointed",
    "UnreadableCheckpoint",
    "checkpoint_stream",
    "read_checkpoint",
    "read_last",
    "write_checkpoint",
]


class Checkpointed(NamedTuple):
    """What a relay noted last."""

    position: int = -1
    """Everything up to here was published; -1 where none was ever stored."""
    refusing: str | None = None
    """Which queue refuses messages, and what to do; None where none does."""


class UnreadableCheckpoint(StoreUnavailable):
    """What stands in a relay's stream is no checkpoint."""

    def __init__(self, relay: str, version: int) -> None:
        self.version = version
        super().__init__(
            f"stream {checkpoint_stream(relay)!r} holds a checkpoint at version {version} that is none: somebody else "
            "wrote there. Append a right one, or delete the stream: the relay then sends everything again"
        )


def checkpoint_stream(relay: str) -> str:
    """The stream of the relay of this name."""
    return f"tidings_relay-{relay}"


async def read_checkpoint(store: EventStore, relay: str) -> int:
    """Return the position up to which everything was published; -1 where none was ever stored. Raises as `read_last`
    does."""
    return (await read_last(store, relay)).position


async def read_last(store: EventStore, relay: str) -> Checkpointed:
    """Return what the relay noted last.

    A number that no position can be is above the end of every log, as `MAX_POSITION` is, which is returned for it.
    Raises `UnreadableCheckpoint`, `StoreUnavailable`.
    """
    try:
        async for event in store.read_stream(checkpoint_stream(relay), backwards=True, limit=1):
            try:
                noted = json.loads(event.data)
                position = noted["position"]
                if type(position) is int and position >= -1:
                    refusing = noted.get("refusing")
                    return Checkpointed(min(position, MAX_POSITION), refusing if isinstance(refusing, str) else None)
            except (ValueError, KeyError, TypeError, RecursionError):
                pass
            raise UnreadableCheckpoint(relay, event.version)
    except StreamNotFound:
        pass
    return Checkpointed()


async def write_checkpoint(store: EventStore, relay: str, position: int, refusing: str | None = None) -> int:
    """Append the checkpoint, of which two are kept; return where it is in the log.

    Raises `StoreUnavailable`; then the outcome is unknown.
    """
    noted: dict[str, Any] = {"position": position} | ({} if refusing is None else {"refusing": refusing})
    event = EventData("tidings_Checkpoint", json.dumps(noted).encode())
    done = await store.append(checkpoint_stream(relay), [event], expected=ANY)
    if done.version == 0:
        return (await store.set_metadata(checkpoint_stream(relay), {"$maxCount": 2})).position
    return done.position
