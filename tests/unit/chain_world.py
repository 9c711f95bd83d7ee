"""A small world of random faults around the real delivery rules: what they promise must hold whatever happens here.

A log with retention and a lagging replica; relays that crash, restart and compete; a broker that loses, repeats,
reorders and forgets; two partitions of one service over one durable ledger, whose consumers crash and become zombies.
The decisions are those of `tidings.position`; this module only moves things between them, one random step at a time.
`MUTANTS` has one world per rule in which that rule alone is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Final, NamedTuple
from uuid import UUID

from tidings.message import Marker, Stamped
from tidings.position import ALL_BUCKETS, Accepted, Chain, Lanes, Settled, Ticket, Verdict, carried
from tidings.stores import RecordedEvent

__all__ = ["MUTANTS", "SOUND", "Rules", "World", "outcome"]

LOG: Final = UUID(int=7)
PARTITIONS: Final = (range(128), range(128, 256))
WINDOW: Final = 4
LAST_TURNS: Final = 4000


class Fenced(Exception):
    """Somebody else moved a watermark: the consumer goes, and another joins."""


class Happened(NamedTuple):
    position: int
    bucket: int


# ---- the durable parts ---------------------------------------------------------------


class Log:
    """Positions rise and are never used twice; retention removes events anywhere; a replica shows a prefix."""

    def __init__(self) -> None:
        self.events: list[RecordedEvent] = []
        self.head = self.replicated = -1

    def append(self, position: int, stream: str, metadata: bytes = b"") -> None:
        self.head = position
        self.events.append(RecordedEvent(position, stream, 0, "Happened", b"{}", metadata, True, LOG.bytes, 0))

    def after(self, position: int) -> RecordedEvent | None:
        return next((event for event in self.events if event.position > position), None)


class Ledger:
    """The service's database: watermarks per bucket, floors per range, and the effects that the promises are about."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.watermarks = dict.fromkeys(ALL_BUCKETS, -1)
        self.floors: dict[range, int] = {}
        self.effects: list[Happened] = []
        self.false_floors: list[int] = []

    def floor(self, buckets: range) -> int:
        return self.floors.get(buckets, -1)

    def commit(self, moves: Mapping[int, tuple[int, int]], effects: list[Happened]) -> None:
        """All or nothing: compare and set."""
        if any(self.watermarks[bucket] != known for bucket, (known, _) in moves.items()):
            raise Fenced
        self.watermarks |= {bucket: position for bucket, (_, position) in moves.items()}
        self.effects += effects

    def raise_floor(self, buckets: range, position: int) -> None:
        if position > self.floor(buckets):
            self.floors[buckets] = position
            if self.unhandled(buckets, position):
                self.false_floors.append(position)

    def unhandled(self, buckets: range, upto: int) -> set[int]:
        done = {position for position, _ in self.effects}
        expected = {event.position for event in self.log.events if event.position <= upto and carried(event) in buckets}
        return expected - done


class Broker:
    """A queue per partition. Everything it can do wrong it does, until it is calm."""

    def __init__(self, random: Random) -> None:
        self.random, self.calm = random, False
        self.queues: dict[range, list[Stamped | Marker]] = {buckets: [] for buckets in PARTITIONS}

    def send(self, message: Stamped | Marker) -> None:
        for buckets, queue in self.queues.items():
            if isinstance(message, Stamped) and message.bucket not in buckets:
                continue
            fault = 0.5 if self.calm else self.random.random()
            if fault < 0.08:
                continue
            queue.insert(self.random.randint(0, len(queue)) if fault < 0.14 else len(queue), message)
            if fault > 0.92:
                queue.append(message)


# ---- the processes -------------------------------------------------------------------


