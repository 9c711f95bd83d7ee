"""Who of a persistent subscription's consumers gets which event, how often, and what is done. Pure: no I/O, no clock.

EventStoreDB's rules: events that are tried again come before replayed ones, those before new ones; a consumer holds at
most as many unanswered events as it has slots; the checkpoint is what stands before the lowest unfinished event.
"""

from __future__ import annotations

import zlib
from bisect import insort
from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

from tidings.server.log import json_object
from tidings.server.wire import Resolved
from tidings.stores import RecordedEvent

__all__ = ["STRATEGIES", "Consumer", "Delivery", "Item", "Mark"]

STRATEGIES: Final = ("DispatchToSingle", "RoundRobin", "Pinned", "PinnedByCorrelation")
BUCKETS: Final = 1024


class Mark(NamedTuple):
    """How far a group has come: a version or position, and how many events were looked at until there."""

    at: int
    seen: int


class Item:
    """An event on its way through a group."""

    __slots__ = ("before", "due", "event", "link", "mark", "replayed", "retries", "size")

    def __init__(self, resolved: Resolved, mark: Mark, before: Mark, *, replayed: bool = False) -> None:
        self.event, self.link = resolved
        self.mark = mark
        self.before = before
        """What a checkpoint says while this one is unfinished."""
        self.replayed = replayed
        """It was parked once: it has nothing to do with the checkpoint."""
        self.retries = 0
        self.due = 0.0
        self.size = len(self.original.data) + len(self.original.metadata)

    @property
    def resolved(self) -> Resolved:
        return self.event, self.link

    @property
    def original(self) -> RecordedEvent:
        """The link, if there is one: what consumers answer for, and what the place in the source is."""
        original = self.link or self.event
        assert original is not None
        return original

    @property
    def shown(self) -> RecordedEvent:
        """What the consumer sees of it."""
        return self.event or self.original


class Consumer:
    """One connection to a group, with a number of slots."""

    def __init__(self, slots: int, name: str = "", peer: str = "", user: str = "") -> None:
        self.slots = slots
        self.name, self.peer, self.user = name, peer, user
        self.unanswered: dict[bytes, Item] = {}
        self.outbox: deque[Item] = deque()
        self.total = 0

    @property
    def room(self) -> int:
        return self.slots - len(self.unanswered)


