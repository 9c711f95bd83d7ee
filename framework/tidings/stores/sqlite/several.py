"""One append to several streams, all or nothing, with checks of streams that it need not write. It does no I/O itself.

KurrentDB has this since 25.1; the rules are those recorded from 26.1. A repetition is known by the ids of its events.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from tidings.errors import StreamDeleted, WrongExpectedVersion
from tidings.stores import ANY, NO_STREAM, Appended, EventData, Expected, describe
from tidings.stores.rules import MAX_VERSION, Facts
from tidings.stores.sqlite.writer import Appender, Member, Write
from tidings.stores.table import Kind

__all__ = ["DELETED", "EXISTS", "NONE", "TOMBSTONED", "Check", "Several", "Violation"]

NONE: Final = -1
EXISTS: Final = -4
DELETED: Final = -5
TOMBSTONED: Final = -6
"""States of a stream that are no version."""


class Check(NamedTuple):
    """A stream must be in this state: the version of its last event, or one of the states above."""

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
        self.versions: dict[str, int] = {}
        """The last version that was written of each stream."""
        self.violations: list[Violation] = []

    def apply(self, appender: Appender, connection: sqlite3.Connection) -> Appended:
        """Decide about all of it, and only then put it. Raises `WrongExpectedVersion` and `StreamDeleted`."""
        self.versions, self.violations = {}, []
        repeated, refusal = self._decided(appender, connection)
        if refusal is None and None not in repeated.values():
            found = {stream: answer for stream, answer in repeated.items() if answer is not None}
            self.versions = {stream: answer.version for stream, answer in found.items()}
            return max(found.values(), key=lambda answer: answer.position)
        self._check(appender, connection)
        for stream, answer in repeated.items():
            if refusal is None and answer is not None:  # a part of it was written before, and a part was not
                refusal = WrongExpectedVersion(stream, describe(self._expects(stream)), answer.version)
        if refusal is not None:
            raise refusal
        last = Appended(NONE, NONE)
        for stream, event in self.records:
            last = appender.append(connection, stream, [event])
            self.versions[stream] = last.version
        return last

    def _expects(self, stream: str) -> Expected:
        return self.expectations.get(stream, ANY)

    def _decided(
        self, appender: Appender, connection: sqlite3.Connection
    ) -> tuple[dict[str, Appended | None], WrongExpectedVersion | StreamDeleted | None]:
        """For each stream, None to write it or where it was written before; and the first refusal."""
        ids: dict[str, list[bytes]] = {}
        for stream, event in self.records:
            ids.setdefault(stream, []).append(event.id.bytes)
        repeated: dict[str, Appended | None] = {}
        refusal: WrongExpectedVersion | StreamDeleted | None = None
        for stream, own in ids.items():
            try:
                repeated[stream] = appender.decided(connection, stream, self._expects(stream), own)
            except (WrongExpectedVersion, StreamDeleted) as error:
                refusal = refusal or error.with_traceback(None)  # which has this frame, which has the error
        return repeated, refusal

    def _check(self, appender: Appender, connection: sqlite3.Connection) -> None:
        for place, (stream, expected) in enumerate(self.checks):
            actual = _state(facts := appender.facts(connection, stream))
            if not _holds(facts, expected):
                self.violations.append(Violation(place, stream, expected, actual))
        if self.violations:
            _, stream, expected, actual = self.violations[0]
            raise WrongExpectedVersion(stream, f"state {expected}", actual)


def _expected(state: int) -> Expected:
    return NO_STREAM if state == NONE else state


def _state(facts: Facts) -> int:
    if facts.last == MAX_VERSION:
        return TOMBSTONED
    return DELETED if facts.soft else facts.last


def _holds(facts: Facts, expected: int) -> bool:
    actual = _state(facts)
    if actual == DELETED and expected >= NONE:  # it is no stream, and its last version still is its last version
        return expected in (NONE, facts.last)
    return actual >= 0 if expected == EXISTS else actual == expected
