"""The promises that hold in every world at its end: nothing lost, nothing twice, in order, emitted exactly once."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from uuid import UUID

import sqlalchemy as sa

from tidings.database.engine import Database
from tidings.database.inbox import Inbox
from tidings.database.tables import dead, floors
from tidings.modelling.events import Event, wire_name
from tidings.protocol.position import partition_key
from tidings.testing.simulation.service import LATE, SECOND, Answered, Asked, Called, Counted, Fragile, Ignored, audit
from tidings.testing.simulation.world import World

__all__ = ["broken"]


async def _noted(database: Database) -> set[int]:
    """Return the events that the next process to take over would find noted as under way. A row may outlive its event
    until then."""
    found = set[int]()
    async with database.turn, database.transaction() as connection:
        for part in (await connection.execute(sa.select(floors))).all():
            buckets = range(part.first_bucket, part.last_bucket + 1)
            found |= (await Inbox(database, part.service, UUID(part.log), buckets).notes.read(connection)).keys()
    return found


async def broken(world: World) -> list[str]:
    """Return the promises that were broken, in words."""
    seat = world.databases.seat(None)
    try:
        async with seat.database.reading() as connection:
            rows = (await connection.execute(sa.select(audit.c.position, audit.c.handler).order_by(audit.c.id))).all()
            columns = (dead.c.kind, dead.c.position, dead.c.reason)
            letters = [tuple(row) for row in await connection.execute(sa.select(*columns))]
        notes = await _noted(seat.database)
    finally:
        await seat.close()
    found = [
        f"dead for no good reason: {kind}, {reason}"
        for kind, position, reason in letters
        if kind != "handler" or position not in world.skipped
    ]
    found += _skipped(world, [(row.position, row.handler) for row in rows])
    effects = [row.position for row in rows if row.handler not in (SECOND, LATE)]
    found += _effects(world, effects)
    found += _emitted(world, frozenset(effects))
    found += _emitted_in_order(world)
    if kept := sorted(notes - world.log.removed):
        found.append(f"noted as under way, though done: {kept}")
    for name, kinds in ((SECOND, (Counted, Fragile)), (LATE, (Counted, Asked))):
        found += _of_one(world, name, [row.position for row in rows if row.handler == name], kinds)
    counted = {event.position for event in world.log.events if event.type == wire_name(Counted)}
    if unheard := sorted(counted - world.desk.heard - world.log.removed - world.skipped.keys()):
        found.append(f"lost, for a second handler without a session: {unheard}")
    found += [f"contradicted by the log: {text}" for text in world.contradictions if not _removed(world, text)]
    found += world.died
    found += [f"nobody looked at this: {complaint}" for complaint in world.loop.complaints]
    return found


def _removed(world: World, text: str) -> bool:
    """Whether the log contradicts something only because an event was removed. Streams of a world do not say that they
    have a retention, so that nobody else can know."""
    return bool(world.log.removed) and not text.endswith(("skipped", "replaced", "out of order", "twice"))


def _skipped(world: World, effects: list[tuple[int, str]]) -> Iterator[str]:
    """Check that no handler had an effect for an event after an operator had skipped it. A handler that begins later
    is given its past by itself."""
    for position, handler in effects:
        done = world.skipped.get(position)
        if done is not None and handler not in done and handler != LATE:
            yield f"skipped, but handled: {position} by {handler}"


def _effects(world: World, effects: list[int]) -> Iterator[str]:
    twice = [position for position, times in Counter(effects).items() if times > 1]
    if twice:
        yield f"handled twice: {twice}"
    own = [event for event in world.log.events if not event.stream.startswith(("tidings_", "$"))]
    done = set(effects)
    expected = {event.position for event in own if event.type not in (wire_name(Called), wire_name(Ignored))}
    may_lack = world.log.removed | world.skipped.keys()
    lost = sorted(expected - done - may_lack)
    called = {event.position for event in own if event.type == wire_name(Called)}
    lost += sorted(called - set(world.desk.calls) - may_lack)
    if lost:
        yield f"lost: {lost}"
    if done - expected:
        yield f"never appended, but handled: {sorted(done - expected)}"
    yield from _order(world, effects, "handled out of order")


def _of_one(world: World, name: str, effects: list[int], kinds: tuple[type[Event], ...]) -> Iterator[str]:
    """Check a handler that has an order of its own."""
    if twice := [position for position, times in Counter(effects).items() if times > 1]:
        yield f"handled twice by {name}: {twice}"
    expected = {event.position for event in world.log.events if event.type in map(wire_name, kinds)}
    if lost := sorted(expected - set(effects) - world.log.removed - world.skipped.keys()):
        yield f"lost for {name}: {lost}"
    yield from _order(world, effects, f"handled out of order by {name}")


def _order(world: World, effects: list[int], broken: str) -> Iterator[str]:
    keys = {event.position: partition_key(event) for event in world.log.events}
    orders = defaultdict(list)
    for position in effects:
        # What was skipped in a database that is lost, an operator retries: later events of its key went on meanwhile.
        if position not in world.skipped or world.skipped[position] is not None:
            orders[keys.get(position)].append(position)
    for key, order in orders.items():
        if order != sorted(order):
            yield f"{broken} in {key}: {order}"


def _emitted_in_order(world: World) -> Iterator[str]:
    """Check that events with one partition key had their emitted events appended in their own order.

    A service that has lost its database handles events again that have emitted before, and appends what was lost last.
    """
    if world.lives > 1:
        return
    causes = {str(event.id): event for event in world.log.events}
    orders = defaultdict(list)
    for event in world.log.events:
        if event.type == wire_name(Answered):
            cause = causes[json.loads(event.metadata)["$causationId"]]
            orders[partition_key(cause)].append(cause.position)
    for key, order in orders.items():
        if order != sorted(order):
            yield f"emitted out of order in {key}: {order}"


def _emitted(world: World, effects: frozenset[int]) -> Iterator[str]:
    causes: Counter[str] = Counter()
    # After a loss of the database, only events that are in the log, and were not skipped, can be handled again.
    gone = world.log.removed | world.skipped.keys() if world.lives > 1 else frozenset()
    for event in world.log.events:
        if event.type == wire_name(Answered):
            causes[json.loads(event.metadata)["$causationId"]] += 1
    may_lack = world.log.removed | world.skipped.keys()
    for event in world.log.events:
        if event.type not in (wire_name(Asked), wire_name(Called)):
            continue
        times = causes[str(event.id)]
        if times > 1:
            yield f"what {event.position} emitted was appended {times} times"
        elif times == 0 and (event.position in effects or event.position not in may_lack):
            yield f"what {event.position} emitted is lost"
        elif times == 1 and event.type == wire_name(Asked) and event.position not in effects | gone:
            yield f"{event.position} emitted something though its effects were rolled back"
