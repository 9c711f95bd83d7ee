"""The delivery rules as pure classes: who is next in a bucket, what is a gap, how far everything is settled. No I/O.

The log gives every event a global position that is never used twice, so the position is the event's identity. Every
event belongs to one of 256 buckets; within a bucket a service works in log order. A relay stamps each message with the
position of the message before it in the same bucket (`Chain`), and from time to time publishes a marker that says how
far it came. A service accepts what is next and recognises duplicates and gaps (`Accepted`), works on buckets side by
side (`Lanes`), and knows how far everything is done (`Window`).
"""

from __future__ import annotations

import json
from binascii import crc32
from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any, Final, Generic, TypeVar

from tidings.protocol.metadata import own_partition_key
from tidings.stores import Filter, RecordedEvent

__all__ = [
    "ALL_BUCKETS",
    "BUCKETS",
    "CARRIED",
    "RESERVED",
    "Accepted",
    "Chain",
    "Lanes",
    "Window",
    "Arrival",
    "bucket_of",
    "carried",
    "partition_key",
]

T = TypeVar("T")

BUCKETS: Final = 256
ALL_BUCKETS: Final = range(BUCKETS)

RESERVED: Final = ("$", "tidings_", "tidings.")
"""Streams and event types that begin so belong to the store and to Tidings; services never receive them."""

CARRIED: Final = Filter(exclude_stream_prefixes=RESERVED)
"""The part of `carried` that a store can evaluate."""

NESTING: Final = 500
"""Metadata with more opening brackets than this names no partition key."""

_KEY: Final = b'"partitionKey"'
# Integers are not read, only passed over: how long one may be is a setting of each interpreter, and all must find the
# same key.
_READER: Final = json.JSONDecoder(parse_int=len)


def bucket_of(key: str) -> int:
    """The bucket of a partition key."""
    return crc32(key.encode("utf-8", "surrogatepass")) & (BUCKETS - 1)


def partition_key(event: RecordedEvent, own: Mapping[str, Any] | None = None) -> str:
    """Metadata's `partitionKey` where it is a non-empty text, else the name of the stream.

    `own`, what `own_metadata` says of the event's metadata, spares reading that again. The answer depends on the bytes
    alone. A relay and a service that disagreed would do the event in two buckets, so what different interpreters read
    differently (nesting beyond `NESTING`, bytes that are no UTF-8) has no key.
    """
    if own is None or (len(event.metadata) > NESTING and deep(event.metadata)):
        return _partition_key(event.metadata, event.stream)
    return own.get("partitionKey") or event.stream


@lru_cache(maxsize=1)  # the relay asks twice for each event: for its bucket, and for its message
def _partition_key(metadata: bytes, stream: str) -> str:
    if _KEY not in metadata or deep(metadata):
        return stream
    if own := own_partition_key(metadata):
        return own
    try:
        document = _READER.decode(metadata.decode())
        key = document.get("partitionKey") if isinstance(document, dict) else None
        if isinstance(key, str) and key.encode():
            return key
    except ValueError:
        pass
    return stream


def deep(document: bytes) -> bool:
    """The JSON document may be nested deeper than every interpreter can read."""
    return len(document) > NESTING and document.count(b"{") + document.count(b"[") > NESTING


def carried(event: RecordedEvent, own: Mapping[str, Any] | None = None) -> int | None:
    """The bucket of an event that is carried to services, None for one that is not.

    Relay and healing pass share this function, so that they can never disagree about what must arrive. `own` is as
    for `partition_key`.
    """
    if event.stream.startswith(RESERVED) or event.type.startswith(RESERVED):
        return None
    return bucket_of(partition_key(event, own))


class Chain:
    """The relay's half: what to stamp, and what a marker may claim.

    `previous` may be too high (it costs a pass), never too low (it would hide a loss): for a bucket without history it
    is the position that the relay started from.
    """

    __slots__ = ("_base", "_last", "_start", "_touched")

    def __init__(self, start: int) -> None:
        self._start = self._base = start
        self._last: dict[int, int] = {}
        self._touched: dict[int, int] = {}

    def stamp(self, bucket: int, position: int) -> int:
        """The `previous` of the event about to be sent; call in log order."""
        previous = self._last.get(bucket, self._start)
        self._last[bucket] = position
        return previous

    def confirm(self, bucket: int, position: int) -> None:
        """The event and all before it are confirmed, or given up to be healed: the next marker names it."""
        self._touched[bucket] = position

    def mark(self, position: int) -> tuple[int, dict[int, int]]:
        """A marker for `position`: its base (the marker before), and the last positions of buckets touched since."""
        base, touched = self._base, self._touched
        self._base, self._touched = position, {}
        return base, touched


class Arrival(Enum):
    """What a service does with a message."""

    NEXT = "accept it"
    DUPLICATE = "acknowledge and drop it"
    GAP = "something is missing before it: start a pass over the log"


