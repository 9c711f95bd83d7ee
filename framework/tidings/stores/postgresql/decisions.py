"""What a group of appends does to the log, decided by what is known of its streams. It knows no connection.

A `Draft` notes everything that it takes for granted. The database writes it only if all of that is so at the moment
of writing (`tidings_log.append`); so what is known may be old, and may even be a guess.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Final, NamedTuple

from tidings.errors import StoreError
from tidings.stores import (
    ANY,
    JSON,
    NO_STREAM,
    STREAM_EXISTS,
    Appended,
    AppendedSeveral,
    EventData,
    Expected,
)
from tidings.stores.deciding import Deciding
from tidings.stores.postgresql.schema import key_of, uuid_of
from tidings.stores.rules import MAX_VERSION, Facts, original_of, retention_of
from tidings.stores.several import holds, judged, number_of, refusal_of
from tidings.stores.table import Kind

__all__ = ["Draft", "Found", "Outcome", "Several", "State", "Unknown", "Write", "asked_of"]


class Write:
    """Something to be written, and who waits for the outcome."""

    __slots__ = ("answer", "events", "expected", "kind", "size", "stream")

    def __init__(
        self,
        kind: Kind,
        stream: str,
        events: tuple[EventData, ...],
        expected: Expected,
        size: int,
        answer: asyncio.Future[Any],
    ) -> None:
        self.kind = kind
        self.stream = stream
        self.events = events
        self.expected = expected
        self.size = size
        """Bytes as it is sent: what counts where writes become a group."""
        self.answer = answer
        """It gets an `Appended`, or for `Several` an `AppendedSeveral`."""

    @property
    def parts(self) -> Sequence[Write]:
        """What it does to each of its streams."""
        return (self,)


class Several(Write):
    """An append to several streams, each of them once. Those that get no events are only looked at."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[Write], size: int, answer: asyncio.Future[Any]) -> None:
        super().__init__(Kind.APPEND, parts[0].stream, (), ANY, size, answer)
        self._parts = parts

    @property
    def parts(self) -> Sequence[Write]:
        return self._parts


Outcome = Appended | AppendedSeveral | StoreError


class State(NamedTuple):
    """What is known of a stream: the version of its last event and, for a metadata stream, that event's data."""

    last: int
    document: bytes


_NOTHING: Final = State(-1, b"")


class Unknown(Exception):
    """A decision needs what only a look at the log can tell."""


class Found:
    """What was looked up for a group: events by their ids, and ids with positions by versions."""

    def __init__(self) -> None:
        self.ids: dict[tuple[str, bytes], Appended | None] = {}
        self.at: dict[tuple[str, int], tuple[bytes, int] | None] = {}


def asked_of(writes: Iterable[Write]) -> tuple[list[str], Found]:
    """Return what to look up so that no decision about the writes is `Unknown`: streams, and what is to be found."""
    streams: dict[str, None] = {}
    found = Found()
    for write in chain.from_iterable(write.parts for write in writes):
        original = original_of(write.stream)
        for stream in (write.stream, f"$${write.stream}", *(() if original is None else (original,))):
            streams[stream] = None
        if isinstance(write.expected, int) or write.expected is NO_STREAM:
            first = (write.expected if isinstance(write.expected, int) else -1) + 1
            found.at.update(((write.stream, at), None) for at in range(first, first + len(write.events)) if _exists(at))
        else:
            found.ids.update(((write.stream, event.id.bytes), None) for event in write.events)
    return list(streams), found


def _exists(version: int) -> bool:
    return 0 <= version < MAX_VERSION