class Delivery:
    """The state of a group's delivery. Consumers with something new in their outbox are in `told`."""

    def __init__(self, strategy: str, max_retries: int, timeout: float, start: Mark) -> None:
        self.strategy = strategy
        self.max_retries = max_retries
        self.timeout = timeout
        """Seconds until an unanswered event is tried again; 0: never."""
        self.consumers: list[Consumer] = []
        self.told: set[Consumer] = set()
        self.buffer: deque[Item] = deque()
        self.buffered_bytes = 0
        self.retries: list[Item] = []
        self.replays: deque[Item] = deque()
        self.parking: dict[int, Item] = {}
        self.reached = start
        """How far the source was read."""
        self._handed = start
        self._turn = -1 if strategy == "RoundRobin" else 0
        self._pins: dict[int, Consumer] = {}

    # ---- what comes in

    def offer(self, items: Iterable[Item], reached: Mark) -> None:
        for item in items:
            self.buffer.append(item)
            self.buffered_bytes += item.size
        self.reached = reached

    def replay(self, items: Iterable[Item]) -> None:
        self.replays.extend(items)

    def join(self, consumer: Consumer) -> None:
        self.consumers.append(consumer)

    def leave(self, consumer: Consumer) -> None:
        """Its unanswered events are tried again at once, however often they were tried before."""
        if consumer not in self.consumers:
            return
        place = self.consumers.index(consumer)
        del self.consumers[place]
        if place < self._turn or (place == self._turn and self.strategy == "RoundRobin"):
            self._turn -= 1  # so that nobody is passed over
        self.told.discard(consumer)
        self._pins = {bucket: owner for bucket, owner in self._pins.items() if owner is not consumer}
        for item in list(consumer.unanswered.values()):
            item.retries += 1
            self._again(item)
        consumer.unanswered.clear()
        consumer.outbox.clear()

    # ---- what goes out

    def dispatch(self, now: float) -> None:
        """Give out what can be given: first what is tried again, then what is replayed, then what is new."""
        if not any(consumer.room > 0 for consumer in self.consumers):
            return
        self.retries = self._given(self.retries, now)
        self.replays = deque(self._given(self.replays, now))
        held: list[Item] = []
        while self.buffer:
            item = self.buffer.popleft()
            self.buffered_bytes -= item.size
            if self._give(item, now):
                continue
            held.append(item)
            if not self.strategy.startswith("Pinned") or not any(consumer.room > 0 for consumer in self.consumers):
                break
        for item in reversed(held):
            self.buffer.appendleft(item)
            self.buffered_bytes += item.size

    def _given(self, items: Iterable[Item], now: float) -> list[Item]:
        return [item for item in items if not self._give(item, now)]

    def _give(self, item: Item, now: float) -> bool:
        consumer = self._chosen(item)
        id_ = item.original.id_bytes
        if consumer is None or consumer.room <= 0 or id_ in consumer.unanswered:
            return False
        consumer.unanswered[id_] = item
        consumer.outbox.append(item)
        consumer.total += 1
        item.due = now + self.timeout
        self.told.add(consumer)
        if not item.replayed and item.mark > self._handed:
            self._handed = item.mark
        return True

    def _chosen(self, item: Item) -> Consumer | None:
        if not self.consumers:
            return None
        if self.strategy.startswith("Pinned"):
            return self._pinned(item)
        count = len(self.consumers)
        # DispatchToSingle stays with one until it is full, RoundRobin goes on after each event.
        first = self._turn + (1 if self.strategy == "RoundRobin" else 0)
        for step in range(count):
            turn = (first + step) % count
            if self.consumers[turn].room > 0:
                self._turn = turn
                return self.consumers[turn]
        return None

    def _pinned(self, item: Item) -> Consumer:
        """The one that has the event's bucket; a bucket without one goes to whoever has the fewest."""
        bucket = zlib.crc32(self._key(item).encode()) % BUCKETS
        owner = self._pins.get(bucket)
        if owner is None:
            load = dict.fromkeys(self.consumers, 0)
            for consumer in self._pins.values():
                load[consumer] += 1
            owner = self._pins[bucket] = min(self.consumers, key=load.__getitem__)
        return owner

    def _key(self, item: Item) -> str:
        if self.strategy == "PinnedByCorrelation":
            correlation = json_object(item.shown.metadata).get("$correlationId")
            if isinstance(correlation, str) and correlation:
                return correlation
        if item.event is None and item.link is not None:
            return item.link.data.partition(b"@")[2].decode("utf-8", "replace")
        return item.shown.stream

    # ---- what is answered

    def done(self, consumer: Consumer, ids: Iterable[bytes]) -> None:
        """Acknowledged, or skipped. What the consumer does not hold is ignored."""
        for id_ in ids:
            consumer.unanswered.pop(id_, None)

    def retry(self, consumer: Consumer, ids: Iterable[bytes]) -> list[Item]:
        """Try again; answers those that were tried as often as allowed, and are now to be parked."""
        failed = (consumer.unanswered.pop(id_, None) for id_ in ids)
        return self._tried([item for item in failed if item is not None])

    def park(self, consumer: Consumer, ids: Iterable[bytes]) -> list[Item]:
        """Those of the events that the consumer holds; they are unfinished until `parked`."""
        items = [item for id_ in ids if (item := consumer.unanswered.pop(id_, None)) is not None]
        self.parking.update((id(item), item) for item in items)
        return items

    def parked(self, item: Item) -> None:
        self.parking.pop(id(item), None)

    def unparked(self, item: Item) -> None:
        """It could not be parked: it is tried again."""
        self.parking.pop(id(item), None)
        self._again(item)

    def expired(self, now: float) -> list[Item]:
        """As `retry`, for what was not answered in time."""
        if not self.timeout:
            return []
        late: list[Item] = []
        for consumer in self.consumers:
            for id_, item in list(consumer.unanswered.items()):
                if item.due <= now:
                    del consumer.unanswered[id_]
                    if item in consumer.outbox:
                        consumer.outbox.remove(item)
                    late.append(item)
        return self._tried(late)

    def _tried(self, items: list[Item]) -> list[Item]:
        exhausted = [item for item in items if item.retries >= self.max_retries]
        self.parking.update((id(item), item) for item in exhausted)
        for item in items:
            if item.retries < self.max_retries:
                item.retries += 1
                self._again(item)
        return exhausted

    def _again(self, item: Item) -> None:
        if item.replayed:
            self.replays.appendleft(item)
        else:
            insort(self.retries, item, key=lambda item: item.mark)

    # ---- how far it is

    @property
    def unanswered(self) -> int:
        return sum(len(consumer.unanswered) for consumer in self.consumers)

    def finished(self) -> Mark:
        """Everything up to here is done."""
        unfinished = [item for consumer in self.consumers for item in consumer.unanswered.values()]
        unfinished += self.retries
        unfinished += self.parking.values()
        lowest = min((item for item in unfinished if not item.replayed), key=lambda item: item.mark, default=None)
        if lowest is not None and self.buffer and self.buffer[0].mark < lowest.mark:
            lowest = self.buffer[0]  # pinned consumers are served past one that is full
        if lowest is not None:
            return lowest.before
        if self.buffer:
            return self.buffer[0].before
        return self.reached