class Accepted:
    """A service's half: per bucket the position up to which everything was accepted (in a lane, or already handled).

    Volatile: made anew from the durable floor and watermarks whenever a process joins.
    """

    __slots__ = ("_tails", "buckets", "reached")

    def __init__(self, buckets: range, floor: int, watermarks: Mapping[int, int]) -> None:
        self.buckets = buckets
        self.begin(floor, watermarks)

    def begin(self, floor: int, watermarks: Mapping[int, int]) -> None:
        """Start again from what is durable, and forget everything that was accepted beyond it."""
        self.reached = floor
        """Everything at or below it was accepted in every bucket of the range; a pass begins here."""
        self._tails = {bucket: at for bucket, at in watermarks.items() if at > floor}

    def tail(self, bucket: int) -> int:
        return max(self._tails.get(bucket, -1), self.reached)

    def offer(self, bucket: int, position: int, previous: int) -> Arrival:
        """A message from the bus; `NEXT` has accepted it. One of another range's bucket is dropped like a duplicate."""
        tail = self.tail(bucket)
        if position <= tail or bucket not in self.buckets:
            return Arrival.DUPLICATE
        if previous > tail:
            return Arrival.GAP
        self._tails[bucket] = position
        return Arrival.NEXT

    def hear(self, position: int, base: int, touched: Mapping[int, int]) -> Arrival:
        """A marker; `NEXT` means that everything up to its position was accepted, so that it may become the floor."""
        if position <= self.reached:
            return Arrival.DUPLICATE
        if base > self.reached:
            return Arrival.GAP
        for bucket, last in touched.items():
            if bucket in self.buckets and self.tail(bucket) < last:
                return Arrival.GAP
        self.reach(position)
        return Arrival.NEXT

    def read(self, bucket: int, position: int) -> bool:
        """An event that a pass read from the log: True when it is new, and now accepted."""
        if bucket not in self.buckets or position <= self.reached or position <= self._tails.get(bucket, -1):
            return False
        self._tails[bucket] = position
        return True

    def reach(self, position: int) -> None:
        """Every bucket's tail is at least here: the log was read so far, found or not, or a marker said so."""
        if position > self.reached:
            self.reached = position
            if len(self._tails) > len(self.buckets) // 2:
                self._tails = {bucket: at for bucket, at in self._tails.items() if at > position}


class Lanes(Generic[T]):
    """One queue per bucket. A bucket's first item is given out alone; the next only when it was finished."""

    __slots__ = ("_items", "_size", "ready")

    def __init__(self) -> None:
        self._items: dict[int, deque[T]] = {}
        self._size = 0
        self.ready: deque[int] = deque()
        """Buckets of which `take` has something to give. To look at only."""

    def __len__(self) -> int:
        """Items in all lanes, those given out included."""
        return self._size

    def push(self, bucket: int, item: T) -> None:
        self._size += 1
        lane = self._items.get(bucket)
        if lane is None:
            self._items[bucket] = deque((item,))
            self.ready.append(bucket)
        else:
            lane.append(item)

    def take(self) -> tuple[int, T] | None:
        """The first item of the bucket that has waited longest; the bucket then rests until `finish` or `again`."""
        if not self.ready:
            return None
        bucket = self.ready.popleft()
        return bucket, self._items[bucket][0]

    def take_all(self) -> list[T]:
        """As `take`, of every bucket of which it has something to give."""
        items, ready = self._items, self.ready
        taken = [items[bucket][0] for bucket in ready]
        ready.clear()
        return taken

    def finish(self, bucket: int) -> None:
        """The item given out is done (or has left the lane for good)."""
        lane = self._items[bucket]
        lane.popleft()
        self._size -= 1
        if lane:
            self.ready.append(bucket)
        else:
            del self._items[bucket]

    def again(self, bucket: int) -> None:
        """The item given out was not done: it will be given out once more, before anything behind it."""
        self.ready.appendleft(bucket)

    def put_back(self, bucket: int, items: Sequence[T]) -> None:
        """These were finished too early, in this order; what the bucket has given out since is not done either. All of
        it is given out once more, before anything behind it."""
        self._items.setdefault(bucket, deque()).extendleft(reversed(items))
        self._size += len(items)
        if bucket not in self.ready:
            self.ready.appendleft(bucket)


class Ticket(Generic[T]):
    """One entry of `Window`. Whoever knows that it has ended says so: `done`."""

    __slots__ = ("done", "value")

    def __init__(self, value: T, done: bool) -> None:
        self.value = value
        self.done = done


class Window(Generic[T]):
    """Things that begin in order and end in any order: what has ended, up to the first that has not.

    Relay: events sent, ended by the broker's confirm. Service: messages taken, ended by a commit, with markers and
    pass positions between them that may become the floor when everything before them has ended.
    """

    __slots__ = ("_tickets",)

    def __init__(self) -> None:
        self._tickets: deque[Ticket[T]] = deque()

    def __len__(self) -> int:
        """Entries that `pop` has not given yet."""
        return len(self._tickets)

    @property
    def oldest(self) -> Ticket[T] | None:
        """The first that has not ended, once `pop` has taken those before it."""
        return self._tickets[0] if self._tickets else None

    def begin(self, value: T, *, done: bool = False) -> Ticket[T]:
        ticket = Ticket(value, done)
        self._tickets.append(ticket)
        return ticket

    def add(self, ticket: Ticket[T]) -> int:
        """Begin with a ticket that the caller has made; the number of entries."""
        self._tickets.append(ticket)
        return len(self._tickets)

    def pop(self) -> list[T]:
        """The values of the ended prefix, in order; each is given once."""
        tickets, values = self._tickets, []
        while tickets and tickets[0].done:
            values.append(tickets.popleft().value)
        return values