class Draft(Deciding):
    """The rows and outcomes of a group, write by write against what is known and what its earlier writes do.

    A write that is refused leaves no trace. Until the database has said behind which position the rows begin, an
    outcome's position is counted from there, in negative numbers: see `placed`.
    """

    def __init__(self, known: Mapping[str, State], found: Found | None = None) -> None:
        self._found = found
        """None: what is not known is guessed."""
        self.states = dict[str, State]()
        """How the streams stand after the group."""
        self._known = known
        self.lasts: dict[str, int] = {}
        """Taken for granted: the last versions of streams before the group."""
        self.new_ids: list[tuple[str, bytes]] = []
        """Taken for granted: ids that are not in a stream."""
        self.rows: list[tuple[str, int, bytes, EventData]] = []
        self.writes: list[Write] = []
        self.outcomes: list[Outcome] = []
        """What each of the writes comes to."""
        self._by_id: dict[tuple[str, bytes], Appended] = {}
        self._by_version: dict[tuple[str, int], tuple[bytes, int]] = {}

    def add(self, writes: Sequence[Write]) -> None:
        """Decide the writes in their order. Raises `Unknown`; the draft is of no use then."""
        self.writes.extend(writes)
        for write in writes:
            try:
                self.outcomes.append(self._apply_several(write) if isinstance(write, Several) else self._apply(write))
            except StoreError as refusal:
                self.outcomes.append(refusal)

    @staticmethod
    def placed(outcome: Outcome, head: int) -> Outcome:
        """Return the outcome with its position, where the rows were written behind position `head`."""
        if isinstance(outcome, StoreError) or outcome.position >= 0:
            return outcome
        return outcome._replace(position=head - 1 - outcome.position)

    @property
    def reached(self) -> int:
        return -1 - len(self.rows)

    def _state(self, stream: str) -> State:
        state = self.states.get(stream)
        if state is None:
            state = self._known.get(stream)
            if state is None:
                if self._found is not None:
                    raise KeyError(stream)
                raise Unknown
            self.states[stream] = state
            self.lasts[stream] = state.last
        return state

    def _guess(self, write: Write) -> None:
        """Take for granted what a write expects of a stream that nothing is known of, and that it has no metadata."""
        if write.stream in self.states or write.stream in self._known:
            return
        last = write.expected if isinstance(write.expected, int) else -1
        if write.expected is STREAM_EXISTS or write.kind is not Kind.APPEND or write.stream.startswith("$$"):
            raise Unknown
        if not 0 <= last < MAX_VERSION and last != -1:
            raise Unknown
        for stream, state in ((write.stream, State(last, b"")), (f"$${write.stream}", _NOTHING)):
            if stream not in self.states and stream not in self._known:
                self.states[stream] = state
                self.lasts[stream] = state.last

    def _soft(self, stream: str) -> bool:
        document = b"" if stream.startswith("$$") else self._state(f"$${stream}").document
        return bool(document) and retention_of(stream, document).soft_deleted

    def facts(self, stream: str) -> Facts:
        return Facts(self._state(stream).last, self._soft(stream))

    def document(self, stream: str) -> bytes:
        return self._state(f"$${stream}").document

    def _apply(self, write: Write) -> Appended:
        if self._found is None:
            self._guess(write)
        return self.apply(write.kind, write.stream, write.expected, write.events)

    def _decided(self, write: Write) -> Appended | None:
        if self._found is None:
            self._guess(write)
        return self.decided(write.stream, write.expected, [event.id.bytes for event in write.events])

    def _apply_several(self, several: Several) -> AppendedSeveral:
        """Decide about all of it, and only then put it."""
        written = {part.stream: part for part in several.parts if part.events}
        repeated = judged(written, lambda stream: self._decided(written[stream]), lambda: self._check(several))
        if repeated is not None:
            return repeated
        appended = {stream: self.append(stream, part.events) for stream, part in written.items()}
        return AppendedSeveral(
            {stream: answer.version for stream, answer in appended.items()},
            min(answer.position for answer in appended.values()),  # counted in negative numbers
        )

    def _check(self, several: Several) -> None:
        """Look at the streams that get no events."""
        for part in several.parts:
            if part.events or part.expected is ANY:
                continue
            if self._found is None:
                self._guess(part)
            facts, state = self.facts(part.stream), number_of(part.expected)
            if not holds(facts, state):
                raise refusal_of(part.stream, facts, state)

    def put(self, stream: str, version: int, event: EventData) -> None:
        id_ = event.id.bytes
        self.rows.append((stream, version, id_, event))
        self.states[stream] = State(version, event.data if stream.startswith("$$") else b"")
        self._by_id.setdefault((stream, id_), Appended(version, self.reached))
        self._by_version[stream, version] = (id_, self.reached)

    def recorded(self, stream: str, id_: bytes) -> Appended | None:
        """The first event of the stream with this id: of the log, or of the group."""
        key = (stream, id_)
        known = None if self._found is None else self._found.ids[key]
        if known is not None:
            return known
        if self.lasts[stream] >= 0:
            self.new_ids.append(key)
        return self._by_id.get(key)

    def recorded_at(self, stream: str, version: int) -> tuple[bytes, int] | None:
        if version > self.lasts[stream]:
            return self._by_version.get((stream, version))
        if self._found is None:
            raise Unknown
        return self._found.at.get((stream, version))

    def arguments(self) -> tuple[object, ...]:
        """Return what `tidings_log.append` is to be called with."""
        streams, versions, ids, events = zip(*self.rows, strict=True) if self.rows else ((), (), (), ())
        return (
            [key_of(stream) for stream in self.lasts],
            list(self.lasts.values()),
            [key_of(stream) for stream, _ in self.new_ids],
            [uuid_of(id_) for _, id_ in self.new_ids],
            [key_of(stream) for stream in streams],
            [stream.encode() for stream in streams],
            versions,
            [event.type.encode() for event in events],
            [event.content_type == JSON for event in events],
            [uuid_of(id_) for id_ in ids],
            [event.data for event in events],
            [event.metadata for event in events],
        )