class Relay:
    """Sends what it reads within a window, learns of confirms in any order, and now and then says how far it came."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sent = self.confirmed = world.checkpoint
        self.chain = world.rules.chain(self.confirmed)
        self.window: Settled[Happened | int] = Settled()
        self.open: list[Ticket[Happened | int]] = []

    def step(self) -> None:
        choice = self.world.random.random()
        if choice < 0.15:
            self.mark()
        elif choice < 0.5 and self.open:
            self.confirm(self.open.pop(self.world.random.randrange(len(self.open))))
        elif len(self.open) < WINDOW:
            self.forward()

    def forward(self) -> bool:
        event = self.world.log.after(self.sent)
        if event is None:
            return False
        self.sent = event.position
        bucket = carried(event)
        if bucket is None:
            self.confirm(self.window.begin(event.position))
            return True
        previous = self.chain.stamp(bucket, event.position)
        ticket = self.window.begin(Happened(event.position, bucket))
        if not self.world.broker.calm and self.world.random.random() < 0.03:
            self.confirm(ticket)  # the broker refuses this event for what it is: left out, to be healed
        else:
            self.world.broker.send(Stamped(LOG, previous, bucket, event))
            self.open.append(ticket)
        return True

    def confirm(self, ticket: Ticket[Happened | int]) -> None:
        self.window.end(ticket)
        for value in self.window.pop():
            if isinstance(value, Happened):
                self.chain.confirm(value.bucket, value.position)
            self.confirmed = value.position if isinstance(value, Happened) else value

    def mark(self) -> None:
        self.world.checkpoint = self.confirmed  # without a fence: a rival may move it back
        self.world.broker.send(Marker(LOG, self.confirmed, *self.chain.mark(self.confirmed)))

    def finish(self) -> None:
        while self.forward():
            pass
        while self.open:
            self.confirm(self.open.pop())
        self.mark()


class Step(NamedTuple):
    """What may be done when everything before it is settled."""

    floor: int = -1
    tag: int = -1


class Item(NamedTuple):
    happened: Happened
    ticket: Ticket[Step]


class Consumer:
    """One partition's process: what it accepted is volatile, what it committed is not."""

    def __init__(self, world: World, buckets: range) -> None:
        self.world, self.buckets = world, buckets
        self.watermarks = {bucket: at for bucket, at in world.ledger.watermarks.items() if bucket in buckets}
        self.floor = self.stored = world.ledger.floor(buckets)
        self.accepted = world.rules.accepted(buckets, self.floor, self.watermarks)
        self.lanes: Lanes[Item] = Lanes()
        self.settled: Settled[Step] = world.rules.settled()
        self.given_out: list[tuple[int, Item]] = []
        self.finished: list[Item] = []
        self.unsettled: dict[int, Stamped | Marker] = {}
        self.tag = 0
        self.healing: Iterator[None] | None = None
        self.upto = -1

    @property
    def resting(self) -> bool:
        return not (len(self.lanes) or len(self.settled) or self.finished or self.healing or self.floor > self.stored)

    def take(self) -> None:
        queue = self.world.broker.queues[self.buckets]
        if not queue:
            return
        message = queue.pop(0)
        self.tag += 1
        self.unsettled[self.tag] = message
        step = Step(tag=self.tag)
        if isinstance(message, Marker):
            position = message.position
            if self.healing is None:
                verdict = self.accepted.hear(position, message.base, message.touched)
                step = step._replace(floor=position) if verdict is Verdict.NEXT else step
        else:
            position = message.event.position
            if self.healing is None:
                verdict = self.accepted.offer(message.bucket, position, message.previous)
                if verdict is Verdict.NEXT:
                    self.accept(Happened(position, message.bucket), step)
                    return
        self.settled.begin(step, done=True)
        if self.healing is not None or verdict is Verdict.GAP:
            # Forgotten: it only says how far the log must be read.
            self.upto = max(self.upto, position)
            self.healing = self.healing or self.heal()

    def accept(self, happened: Happened, step: Step) -> None:
        self.lanes.push(happened.bucket, Item(happened, self.settled.begin(step)))

    def heal(self) -> Iterator[None]:
        """The pass, as `tidings.healing` does it, interrupted after each event."""
        log, accepted, rules = self.world.log, self.accepted, self.world.rules
        while accepted.reached < self.upto:
            head, at = log.replicated, accepted.reached
            while (event := log.after(at)) is not None and event.position <= head:
                at, bucket = event.position, carried(event)
                if bucket is not None and accepted.read(bucket, at):
                    self.accept(Happened(at, bucket), Step())
                if self.world.random.random() < 0.2:
                    accepted.reach(at)
                    self.settled.begin(Step(floor=at), done=True)
                yield
            end = head if rules.pass_reaches else self.upto
            accepted.reach(end)
            self.settled.begin(Step(floor=end), done=True)
            yield

    def work(self) -> None:
        random = self.world.random
        if self.healing is not None and random.random() < 0.7 and next(self.healing, self) is self:
            self.healing = None
        while random.random() < 0.6 and (taken := self.lanes.take()) is not None:
            self.given_out.append(taken)
        if self.given_out:
            bucket, item = self.given_out.pop(random.randrange(len(self.given_out)))
            if random.random() < 0.1:
                self.lanes.again(bucket)
            else:
                self.finished.append(item)
                self.lanes.finish(bucket)
        if random.random() < 0.5:
            self.commit()

    def commit(self) -> None:
        """One transaction for all that finished since the last. Raises `Fenced`."""
        done, self.finished = self.finished, []
        moves = {item.happened.bucket: (self.watermarks[item.happened.bucket], item.happened.position) for item in done}
        self.world.ledger.commit(moves, [item.happened for item in done])
        self.watermarks |= {bucket: position for bucket, (_, position) in moves.items()}
        if self.floor > self.stored:
            self.world.ledger.raise_floor(self.buckets, self.floor)
            self.stored = self.floor
        for item in done:
            self.settled.end(item.ticket)
        for step in self.settled.pop():
            self.floor = max(self.floor, step.floor)
            self.unsettled = {tag: message for tag, message in self.unsettled.items() if tag > step.tag}

    def crash(self) -> None:
        """What was not settled comes again."""
        self.world.broker.queues[self.buckets][:0] = self.unsettled.values()


