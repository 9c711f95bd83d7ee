"""EventStoreDB's rules for streams as pure functions: what an append may do, what metadata hides. No I/O, no store.

For stores that keep the log themselves. Recorded from EventStoreDB 24.2 (`eventstoredb-protocol.md` sections 2 to 4).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from tidings.errors import InvalidStreamName, StreamDeleted, WrongExpectedVersion
from tidings.stores import ANY, STREAM_EXISTS, Appended, EventData, Expected, check_text, describe

__all__ = [
    "MAX_VERSION",
    "METADATA",
    "SOFT_DELETE",
    "STREAM_DELETED",
    "Facts",
    "Retention",
    "check_event",
    "decide",
    "document_of",
    "original_of",
    "retention_of",
    "truncated",
]

MAX_VERSION: Final = 2**63 - 1
"""The version of a tombstone; as `$tb`, a soft delete."""
METADATA: Final = "$metadata"
STREAM_DELETED: Final = "$streamDeleted"
"""The types of a metadata document's event, and of a tombstone."""


# ---- metadata ----------------------------------------------------------------------


class Retention(NamedTuple):
    """What a stream's metadata says about which events may still be read; 0: nothing."""

    max_count: int = 0
    max_age: int = 0
    """Seconds."""
    truncate_before: int = 0

    @property
    def soft_deleted(self) -> bool:
        return self.truncate_before == MAX_VERSION

    def first(self, last: int) -> int:
        """The first version that may be read of a stream that ends with version `last`."""
        return max(last - self.max_count + 1 if self.max_count else 0, self.truncate_before)


_METASTREAM: Final = Retention(max_count=1)


def check_event(stream: str, event: EventData) -> None:
    """Raise `InvalidStreamName` or `TypeError` for an event that no log can take."""
    if not event.type:
        raise InvalidStreamName(f"an event for stream {stream!r} has an empty type: give it a name")
    if not event.id.int:
        raise InvalidStreamName(f"an event for stream {stream!r} has the zero UUID as its id: give it another")
    if type(event.data) is not bytes or type(event.metadata) is not bytes:
        raise TypeError(f"data and metadata of an event for stream {stream!r} must be bytes")
    check_text(event.type)


def original_of(stream: str) -> str | None:
    """The stream whose metadata stream this is; None for an ordinary one."""
    return stream[2:] if stream.startswith("$$") else None


def retention_of(stream: str, document: bytes) -> Retention:
    """By the stream's metadata document. What is no positive integer is ignored; a metadata stream's own is fixed."""
    if original_of(stream) is not None:
        return _METASTREAM
    values = document_of(document)
    return Retention(*(_natural(values.get(key)) for key in ("$maxCount", "$maxAge", "$tb")))


def _natural(value: object) -> int:
    return value if type(value) is int and 0 < value <= MAX_VERSION else 0


def document_of(document: bytes) -> dict[str, Any]:
    """A metadata document; an empty one for bytes that are not a JSON object."""
    values = _loaded(document)
    return values if isinstance(values, dict) else {}


def _loaded(document: bytes) -> object:
    try:
        return json.loads(document)
    except (ValueError, RecursionError):
        return None


def truncated(document: bytes, before: int) -> bytes | None:
    """The same document with `$tb`: what a write makes of a softly deleted stream's metadata. None: it is malformed."""
    values = _loaded(document)
    return json.dumps(values | {"$tb": before}, separators=(",", ":")).encode() if isinstance(values, dict) else None


SOFT_DELETE: Final = b'{"$tb":9223372036854775807}'


# ---- appending ---------------------------------------------------------------------


class Facts:
    """What an append must know of a stream."""

    __slots__ = ("last", "soft")

    def __init__(self, last: int, soft: bool) -> None:
        self.last = last
        """Version of the last event; -1 without one, `MAX_VERSION` when tombstoned."""
        self.soft = soft
        """Deleted softly."""


def decide(
    stream: str,
    facts: Facts,
    expected: Expected,
    ids: Sequence[bytes],
    *,
    has_metadata: Callable[[], bool],
    recorded: Callable[[bytes], Appended | None],
    recorded_at: Callable[[int], tuple[bytes, int] | None],
) -> Appended | None:
    """None: write all of it. An answer: all of it was written before, and this is where its last event is.

    The rules in EventStoreDB's order. `recorded` finds the first event of the stream with an id, `recorded_at` the id
    and position of the one with a version. Raises `WrongExpectedVersion` and `StreamDeleted`.
    """
    last = facts.last
    if last == MAX_VERSION:
        raise StreamDeleted(stream)

    def wrong() -> WrongExpectedVersion:
        return WrongExpectedVersion(stream, describe(expected), last)

    if expected is STREAM_EXISTS:
        if facts.soft:
            raise StreamDeleted(stream, tombstoned=False)
        if last < 0 and not has_metadata():
            raise wrong()
    if expected is ANY or expected is STREAM_EXISTS:
        # Only the first id decides whether this is a repetition: [new, known] is written whole.
        answer = recorded(ids[0]) if ids else None
        if answer is None:
            return None
        for id_ in ids[1:]:
            answer = recorded(id_)
            if answer is None:
                raise wrong()
        return answer
    version = expected if isinstance(expected, int) else -1
    if version > last:
        raise wrong()
    if version == last:
        return None  # ids are not looked at: the same id again, at the head, is written again
    answer = None
    for at, id_ in enumerate(ids, version + 1):
        there = recorded_at(at)
        if there is None or there[0] != id_:
            if at == 0 and facts.soft:
                return None
            raise wrong()
        answer = Appended(at, there[1])
    if answer is None:
        raise wrong()
    return answer
