"""Receipts: what a service has settled in a bucket, in constant space, so that the log can contradict it. No I/O.

A receipt has a count and four sums over all carried events that the service has passed in a bucket, also those that no
handler wants. `mark` makes a number of each event as it was handled. The sums do not depend on the order in which they
are made, so what has gone by and what was committed later add up. They are power sums: of marks, of marks times
position, and so on. Where the log gives other sums, their differences say at which position one event, or two, are
missing, foreign or replaced (`locate`), as syndromes of a Reed-Solomon code do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from operator import add, sub
from struct import Struct
from typing import Final, NamedTuple, Self

from tidings.stores import RecordedEvent

__all__ = ["PRIME", "Receipt", "Sums", "locate", "mark", "missing_run", "total"]

PRIME: Final = 2**127 - 1
"""All sums are modulo this."""
_begun: Final = blake2b(digest_size=15).copy
"""Makes the digest that a mark begins with, by a copy, which is faster. Marks have 15 bytes, so that they are below
`PRIME`."""


def mark(event: RecordedEvent) -> int:
    """Return the number that stands for an event in sums: a digest of all that tells it from any other."""
    position, stream, version, kind, data, metadata, _, identity, _ = event
    numbers = _packed(position, version, len(stream), len(metadata))
    digest = _begun()
    texts = (stream + kind).encode("utf-8", "surrogatepass")
    digest.update(b"".join((numbers, identity, texts, b"\xff", metadata, data)))
    return _number(digest.digest())


_packed: Final = Struct(">4q").pack
_number: Final = int.from_bytes
_new: Final = tuple.__new__
"""Makes a named tuple in a third of the time."""


class Sums(NamedTuple):
    """A count of events, and the sums of their marks times position to the power of 0, 1, 2 and 3."""

    events: int = 0
    zeroth: int = 0
    first: int = 0
    second: int = 0
    third: int = 0

    def with_event(self, position: int, value: int) -> Sums:
        """Add an event; `value` is its mark."""
        return self.with_events(((position, value),))

    def with_events(self, marked: Iterable[tuple[int, int]]) -> Sums:
        """Add events, each a position and a mark."""
        events, zeroth, first, second, third = self
        for position, value in marked:
            events += 1
            zeroth += value
            first += (value := value * position)
            second += (value := value * position)
            third += value * position
        return _new(Sums, (events, zeroth % PRIME, first % PRIME, second % PRIME, third % PRIME))

    def plus(self, other: Sums) -> Sums:
        """Add all events of both."""
        return Sums(*map(add, self, other)).reduced()

    def minus(self, other: Sums) -> Sums:
        """Return the difference; its number of events may be negative."""
        return Sums(*map(sub, self, other)).reduced()

    def reduced(self) -> Sums:
        """Return the same sums as numbers from 0 to `PRIME` - 1."""
        events, zeroth, first, second, third = self
        return Sums(events, zeroth % PRIME, first % PRIME, second % PRIME, third % PRIME)


class Receipt(NamedTuple):
    """What a service has settled in one bucket."""

    since: int
    """It begins above this position."""
    sums: Sums = Sums()
    disorder: int = -1
    """Position of the first event that was settled after a later one; -1 for none."""

    def with_settled(self, events: Iterable[RecordedEvent], last: int, beyond: int) -> Receipt:
        """Add events in the order in which they have ended, after that at position `last`. Those up to `beyond` are in
        the sums already."""
        # The sums are those of `Sums.with_events`: every event passes here, and one loop over them takes less time.
        since, (number, zeroth, first, second, third), disorder = self
        for event in events:
            position = event[0]
            if position < last and disorder < 0:
                disorder = position
            last = position
            if position > beyond:
                value = mark(event)
                number += 1
                zeroth += value
                first += (value := value * position)
                second += (value := value * position)
                third += value * position
        sums = _new(Sums, (number, zeroth % PRIME, first % PRIME, second % PRIME, third % PRIME))
        return _new(Receipt, (since, sums, disorder))

    def write(self) -> str:
        """Return the text that `read` reads."""
        since, (events, zeroth, first, second, third), disorder = self
        return "%d %d %d %x %x %x %x" % (since, disorder, events, zeroth, first, second, third)  # noqa: UP031 - faster

    @classmethod
    def read(cls, text: str) -> Self | None:
        """Return None for what is no receipt: a service of an older Tidings has none, and a replay ends it."""
        try:
            since, disorder, events, zeroth, first, second, third = text.split(" ")
            sums = Sums(int(events), int(zeroth, 16), int(first, 16), int(second, 16), int(third, 16))
            return cls(int(since), sums, int(disorder))
        except ValueError:
            return None


Differences = list[tuple[int, int]]
"""Positions at which a receipt and the log differ, and by how much the mark in the receipt is higher there."""


def locate(difference: Sums, last: int) -> Differences | None:
    """Return where a receipt and the log differ, in the order of the log: at one position or two, at most `last`; None
    where there are more of them."""
    if one := _locate_one(difference, last):
        return [one]
    _, zeroth, first, second, third = difference.reduced()
    # Two positions are the roots of x^2 - total * x + product.
    determinant = (zeroth * second - first * first) % PRIME
    if not determinant:
        return None
    inverse = pow(determinant, -1, PRIME)
    total = (zeroth * third - first * second) * inverse % PRIME
    product = (first * third - second * second) * inverse % PRIME
    root = pow(total * total - 4 * product, (PRIME + 1) // 4, PRIME)  # PRIME is 3 modulo 4
    half = pow(2, -1, PRIME)
    low, high = sorted(((total - root) * half % PRIME, (total + root) * half % PRIME))
    if high > last or low == high or (low + high - total) % PRIME or (low * high - product) % PRIME:
        return None
    of_high = (first - low * zeroth) * pow(high - low, -1, PRIME) % PRIME
    return [(low, (zeroth - of_high) % PRIME), (high, of_high)]


def _locate_one(difference: Sums, last: int) -> tuple[int, int] | None:
    _, zeroth, first, second, third = difference.reduced()
    if not zeroth or (zeroth * second - first * first) % PRIME or (first * third - second * second) % PRIME:
        return None
    position = first * pow(zeroth, -1, PRIME) % PRIME
    return (position, zeroth) if position <= last else None


def missing_run(difference: Sums, events: Sequence[tuple[int, int]], last: int) -> tuple[range, Differences] | None:
    """Return the indexes of successive events that explain the difference if they are missing, alone or with one more
    difference, at a position of at most `last`; None where none do.

    `events` are the position and mark of those of the log in the bucket, in its order.
    """
    # A foreign event beside them hides one of them from the number of events.
    for length in (-difference.events, 1 - difference.events):
        if not 0 < length <= len(events):
            continue
        rest = difference.plus(total(events[:length]))
        for start in range(len(events) - length + 1):
            if start:
                rest = rest.plus(total(events[start + length - 1 : start + length])).minus(total((events[start - 1],)))
            if not any(rest.reduced()[1:]):
                return range(start, start + length), []
            if one := _locate_one(rest, last):
                return range(start, start + length), [one]
    return None


def total(events: Iterable[tuple[int, int]]) -> Sums:
    """Return the sums over events, each a position and a mark."""
    return Sums().with_events(events)