# ---- the rules, each to be left out --------------------------------------------------


@dataclass(frozen=True)
class Rules:
    chain: type[Chain] = Chain
    accepted: type[Accepted] = Accepted
    settled: type[Settled[Step]] = Settled
    ledger: type[Ledger] = Ledger
    pass_reaches: bool = True


SOUND: Final = Rules()


class _LowPrevious(Chain):
    def stamp(self, bucket: int, position: int) -> int:
        known = bucket in self._last
        previous = super().stamp(bucket, position)
        return previous if known else -1


class _BlindToGaps(Accepted):
    def offer(self, bucket: int, position: int, previous: int) -> Verdict:
        return super().offer(bucket, position, -1)


class _BlindToTouched(Accepted):
    def hear(self, position: int, base: int, touched: Mapping[int, int]) -> Verdict:
        return super().hear(position, base, {})


class _BlindToBase(Accepted):
    def hear(self, position: int, base: int, touched: Mapping[int, int]) -> Verdict:
        return super().hear(position, -1, touched)


class _Impatient(Settled[Step]):
    def pop(self) -> list[Step]:
        ended = [ticket for ticket in self._tickets if ticket.done]
        for ticket in ended:
            self._tickets.remove(ticket)
        return [ticket.value for ticket in ended]


class _Overwriting(Ledger):
    def commit(self, moves: Mapping[int, tuple[int, int]], effects: list[Happened]) -> None:
        super().commit({bucket: (self.watermarks[bucket], at) for bucket, (_, at) in moves.items()}, effects)


class _OneFloorForAll(Ledger):
    def floor(self, buckets: range) -> int:
        return super().floor(ALL_BUCKETS)

    def raise_floor(self, buckets: range, position: int) -> None:
        super().raise_floor(ALL_BUCKETS, position)


MUTANTS: Final = {
    "gap": replace(SOUND, accepted=_BlindToGaps),
    "marker": replace(SOUND, accepted=_BlindToTouched),
    "base": replace(SOUND, accepted=_BlindToBase),
    "watermark_cas": replace(SOUND, ledger=_Overwriting),
    "range_floor": replace(SOUND, ledger=_OneFloorForAll),
    "previous_never_low": replace(SOUND, chain=_LowPrevious),
    "floor_waits": replace(SOUND, settled=_Impatient),
    "pass_reaches": replace(SOUND, pass_reaches=False),
}


