"""What handlers emit is appended exactly once, in order, or becomes a dead letter that `verify` lists."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import pytest

from tests.integration.embedded import (
    Followed,
    Happened,
    StoreAround,
    assert_once_in_order,
    auditing,
    count,
    embedded,
    emitting,
    followed,
    letters,
    many,
    rows,
    until,
)
from tidings import ANY, NO_STREAM, Aggregate, Context, EventData, EventStore, Hold, Retry, Service, evolves
from tidings.database.tables import staged
from tidings.errors import StoreUnavailable
from tidings.stores import Appended, Expected

pytestmark = [pytest.mark.served, pytest.mark.postgresql]


class Forgetful(StoreAround):
    """A store that fails at random before or after writing, and writes an id twice if `ANY` repeats it."""

    def __init__(self, store: EventStore) -> None:
        super().__init__(store)
        self.random = random.Random(6)
        self.tried: set[UUID] = set()
        self.failed = 0

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        if expected is ANY and stream.startswith("followed-"):
            assert events[0].id not in self.tried, "ANY was repeated"
        self.tried.add(events[0].id)
        chance = self.random.random()
        if chance < 0.1:
            self.failed += 1
            raise StoreUnavailable("gone before it was written")
        done = await self.inner.append(stream, events, expected=expected)
        if chance > 0.9:
            self.failed += 1
            raise StoreUnavailable("gone after it was written")
        return done


async def test_emissions_are_appended_once_by_a_store_that_fails_and_forgets(tmp_path: Path) -> None:
    service, events, stores = emitting(), many(400, 50), list[Forgetful]()

    def wrap(store: EventStore) -> EventStore:
        stores.append(Forgetful(store))
        return stores[0]

    async with embedded(tmp_path, Service("first")) as world:
        await world.append(*events)
    async with embedded(tmp_path, service, wrap=wrap) as world:
        await world.settled()
        assert stores[0].failed > 20
        assert_once_in_order(await rows(service), events)
        assert_once_in_order(await followed(world.store), events)
        assert await count(service, staged) == 0


class Away(StoreAround):
    """A store that does not answer appends while it is `away`; `take` says whether it writes them."""

    away = True
    take = True

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        if not self.away:
            return await self.inner.append(stream, events, expected=expected)
        if self.take:
            await self.inner.append(stream, events, expected=expected)
        raise StoreUnavailable("away")


@pytest.mark.parametrize("hide", ["nothing", "truncated", "deleted", "one kept", "tombstoned"])
@pytest.mark.parametrize("take", [True, False])
async def test_an_append_of_unknown_outcome_is_found_even_in_a_stream_that_hides_it(
    tmp_path: Path, hide: str, take: bool
) -> None:
    service, around = emitting(), list[Away]()

    def wrap(store: EventStore) -> EventStore:
        around.append(Away(store))
        around[0].take = take
        return around[0]

    async with embedded(tmp_path, Service("first")) as world:
        await world.append(Followed(key="a", n=-1), stream="followed-a")
        await world.append(Happened(key="a", n=1))
    async with embedded(tmp_path, service, wrap=wrap) as world:

        async def is_staged() -> bool:
            return await count(service, staged) == 1

        await until(is_staged)
        if take:

            async def written() -> bool:
                return len(await followed(world.store)) == 2

            await until(written)
        if hide == "truncated":
            await world.store.set_metadata("followed-a", {"$tb": 100})
        elif hide == "one kept":
            await world.store.set_metadata("followed-a", {"$maxCount": 1})
            await world.store.append("followed-a", [EventData("Other", b"{}")])
        elif hide == "deleted":
            await world.store.delete("followed-a")
        elif hide == "tombstoned":
            await world.store.tombstone("followed-a")
        around[0].away = False
        await world.settled()
        refused = hide == "tombstoned" and not take
        assert await followed(world.store) == [("a", -1), ("a", 1)][: 1 if refused else 2]
        assert [letter.kind for letter in await letters(service)] == ["staged"] * refused


async def test_an_emission_that_can_never_be_appended_is_dead_and_verify_lists_it(tmp_path: Path) -> None:
    service = emitting()
    async with embedded(tmp_path, service) as world:
        await world.store.append("followed-a", [EventData("Other", b"{}")], expected=NO_STREAM)
        await world.store.tombstone("followed-a")
        await world.append(Happened(key="a", n=1), Happened(key="b", n=1), Happened(key="a", n=2))
        report = await world.settled()
        (own,) = report.services
        assert own.dead_count == 2
        assert {letter.kind for letter in own.dead} == {"staged"}
        assert "StreamDeleted" in str(report)
        assert await followed(world.store) == [("b", 1)]
        first = (await letters(service))[0]
        assert (first.stream, first.type, first.data) == ("followed-a", "Followed", b'{"key":"a","n":1}')


class Listening(StoreAround):
    """A store that notes the expected versions with which `Followed` is appended, by number."""

    def __init__(self, store: EventStore) -> None:
        super().__init__(store)
        self.expected: dict[int, Expected] = {}

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        if events[0].type == "Followed":
            self.expected[json.loads(events[0].data)["n"]] = expected
        return await self.inner.append(stream, events, expected=expected)


async def test_what_was_held_or_may_have_been_handled_in_an_earlier_life_is_looked_for(tmp_path: Path) -> None:
    """A database that was set back may hold an event that was handled later, and does not know others."""
    stores, failed = list[Listening](), list[int]()
    service = Service("audit")

    def wrap(store: EventStore) -> EventStore:
        stores.append(Listening(store))
        return stores[0]

    @service.on(Happened, retry=Retry(attempts=1, hold=Hold(attempts=5, delay=0.01)))
    async def follow(event: Happened, context: Context) -> None:
        if event.n == 2 and not failed:
            failed.append(event.n)
            raise ValueError("held once")
        context.emit(f"followed-{event.key}", Followed(key=event.key, n=event.n))

    async with embedded(tmp_path, Service("first")) as world:
        await world.append(Happened(key="a", n=0))
    async with embedded(tmp_path, service, wrap=wrap) as world:
        await world.settled()
        for n in (1, 2, 3):
            await world.append(Happened(key="a", n=n))
            await world.settled()
        assert failed == [2]
        assert stores[0].expected == {0: NO_STREAM, 1: ANY, 2: 1, 3: ANY}


class Counter(Aggregate, category="counter"):
    seen = 0

    @evolves(Followed)
    def _followed(self, event: Followed) -> None:
        self.seen += 1

    def follow(self, n: int) -> None:
        self.record(Followed(key=self.id, n=n))


async def test_context_change_of_a_repeated_handler_happens_once(tmp_path: Path) -> None:
    service, calls = Service("changing"), list[int]()
    counters = service.repository(Counter)

    @service.on(Happened)
    async def change(event: Happened, context: Context) -> None:
        calls.append(event.n)
        await context.change(counters, event.key, Counter.follow, event.n)
        if context.attempt < 3:
            raise ValueError("after the change")

    async with embedded(tmp_path, service) as world:
        await counters.create("a", Counter.follow, 0)
        await world.append(Happened(key="a", n=1), Happened(key="a", n=2))
        await world.settled()
        assert calls == [1, 1, 1, 2, 2, 2]
        assert await followed(world.store) == [("a", 0), ("a", 1), ("a", 2)]


async def test_the_emissions_of_an_undone_attempt_are_never_seen(tmp_path: Path) -> None:
    async def fail_twice(event: Happened, context: Context, session: object) -> None:
        context.emit("followed-a", Followed(key="a", n=context.attempt))
        if context.attempt < 3:
            raise ValueError("no")

    service = auditing(effect=fail_twice)
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="a"))
        await world.settled()
        assert await followed(world.store) == [("a", 3)]
        assert await rows(service) == [("a", 0)]
