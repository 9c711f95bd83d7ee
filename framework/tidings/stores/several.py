"""An append over several streams: what it may contain, and how what is decided about each stream becomes one. No I/O.

Each stream is decided by `rules.decide`, as for an append to it alone. KurrentDB 26.1 does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final
from uuid import UUID

from tidings.errors import EventTooLarge, InvalidAppend, PartlyRepeated, StreamDeleted, WrongExpectedVersion
from tidings.stores import (
    MAX_POSITION,
    NO_STREAM,
    STREAM_EXISTS,
    Appended,
    AppendedSeveral,
    EventData,
    Expected,
    StreamAppend,
    describe,
)
from tidings.stores.rules import MAX_VERSION, Facts

__all__ = [
    "DELETED",
    "EXISTS",
    "NONE",
    "STREAMS_LIMIT",
    "TOMBSTONED",
    "checked_several",
    "holds",
    "judged",
    "number_of",
    "refusal_of",
    "state_of",
    "too_large",
]

STREAMS_LIMIT: Final = 1000
"""Streams of one append, at most: each of them is looked up while nobody else may write."""

NONE: Final = -1
EXISTS: Final = -4
DELETED: Final = -5
TOMBSTONED: Final = -6
"""States of a stream that are no version, by KurrentDB's numbers."""
_WORDS: Final = {
    NONE: describe(NO_STREAM),
    EXISTS: describe(STREAM_EXISTS),
    DELETED: "a deleted stream",
    TOMBSTONED: "a tombstoned stream",
}


def checked_several(
    appends: Iterable[StreamAppend[EventData]], size_of: Callable[[str, Sequence[EventData]], int]
) -> tuple[list[StreamAppend[EventData]], int]:
    """Return the appends, so that each can be read more than once, and the bytes of all events.

    Raises `InvalidAppend`, and what `size_of` raises for a stream and its events.
    """
    parts = [part._replace(events=tuple(part.events)) for part in appends]
    streams: set[str] = set()
    ids: set[UUID] = set()
    size = 0
    for stream, events, _ in parts:
        size += size_of(stream, events)
        if stream in streams:
            raise InvalidAppend(stream, "it is named twice. Name it once, with all of its events in their order")
        if stream.startswith("$$"):
            raise InvalidAppend(stream, "it holds another stream's metadata. Write that by itself, with set_metadata")
        streams.add(stream)
        for event in events:
            if event.id in ids:
                raise InvalidAppend(stream, f"event id {event.id} comes twice. Give each event an id of its own")
            ids.add(event.id)
    if not ids:
        raise InvalidAppend(None, "it has no events. Name at least one stream with an event")
    if len(streams) > STREAMS_LIMIT:
        raise InvalidAppend(None, f"it names {len(streams)} streams, and {STREAMS_LIMIT} is the most. Divide it")
    return parts, size


def too_large(appends: Sequence[StreamAppend[EventData]], size: int, limit: int, whose: str = "the") -> EventTooLarge:
    """Return the error for an append over the limit. It names the stream with the most bytes."""
    largest = max(appends, key=lambda part: sum(event.size for event in part.events))
    return EventTooLarge(largest.stream, size, limit, whose, others=len(appends) - 1)


def judged(
    streams: Iterable[str], decided: Callable[[str], Appended | None], check: Callable[[], None]
) -> AppendedSeveral | None:
    """None: write all of it. An answer: all of it was written before.

    `decided` says the same of one of the streams that get events; `check` looks at the other ones, unless everything
    was written before. Both raise `WrongExpectedVersion` and `StreamDeleted`. Raises these and `PartlyRepeated`.
    """
    repeated: dict[str, Appended] = {}
    new: list[str] = []
    refusal: WrongExpectedVersion | StreamDeleted | None = None
    for stream in streams:
        try:
            answer = decided(stream)
        except (WrongExpectedVersion, StreamDeleted) as error:
            refusal = refusal or error.with_traceback(None)  # which has this frame, which has the error
            continue
        if answer is None:
            new.append(stream)
        else:
            repeated[stream] = answer
    if refusal is None and not new:
        return AppendedSeveral(
            {stream: answer.version for stream, answer in repeated.items()},
            max((answer.position for answer in repeated.values()), key=_place),
        )
    check()
    if refusal is not None:
        raise refusal
    for stream, answer in repeated.items():
        raise PartlyRepeated(stream, answer.version, new[0])
    return None


def _place(position: int) -> int:
    """Where a position is in the log. Negative ones, in the order of their amounts, are behind all others: those of
    events that have none yet, because the same transaction writes them."""
    return position if position >= 0 else MAX_POSITION - position


# ---- streams that are only looked at -----------------------------------------------


def number_of(expected: Expected) -> int:
    """Return the state that is demanded of a stream that gets no events. Not for `ANY`."""
    if expected is STREAM_EXISTS:
        return EXISTS
    return max(expected, NONE) if isinstance(expected, int) else NONE


def state_of(facts: Facts) -> int:
    """Return the version of a stream's last event, or the state that is no version."""
    if facts.last == MAX_VERSION:
        return TOMBSTONED
    return DELETED if facts.soft else facts.last


def holds(facts: Facts, state: int) -> bool:
    """Return whether a stream is in a state that is demanded."""
    actual = state_of(facts)
    if actual == DELETED and state >= NONE:  # it is no stream, and its last version still is its last version
        return state in (NONE, facts.last)
    return actual >= 0 if state == EXISTS else actual == state


def refusal_of(stream: str, facts: Facts, state: int) -> WrongExpectedVersion | StreamDeleted:
    """Return the error for a stream that is not in the state that is demanded."""
    actual = state_of(facts)
    if actual == TOMBSTONED or (actual == DELETED and state == EXISTS):
        return StreamDeleted(stream, tombstoned=actual == TOMBSTONED)
    return WrongExpectedVersion(stream, _WORDS.get(state) or describe(state), facts.last)