# ---- the world -----------------------------------------------------------------------

STREAMS: Final = ("order-1", "order-2", "payment-1", "stock-1", "tidings_relay-main", "$settings")


@dataclass
class World:
    random: Random
    rules: Rules = SOUND
    checkpoint: int = -1
    relays: list[Relay] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.log = Log()
        self.ledger = self.rules.ledger(self.log)
        self.broker = Broker(self.random)
        self.relays.append(Relay(self))
        self.consumers += [Consumer(self, buckets) for buckets in PARTITIONS]

    def happen(self) -> None:
        """One random step of one random part."""
        random, log = self.random, self.log
        chance = random.random()
        if chance < 0.22:
            keyed = random.random() < 0.2
            metadata = b'{"partitionKey":"%d"}' % random.randrange(2) if keyed else b""
            log.append(max(log.head, 0) + random.randint(1, 5), random.choice(STREAMS), metadata)
        elif chance < 0.27:
            log.replicated = random.randint(log.replicated, log.head)
        elif chance < 0.52 and self.relays:
            random.choice(self.relays).step()
        elif chance < 0.72:
            random.choice(self.consumers).take()
        elif chance < 0.92:
            self.guarded(random.choice(self.consumers))
        elif chance < 0.94:
            self.relays.append(Relay(self))  # restarted, or a rival
        elif chance < 0.955 and self.relays:
            self.relays.pop(random.randrange(len(self.relays)))
        elif chance < 0.97:
            self.consumers.append(Consumer(self, random.choice(PARTITIONS)))  # the one before is a zombie now
        elif chance < 0.985:
            self.replace(random.choice(self.consumers))
        elif chance < 0.99:
            random.choice(list(self.broker.queues.values())).clear()
        elif log.events:
            log.events.pop(random.randrange(len(log.events)))

    def guarded(self, consumer: Consumer) -> None:
        try:
            consumer.work()
        except Fenced:
            self.replace(consumer)

    def replace(self, consumer: Consumer) -> None:
        consumer.crash()
        self.consumers.remove(consumer)
        if not any(other.buckets == consumer.buckets for other in self.consumers):
            self.consumers.append(Consumer(self, consumer.buckets))

    def come_to_rest(self) -> None:
        """No new faults: one consumer per partition, one fresh relay, a broker that works."""
        newest = {consumer.buckets: consumer for consumer in self.consumers}
        for zombie in set(self.consumers) - set(newest.values()):
            self.replace(zombie)
        self.broker.calm = True
        self.log.replicated = self.log.head
        relay = Relay(self)
        relay.finish()
        for turn in range(LAST_TURNS):
            for consumer in list(self.consumers):
                consumer.take()
                self.guarded(consumer)
            quiet = not any(self.broker.queues.values()) and all(consumer.resting for consumer in self.consumers)
            if quiet and all(self.ledger.floor(buckets) >= relay.confirmed for buckets in PARTITIONS):
                return
            if turn % 100 == 99:
                relay.mark()  # an idle relay goes on: what a consumer forgot when it was fenced is found out by this
        raise AssertionError("the world does not come to rest")


def outcome(seed: int, rules: Rules = SOUND) -> str:
    """Live through one world: 'kept', or the promise that was broken."""
    random = Random(seed)
    world = World(random, rules)
    for _ in range(random.randint(50, 400)):
        world.happen()
    world.come_to_rest()
    positions = [position for position, _ in world.ledger.effects]
    if len(positions) != len(set(positions)):
        return "an effect happened twice"
    if world.ledger.unhandled(ALL_BUCKETS, world.log.head):
        return "an effect is missing"
    for bucket in {bucket for _, bucket in world.ledger.effects}:
        order = [at for at, of in world.ledger.effects if of == bucket]
        if order != sorted(order):
            return "effects of one bucket are out of order"
    if rules is SOUND and world.ledger.false_floors:
        return "a floor was stored above something that was not settled"
    return "kept"
