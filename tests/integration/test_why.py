"""What became of one event: found by id, place or position; its causes, its standing in services, what it caused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.integration.embedded import Followed, Happened, StoreAround, embedded, settings_for
from tidings import Context, Event, EventData, EventStore, RecordedEvent, Retry, Service
from tidings.adapters import open_store
from tidings.database.engine import Database, open_database
from tidings.database.tables import dead, floors, staged, watermarks
from tidings.errors import StreamNotFound
from tidings.operations.lookup import Lookup
from tidings.operations.timeline import MOST, EventNotFound, TracedEvent, trace
from tidings.relay.checkpoints import checkpoint_stream, write_checkpoint


class Ended(Event, key="key"):
    key: str


def first() -> Service:
    service = Service("first")

    @service.on(Happened)
    async def follow(event: Happened, context: Context) -> None:
        for n in range(2):
            context.emit(f"followed-{event.key}", Followed(key=event.key, n=n))

    return service


def second() -> Service:
    service = Service("second")

    @service.on(Followed, retry=Retry(attempts=1, hold=None, hold_key=True))
    async def end(event: Followed, context: Context) -> None:
        if event.n == 0 and event.key == "bad":
            raise ValueError("this one\nis bad")
        context.emit(f"ended-{event.key}", Ended(key=event.key))

    return service


Place = tuple[EventStore, list[tuple[Service, Database | None]]]


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    """A folder: `good` went through both services; the first event that `bad` caused is dead, the second waits behind
    it."""
    async with embedded(tmp_path, first(), second()) as world:
        await world.append(Happened(key="good"))
        await world.settled()
        await world.append(Happened(key="bad"))
        while not (await world.report()).services[1].held_count:
            await world.running[0].reached(10**9, timeout=0.05)
    async with opened(tmp_path) as found:
        yield found


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Place]:
    settings = settings_for(folder)
    async with (
        open_store(settings.store) as store,
        open_database(settings.database_of("first")) as one,
        open_database(settings.database_of("second")) as two,
    ):
        yield store, [(first(), one), (second(), two), (Service("third"), None)]


async def the(store: EventStore, stream: str, version: int = 0) -> RecordedEvent:
    async for event in store.read_stream(stream, start=version, limit=1):
        return event
    raise AssertionError(f"{stream}@{version} is there")


def states(traced: TracedEvent) -> list[tuple[str, str]]:
    return [(standing.service, standing.state) for standing in traced.services]


async def test_id_place_and_position_find_the_same_event(place: Place) -> None:
    store, services = place
    event = await the(store, "Happened-good")
    found = [await trace(store, services, target) for target in (event.id, (event.stream, 0), event.position)]
    assert {timeline.event.event_id for timeline in found} == {str(event.id)}
    assert found[0] == found[1] == found[2]


async def test_what_an_event_caused_is_a_tree_through_all_services(place: Place) -> None:
    store, services = place
    timeline = await trace(store, services, ("Happened-good", 0))
    told = [(what.depth, what.type, what.handler, what.stream) for what in timeline.event.tree()]
    follow, end = "first.follow", "second.end"
    assert told == [
        (1, "Followed", follow, "followed-good"),
        (2, "Ended", end, "ended-good"),
        (1, "Followed", follow, "followed-good"),
        (2, "Ended", end, "ended-good"),
    ]
    elsewhere = [(name, "not handled here") for name in ("second", "third")]
    assert states(timeline.event) == [("first", "settled"), *elsewhere]
    (child, _) = timeline.event.caused
    assert states(child)[:2] == [("first", "not handled here"), ("second", "settled")]
    assert (timeline.causes, timeline.unknown_cause, timeline.more) == ([], None, 0)


async def test_causes_are_told_back_to_the_first(place: Place) -> None:
    store, services = place
    timeline = await trace(store, services, (await the(store, "ended-good")).id)
    assert [cause.type for cause in timeline.causes] == ["Happened", "Followed"]
    assert timeline.event.correlation_id == timeline.causes[0].event_id
    assert timeline.event.handler == "second.end"


async def test_a_cause_that_is_not_in_the_log_is_named(place: Place) -> None:
    store, services = place
    lost = str(uuid4())
    odd = EventData("Odd", b"{}", json.dumps({"$causationId": lost.upper()}).encode())
    done = await store.append("odd-1", [odd])
    assert (await trace(store, services, done.position)).unknown_cause == lost


async def test_dead_and_held_events_say_why_and_until_when(place: Place) -> None:
    store, services = place
    timeline = await trace(store, services, ("Happened-bad", 0))
    died, waits = (child.services[1] for child in timeline.event.caused)
    assert (died.state, died.handler, died.attempts, died.reason) == ("dead", "end", 1, "ValueError: this one\nis bad")
    assert died.letter is not None
    assert died.died_at is not None
    assert died.died_at.tzinfo is not None
    assert (waits.state, waits.attempts) == ("held", 0)
    assert waits.due is not None
    assert "waits behind" in waits.reason


async def test_above_floor_and_watermark_an_event_is_pending_and_where_a_service_never_ran_too(place: Place) -> None:
    store, services = place
    (_, database), *_ = services
    assert database is not None
    async with database.transaction() as connection:
        await connection.execute(floors.update().values(position=-1))
        await connection.execute(watermarks.update().values(position=-1))
    never = Service("never")
    never.on(Happened)(_nothing)
    timeline = await trace(store, [*services, (never, None)], ("Happened-good", 0))
    assert states(timeline.event)[0] == ("first", "pending")
    assert states(timeline.event)[-1] == ("never", "pending")


async def _nothing(event: Happened) -> None:
    """Handles it."""


async def test_an_emitted_event_that_is_not_appended_yet_belongs_to_the_tree_and_is_found_by_its_id(
    place: Place,
) -> None:
    store, services = place
    cause = await the(store, "Happened-good")
    (_, database), *_ = services
    assert database is not None
    own = {"service": "first", "log": str(await store.log_id())}
    metadata = json.dumps({"$causationId": str(cause.id)}).encode()
    kept = {"stream": "later", "data": b"{}", "metadata": metadata}
    late, refused = uuid4(), uuid4()
    async with database.transaction() as connection:
        rest = {"bucket": 1, "is_json": True, "type": "Late"}
        await connection.execute(
            staged.insert().values(**own, **kept, **rest, event_id=str(late), cause=cause.position)
        )
        died = {"kind": "staged", "attempts": 3, "reason": "StreamDeleted: closed", "died_at": cause.recorded_at}
        letter = dead.insert().values(**own, **kept, **rest, **died, event_id=str(refused), position=cause.position)
        await connection.execute(letter)
    timeline = await trace(store, services, cause.id)
    told = {what.event_id: what.waiting for what in timeline.event.tree() if what.position is None}
    assert told == {
        str(late): "staged in first, not appended yet",
        str(refused): "emitted in first, and refused by the store: StreamDeleted: closed",
    }
    for missing in (late, refused):
        timeline = await trace(store, services, missing)
        assert timeline.event.position is None
        assert timeline.event.waiting == told[str(missing)]
        assert [traced.event_id for traced in timeline.causes] == [str(cause.id)]
    # Appended, and its row not forgotten yet: it is in the tree once.
    await store.append("later", [EventData("Late", b"{}", metadata, id=late)])
    timeline = await trace(store, services, cause.id)
    assert [what.position is not None for what in timeline.event.tree() if what.event_id == str(late)] == [True]
    assert (await trace(store, services, late)).event.position is not None


async def test_what_retention_hides_in_its_stream_is_found_in_the_log(place: Place) -> None:
    store, services = place
    event = await the(store, "followed-bad")
    await store.delete("followed-bad")
    for target in (event.id, event.position):
        timeline = await trace(store, services, target)
        assert timeline.event.position == event.position
        assert timeline.event.services[1].state == "dead"


async def test_every_position_is_found_from_whichever_end(place: Place) -> None:
    store, services = place
    async for event in store.read_all():
        assert (await trace(store, services, event.position)).event.event_id == str(event.id)
    for nowhere in (0, await store.head() + 1):
        with pytest.raises(EventNotFound):
            await trace(store, services, nowhere)


class Reading(StoreAround):
    """A store that counts reads of the whole log."""

    def __init__(self, store: EventStore) -> None:
        super().__init__(store)
        self.events = 0

    async def read_all(self, **options: Any) -> AsyncIterator[RecordedEvent]:
        async for event in self.inner.read_all(**options):
            self.events += 1
            yield event


async def test_what_a_service_keeps_is_found_without_reading_the_log(place: Place) -> None:
    store, services = place
    for version in (0, 1):  # a dead one and a held one
        event, reading = await the(store, "followed-bad", version), Reading(store)
        lookup = Lookup(reading, services, await store.log_id(), lambda events, position, end: None)
        assert await lookup.find(event.id) == event
        assert reading.events == 0


async def test_a_position_is_looked_for_from_the_nearer_end(place: Place) -> None:
    store, services = place
    events = [event async for event in store.read_all()]
    for event in (events[1], events[-2]):
        reading = Reading(store)
        lookup = Lookup(reading, services, await store.log_id(), lambda events, position, end: None)
        assert await lookup.at(event.position) == event
        assert reading.events == 2


async def test_published_is_what_the_relays_checkpoint_says(place: Place) -> None:
    store, services = place
    event = await the(store, "Happened-good")
    await write_checkpoint(store, "main", event.position)
    timeline = await trace(store, services, event.position)
    assert (timeline.checkpoint, timeline.wrong) == (event.position, None)
    assert (await trace(store, services, event.position, relay="other")).checkpoint == -1
    await store.append(checkpoint_stream("main"), [EventData("Odd", b"7")])
    timeline = await trace(store, services, event.position)
    assert timeline.checkpoint is None
    assert "holds a checkpoint at version" in (timeline.wrong or "")


async def test_events_of_the_log_itself_are_not_carried(place: Place) -> None:
    store, services = place
    timeline = await trace(store, services, ("tidings_log", 0))
    assert {standing.state for standing in timeline.event.services} == {"not carried"}
    assert timeline.event.caused == []


async def test_a_tree_that_is_too_large_is_cut_and_the_rest_is_counted(place: Place) -> None:
    store, services = place
    cause = await the(store, "Happened-good")
    metadata = json.dumps({"$causationId": str(cause.id)}).encode()
    before = len(list((await trace(store, services, cause.position)).event.tree()))
    for n in range(3):
        await store.append(f"many-{n}", [EventData("Many", b"{}", metadata) for _ in range(MOST // 2)])
    timeline = await trace(store, services, cause.position)
    assert len(list(timeline.event.tree())) == MOST
    assert timeline.more == 3 * (MOST // 2) + before - MOST


async def test_a_chain_of_causes_may_be_long(place: Place) -> None:
    store, services = place
    ids = [UUID(int=n) for n in range(1, 900)]
    chain = [
        EventData("Link", b"{}", json.dumps({"$causationId": str(cause)}).encode(), id=link)
        for cause, link in pairwise(ids)
    ]
    await store.append("chain", [EventData("Link", b"{}", b"{}", id=ids[0]), *chain])
    timeline = await trace(store, services, ids[0])
    assert [what.depth for what in timeline.event.tree()] == list(range(1, 899))
    assert len((await trace(store, services, ids[-1])).causes) == 898


async def test_what_is_nowhere_says_what_was_searched(place: Place) -> None:
    store, services = place
    missing, head = uuid4(), await store.head()
    with pytest.raises(EventNotFound) as found:
        await trace(store, services, missing)
    assert f"no event has the id {missing}" in str(found.value)
    assert "held, dead and staged rows of first, second, third, and all " in str(found.value)
    assert f"ends at position {head}" in str(found.value)
    with pytest.raises(EventNotFound, match=f"no event is at position {head + 5}; the log ends at {head}"):
        await trace(store, services, head + 5)
    with pytest.raises(EventNotFound, match="stream 'Happened-good' shows no version 7"):
        await trace(store, services, ("Happened-good", 7))
    with pytest.raises(StreamNotFound):
        await trace(store, services, ("nowhere", 0))


async def test_progress_tells_how_far_the_log_was_read(place: Place) -> None:
    store, services = place
    for n in range(5):
        await store.append(f"noise-{n}", [EventData("Noise", b"{}") for _ in range(500)])
    told: list[int] = []
    await trace(store, services, ("Happened-good", 0), progress=lambda events, position, end: told.append(events))
    assert told == [1000, 2000]
