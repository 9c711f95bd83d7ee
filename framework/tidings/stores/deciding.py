"""What a write does to a log, decided from what is known of its streams, for stores that keep the log themselves.

The order of the questions that EventStoreDB asks is in `rules.decide`; what follows from the answer is here. It does no
I/O: a store says what is known, and keeps what is put.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from tidings.errors import StreamDeleted, WrongExpectedVersion
from tidings.stores import Appended, EventData, Expected, describe
from tidings.stores.rules import MAX_VERSION, METADATA, SOFT_DELETE, Facts, decide, original_of, truncated
from tidings.stores.table import Kind

__all__ = ["Deciding"]


class Deciding(ABC):
    """Writes are decided one after the other. One that is refused has put nothing."""

    @abstractmethod
    def facts(self, stream: str) -> Facts:
        """Return what is known of a stream, with all that was put."""

    @abstractmethod
    def document(self, stream: str) -> bytes:
        """Return the stream's metadata document, with all that was put."""

    @abstractmethod
    def recorded(self, stream: str, id_: bytes) -> Appended | None:
        """Return the first event of the stream with this id, of the log or of what was put."""

    @abstractmethod
    def recorded_at(self, stream: str, version: int) -> tuple[bytes, int] | None:
        """Return the id and the position of the stream's event with this version."""

    @abstractmethod
    def put(self, stream: str, version: int, event: EventData) -> None:
        """Keep an event as the last one of the log, and of its stream."""

    @property
    @abstractmethod
    def reached(self) -> int:
        """The position of the event that was put last."""

    def decided(
        self, stream: str, expected: Expected, ids: Sequence[bytes], facts: Facts | None = None
    ) -> Appended | None:
        """Ask `rules.decide` about events with these ids. `facts` are those of the stream, if they are at hand."""
        original = original_of(stream)
        if facts is None:
            facts = self.facts(stream)
        if original is not None and facts.last < 0 and self.facts(original).last == MAX_VERSION:
            # EventStoreDB looks at the original only where the metadata stream has no event of its own.
            raise StreamDeleted(stream)
        return decide(
            stream,
            facts,
            expected,
            ids,
            has_metadata=lambda: self.facts(f"$${stream}").last >= 0,
            recorded=lambda id_: self.recorded(stream, id_),
            recorded_at=lambda version: self.recorded_at(stream, version),
        )

    def apply(self, kind: Kind, stream: str, expected: Expected, events: Sequence[EventData]) -> Appended:
        """Decide about a write, and put what it does. Raises `WrongExpectedVersion` and `StreamDeleted`."""
        facts = self.facts(stream)
        repeated = self.decided(stream, expected, [event.id.bytes for event in events], facts)
        if repeated is not None:
            return repeated
        if kind is Kind.APPEND:
            return self.append(stream, events, facts)
        if kind is Kind.TOMBSTONE:
            self.put(stream, MAX_VERSION, events[0])
            return Appended(MAX_VERSION, self.reached)
        last = facts.last
        if last < 0 and self.facts(f"$${stream}").last < 0:
            raise WrongExpectedVersion(stream, describe(expected), -1)
        self._put_metadata(stream, SOFT_DELETE)
        return Appended(last, self.reached)

    def append(self, stream: str, events: Sequence[EventData], facts: Facts | None = None) -> Appended:
        """Put events that were decided to be written. `facts` are those of the stream, if they are at hand."""
        original = original_of(stream)
        if facts is None:
            facts = self.facts(stream)
        last, soft = facts.last, facts.soft
        if not events:
            return Appended(last, self.reached)
        first = last + 1
        # Before the new document is there: whether the stream was softly deleted is read from the one that is the last.
        was_soft = original is not None and self.facts(original).soft
        for event in events:
            last += 1
            self.put(stream, last, event)
        answer = Appended(last, self.reached)
        if soft:
            self._undelete(stream, first)
        if original is not None and was_soft and (end := self.facts(original).last) != MAX_VERSION:
            self._undelete(original, end + 1)
        return answer

    def _undelete(self, stream: str, first: int) -> None:
        """Writing to a softly deleted stream makes it readable from the new events on."""
        document = truncated(self.document(stream), first)
        if document is not None:
            self._put_metadata(stream, document)

    def _put_metadata(self, stream: str, document: bytes) -> None:
        metastream = f"$${stream}"
        self.put(metastream, self.facts(metastream).last + 1, EventData(METADATA, document))
