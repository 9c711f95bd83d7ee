"""The rules behind the promises. Each can be left out of the real classes, and then a promise must break.

Production code cannot reach this module. Each rule replaces one decision of one class while a simulation runs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final
from unittest.mock import patch

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.buses import Consumer, Delivery
from tidings.database.enrolment import Enrolment
from tidings.database.floors import Floor
from tidings.database.notes import Notes
from tidings.database.partials import Partials
from tidings.database.receipts import Receipts, Written
from tidings.database.staged_events import StagedEvent
from tidings.database.tables import floors, watermarks
from tidings.database.watermarks import Watermarks
from tidings.delivery.claims import Sought
from tidings.delivery.head_check import HeadCheck
from tidings.delivery.healing import Pass
from tidings.delivery.inflight import InFlight
from tidings.delivery.intake import Intake
from tidings.delivery.keys import Keys
from tidings.delivery.lanes import EventLanes
from tidings.delivery.own_clock import OwnClock
from tidings.delivery.resolution import Place, Resolver, _Part
from tidings.delivery.savepoint import _Scope
from tidings.delivery.seating import Group, Seating
from tidings.delivery.seats import Seat
from tidings.delivery.staged import Stager
from tidings.errors import BusError, StreamNotFound
from tidings.modelling.handlers import Handler
from tidings.modelling.roster import Roster
from tidings.protocol.identity import IdKeys
from tidings.protocol.message import Message
from tidings.protocol.position import Accepted, Arrival, Chain, Window
from tidings.relay.checkpoints import Checkpointed
from tidings.relay.relay import Relay
from tidings.stores import NO_STREAM, RecordedEvent
from tidings.testing.simulation.bus import SimulatedBroker, SimulatedBus

__all__ = ["RULES", "SAVING", "without"]

Patches = Iterator[tuple[type[Any], str, Any]]


def _gap() -> Patches:
    offer = Accepted.offer

    def blind(self: Accepted, bucket: int, position: int, previous: int) -> Arrival:
        return offer(self, bucket, position, -1)

    yield Accepted, "offer", blind


def _head_check() -> Patches:
    def knows(self: HeadCheck[Any], position: int) -> bool:
        return True

    yield HeadCheck, "knows", knows


def _marker() -> Patches:
    hear = Accepted.hear

    def blind(self: Accepted, position: int, base: int, touched: Mapping[int, int]) -> Arrival:
        return hear(self, position, base, {})

    yield Accepted, "hear", blind


def _base() -> Patches:
    hear = Accepted.hear

    def blind(self: Accepted, position: int, base: int, touched: Mapping[int, int]) -> Arrival:
        return hear(self, position, -1, touched)

    yield Accepted, "hear", blind


def _watermark_cas() -> Patches:
    async def overwrite(
        self: Watermarks,
        connection: AsyncConnection,
        moves: Mapping[int, tuple[int, int]],
        receipts: Mapping[int, Written],
        passed: Mapping[int, tuple[int, Written]],
    ) -> None:
        told = {**receipts, **{bucket: written for bucket, (_, written) in passed.items()}}
        for bucket in {*moves, *told}:
            of_bucket = (watermarks.c.service == self._scope.service, watermarks.c.bucket == bucket)
            values: dict[str, object] = {"position": moves[bucket][1]} if bucket in moves else {}
            if bucket in told:
                values |= dict(zip(("receipt_at", "receipt"), told[bucket], strict=True))
            await connection.execute(watermarks.update().where(*of_bucket).values(values))

    yield Watermarks, "move", overwrite


def _range_floor() -> Patches:
    async def of_all(self: Floor, connection: AsyncConnection, position: int) -> None:
        lower = (floors.c.service == self._scope.service, floors.c.position < position)
        await connection.execute(floors.update().where(*lower).values(position=position))

    yield Floor, "raise_to", of_all


def _previous_never_low() -> Patches:
    stamp = Chain.stamp

    def low(self: Chain, bucket: int, position: int) -> int:
        known = bucket in self._last
        previous = stamp(self, bucket, position)
        return previous if known else -1

    yield Chain, "stamp", low


def _floor_waits() -> Patches:
    pop = Window.pop

    def impatient(self: Window[Any]) -> list[Any]:
        if self.oldest is None or _of_a_relay(self.oldest.value):
            return pop(self)
        ended = [ticket for ticket in self._tickets if ticket.done]
        for ticket in ended:
            self._tickets.remove(ticket)
        return [ticket.value for ticket in ended]

    yield Window, "pop", impatient


def _of_a_relay(value: object) -> bool:
    """Return whether a ticket is a relay's, with a bucket and a position, and not a service's."""
    return type(value) is tuple


def _pass_reaches() -> Patches:
    heal = Pass._heal

    class Boastful:
        """A store that claims to have reached whatever position it is asked for."""

        def __init__(self, healing: Pass) -> None:
            self.healing = healing
            self.store = healing._store

        async def head(self) -> int:
            return max(await self.store.head(), self.healing._upto)

        def read_all(self, **options: Any) -> AsyncIterator[Any]:
            return self.store.read_all(**options)

    async def believing(self: Pass) -> None:
        store = self._store
        self._store = Boastful(self)  # type: ignore[assignment]
        try:
            await heal(self)
        finally:
            self._store = store

    yield Pass, "_heal", believing


def _followers_wait() -> Patches:
    def never(self: Keys, item: InFlight) -> bool:
        return False

    yield Keys, "must_wait", never


def _failed_is_undone() -> Patches:
    async def keep(self: _Scope) -> None:
        await self.keep()

    yield _Scope, "undo", keep


def _staged_is_looked_for() -> Patches:
    async def resolve(self: Resolver, row: StagedEvent, actual: int) -> Place:
        try:
            async for event in self._store.read_stream(row.stream, backwards=True):
                return Place(event.version, row.event.id)
        except StreamNotFound:
            pass
        return Place(NO_STREAM, row.event.id)

    yield Resolver, "resolve", resolve


def _fresh_for_the_log() -> Patches:
    def for_this_database(self: Stager, staged: StagedEvent) -> bool:
        return True

    yield Stager, "_is_new_to_log", for_this_database


def _ids_are_keyed() -> Patches:
    def none(self: IdKeys, cause: int | None = None) -> tuple[bytes, ...]:
        return (b"",)

    yield IdKeys, "secrets", none


def _former_keys_are_known() -> Patches:
    def the_first(self: IdKeys, cause: int | None = None) -> tuple[bytes, ...]:
        return (self.keys[0].secret,)

    yield IdKeys, "secrets", the_first


def _foreign_is_another_event() -> Patches:
    def by_its_id(self: Sought, event: RecordedEvent) -> bool:
        return event.id_bytes in self.ids

    def holds_the_id(self: _Part, sought: Sought) -> bool:
        return any(identity in self.ids for identity in sought.ids)

    yield Sought, "is_it", by_its_id
    yield _Part, "holds", holds_the_id


def _settled_is_not_under_way() -> Patches:
    async def nothing(self: Notes, connection: AsyncConnection, names: object = None) -> None:
        pass

    yield Notes, "forget_settled", nothing


def _acknowledged_late() -> Patches:
    take = Intake.take

    def hasty(self: Intake, consumer: Consumer, delivery: Delivery) -> None:
        take(self, consumer, delivery)
        consumer.settle_through(delivery.tag)

    yield Intake, "take", hasty


def _checkpoint() -> Patches:
    async def none(self: Relay) -> Checkpointed:
        return Checkpointed()

    yield Relay, "last", none


def _one_leads() -> Patches:
    publisher = SimulatedBus.publisher

    def unlocked(self: SimulatedBus, *, lock: str | None = None) -> Any:
        return publisher(self)

    yield SimulatedBus, "publisher", unlocked


def _parts_are_noted() -> Patches:
    async def none(self: Partials, connection: AsyncConnection, rows: object) -> None:
        return None

    yield Partials, "add", none


def _behind_waits() -> Patches:
    handlers = Roster.handlers

    def all_of_them(self: Roster, kind: str, bucket: int, position: int) -> tuple[Handler, ...]:
        spans, self.spans = self.spans, {}
        try:
            return handlers(self, kind, bucket, position)
        finally:
            self.spans = spans

    yield Roster, "handlers", all_of_them


def _undone_runs_again() -> Patches:
    undo = EventLanes.undo

    def forget(
        self: EventLanes, finished: Iterable[InFlight], begun: Iterable[InFlight], parked: Iterable[int]
    ) -> None:
        undo(self, (), begun, parked)

    yield EventLanes, "undo", forget


def _behind_undone_is_recalled() -> Patches:
    def never(self: Seating, group: Group) -> list[Seat]:
        return [seat for seat in seats_of(self, group) if seat.is_over]

    seats_of = Seating.seats_of
    yield Seating, "seats_of", never


def _older_code_is_fenced() -> Patches:
    async def let_on(self: Enrolment) -> None:
        """Leave the processes alone that run the code of before."""

    def nothing(self: Watermarks) -> None:
        """Know that nobody was fenced."""

    yield Enrolment, "fence", let_on
    yield Watermarks, "fenced_others", nothing


def _held_emits_alone() -> Patches:
    async def let_on(self: Watermarks, connection: AsyncConnection, buckets: Collection[int]) -> None:
        """Leave the processes alone that know nothing of what is staged."""

    def nothing(self: Watermarks, buckets: Collection[int]) -> None:
        """Know that nobody was fenced."""

    yield Watermarks, "fence_rivals", let_on
    yield Watermarks, "fenced_rivals", nothing


def _operators_fence() -> Patches:
    move = Watermarks.move

    async def forgiving(
        self: Watermarks, connection: AsyncConnection, moves: Mapping[int, tuple[int, int]], *receipts: Any
    ) -> None:
        """Move watermarks whatever operators have said since this process joined."""
        rows = sa.select(watermarks.c.bucket, watermarks.c.replays).where(*self._scope.of_log(watermarks))
        self._replays |= {row.bucket: row.replays for row in await connection.execute(rows)}
        await move(self, connection, moves, *receipts)

    async def nothing(self: Watermarks, connection: AsyncConnection, *, locking: bool = True) -> None:
        """Let a process go on that operators have fenced."""

    yield Watermarks, "move", forgiving
    yield Watermarks, "fence", nothing


def _own_clock() -> Patches:
    async def never(self: OwnClock, *, chosen: bool) -> int | None:
        return None

    yield OwnClock, "due", never


def _nothing_is_passed_over() -> Patches:
    offer, read = Accepted.offer, Accepted.read

    def deaf(self: Accepted, bucket: int, position: int, previous: int) -> Arrival:
        """Take some events for duplicates: a bug."""
        arrival = offer(self, bucket, position, previous)
        return Arrival.DUPLICATE if arrival is Arrival.NEXT and position % 7 == 3 else arrival

    def blind(self: Accepted, bucket: int, position: int) -> bool:
        return read(self, bucket, position) and position % 7 != 3

    yield Accepted, "offer", deaf
    yield Accepted, "read", blind


def _content_of_the_log() -> Patches:
    publish = SimulatedBroker.publish

    def forged(self: SimulatedBroker, message: Message) -> BusError | None:
        """Let somebody come before the relay with other content for some events that the log holds. Handlers do with it
        what they would have done."""
        if message.headers.get("tidings-position", 0) % 5 == 3:
            publish(self, replace(message, body=message.body + b" "))
        return publish(self, message)

    yield SimulatedBroker, "publish", forged


def _receipts_with_the_floor() -> Patches:
    def nothing(self: Receipts) -> dict[int, Written]:
        """Store the floor without what has gone by up to there."""
        return {}

    yield Receipts, "due", nothing


RULES: Final[dict[str, Callable[[], Patches]]] = {
    "gap": _gap,
    "head_check": _head_check,
    "marker": _marker,
    "base": _base,
    "watermark_cas": _watermark_cas,
    "range_floor": _range_floor,
    "previous_never_low": _previous_never_low,
    "floor_waits": _floor_waits,
    "pass_reaches": _pass_reaches,
    "followers_wait": _followers_wait,
    "failed_is_undone": _failed_is_undone,
    "staged_is_looked_for": _staged_is_looked_for,
    "fresh_for_the_log": _fresh_for_the_log,
    "ids_are_keyed": _ids_are_keyed,
    "former_keys_are_known": _former_keys_are_known,
    "foreign_is_another_event": _foreign_is_another_event,
    "settled_is_not_under_way": _settled_is_not_under_way,
    "parts_are_noted": _parts_are_noted,
    "behind_waits": _behind_waits,
    "undone_runs_again": _undone_runs_again,
    "behind_undone_is_recalled": _behind_undone_is_recalled,
    "older_code_is_fenced": _older_code_is_fenced,
    "held_emits_alone": _held_emits_alone,
    "operators_fence": _operators_fence,
    "own_clock": _own_clock,
    "nothing_is_passed_over": _nothing_is_passed_over,
    "content_of_the_log": _content_of_the_log,
    "receipts_with_the_floor": _receipts_with_the_floor,
}
"""Rules without which a promise breaks."""

SAVING: Final[dict[str, Callable[[], Patches]]] = {
    "acknowledged_late": _acknowledged_late,
    "checkpoint": _checkpoint,
    "one_leads": _one_leads,
}
"""Rules that only save work: without them every promise holds, but there are more passes or messages."""


@contextmanager
def without(rule: str | None) -> Iterator[None]:
    """Leave a rule of `RULES` or `SAVING` out of the real classes within the block."""
    with ExitStack() as stack:
        if rule is not None:
            for owner, name, instead in (RULES | SAVING)[rule]():
                stack.enter_context(patch.object(owner, name, instead))
        yield
