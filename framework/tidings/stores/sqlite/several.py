"""One append to several streams, all or nothing, with checks of streams that it need not write. It does no I/O itself.

KurrentDB has this since 25.1; the rules are those recorded from 26.1. A repetition is known by the ids of its events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from tidings.stores import ANY, NO_STREAM, Appended, EventData, Expected, StreamAppend
from tidings.stores.several import NONE, holds, judged, number_of, refusal_of, state_of
from tidings.stores.sqlite.writer import Appender, Member, Write
from tidings.stores.table import Kind, as_expected

__all__ = ["Check", "Several", "Violation", "several_of"]


class Check(NamedTuple):
    """A stream must be in this state: the version of its last event, or a state that is none (`stores.several`)."""

    stream: str
    state: int


class Violation(NamedTuple):
    """A check that does not hold."""

    place: int
    """Which of the checks it is, from 0 on."""
    stream: str
    expected: int
    actual: int


class Several(Write):
    """An append to several streams. When it is settled, `versions` or `violations` say more than its outcome."""

    __slots__ = ("checks", "expectations", "records", "versions", "violations")

    def __init__(
        self,
        member: Member,
        records: Sequence[tuple[str, EventData]],
        expectations: Mapping[str, Expected],
        checks: Sequence[Check],
        size: int,
    ) -> None:
        """`size` is what all of it counts for in bytes, towards the log's limit, too."""
        super().__init__(member, Kind.APPEND, records[0][0], (), ANY, size)
        self.records = records
        """Streams and events, in the order in which the log gets them."""
        self.expectations = {
            **{check.stream: _expected(check.state) for check in checks if check.state >= NONE},
            **expectations,
        }
        """What the streams that are written must be like, where that is not any version."""
        self.checks = checks
        self.versions: Mapping[str, int] = {}
        """The last version that was written of each stream."""
        self.violations: list[Violation] = []

    def apply(self, appender: Appender) -> Appended:
        """Decide about all of it, and only then put it. Raises `WrongExpectedVersion`, `StreamDeleted` and
        `PartlyRepeated`."""
        self.versions, self.violations = {}, []
        ids: dict[str, list[bytes]] = {}
        for stream, event in self.records:
            ids.setdefault(stream, []).append(event.id.bytes)

        def decided(stream: str) -> Appended | None:
            return appender.decided(stream, self.expectations.get(stream, ANY), ids[stream])

        repeated = judged(ids, decided, lambda: self._check(appender))
        if repeated is not None:
            self.versions = repeated.versions
            return Appended(repeated.versions[self.stream], repeated.position)
        last, versions = Appended(NONE, NONE), dict.fromkeys(ids, NONE)
        # A stream's events in one piece: the metadata of one that was softly deleted comes behind them.
        for stream, records in groupby(self.records, key=itemgetter(0)):
            last = appender.append(stream, [event for _, event in records])
            versions[stream] = last.version
        self.versions = versions
        return last

    def _check(self, appender: Appender) -> None:
        for place, (stream, state) in enumerate(self.checks):
            if not holds(facts := appender.facts(stream), state):
                self.violations.append(Violation(place, stream, state, state_of(facts)))
        if self.violations:
            _, stream, state, _ = self.violations[0]
            raise refusal_of(stream, appender.facts(stream), state)


def several_of(member: Member, appends: Sequence[StreamAppend[EventData]], size: int) -> Several:
    """Return the append as the port has it."""
    records = [(stream, event) for stream, events, _ in appends for event in events]
    expectations = {stream: as_expected(expected) for stream, events, expected in appends if events}
    checks = [
        Check(stream, number_of(as_expected(expected)))
        for stream, events, expected in appends
        if not events and expected is not ANY
    ]
    return Several(member, records, expectations, checks, size)


def _expected(state: int) -> Expected:
    return NO_STREAM if state == NONE else state
