"""Several handlers of one event in one service: each once, in order, retried, held and given up on its own."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.embedded import (
    Followed,
    Happened,
    World,
    audit,
    count,
    embedded,
    letters,
    many,
    rows,
    tables,
    until,
)
from tidings import Context, Hold, RecordedEvent, Retry, Service
from tidings.database.tables import dead, held, partials
from tidings.operations.dead import DeadLetters

QUICK = Retry(attempts=2, delay=0.01, hold=Hold(attempts=2, delay=0.05))


async def note(session: AsyncSession, handler: str, event: Happened | Followed) -> None:
    await session.execute(sa.insert(audit).values(key=f"{handler} {event.key}", n=event.n))


class Pair:
    """A service with three handlers: `first` and `second` have a session, `told` has none. Each fails while it is in
    `broken`."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.told: list[tuple[str, int]] = []
        self.open = asyncio.Event()
        """The event for which `told` waits."""
        self.open.set()
        self.service = service = Service("pair", tables=tables)

        @service.on(Happened, retry=QUICK)
        async def first(event: Happened, session: AsyncSession) -> None:
            await self.work("first", event, session)

        @service.on(Happened, retry=QUICK)
        async def tell(event: Happened) -> None:
            await self.open.wait()
            self.fail("tell", event)
            self.told.append((event.key, event.n))

        @service.on(Happened, retry=QUICK)
        async def second(event: Happened, session: AsyncSession) -> None:
            await self.work("second", event, session)

    async def work(self, name: str, event: Happened, session: AsyncSession) -> None:
        await note(session, name, event)
        self.fail(name, event)

    def fail(self, name: str, event: Happened) -> None:
        if name in self.broken and event.key == "k0":
            raise RuntimeError(f"{name} is broken")


async def effects(service: Service) -> dict[str, list[int]]:
    found = defaultdict(list)
    for name, n in await rows(service):
        found[name].append(n)
    return found


async def test_each_handler_has_every_event_once_and_in_order(tmp_path: Path) -> None:
    pair, events = Pair(), many(300, 7)
    async with embedded(tmp_path, pair.service) as world:
        await world.append(*events)
        await world.settled()
        found = await effects(pair.service)
        for key in {event.key for event in events}:
            expected = [event.n for event in events if event.key == key]
            assert found[f"first {key}"] == found[f"second {key}"] == expected
            assert [n for of, n in pair.told if of == key] == expected
        assert await count(pair.service, partials) == 0


async def test_a_handler_that_fails_holds_its_own_keys_and_nobody_elses(tmp_path: Path) -> None:
    pair = Pair()
    pair.broken = {"first"}
    async with embedded(tmp_path, pair.service) as world:
        await world.append(*(Happened(key="k0", n=n) for n in range(5)), Happened(key="k1"))
        await until(lambda: _number(pair.service, held, 5))
        assert await world.running[0].reached(await world.store.head(), timeout=20.0)
        found = await effects(pair.service)
        assert found["second k0"] == [0, 1, 2, 3, 4]
        assert [n for of, n in pair.told if of == "k0"] == [0, 1, 2, 3, 4]
        assert found["first k1"] == [0]
        assert "first k0" not in found
        await until(lambda: _dead(pair.service, 1))
        pair.broken = set()
        dead = DeadLetters(world.running[0].database, "pair", await world.store.log_id())
        (letter,) = await letters(pair.service)
        assert (letter.handler, letter.holds_key) == ("first", True)
        await dead.retry([letter.id])
        await world.settled()
        assert (await effects(pair.service))["first k0"] == [0, 1, 2, 3, 4]
        assert Counter(pair.told) == Counter([("k1", 0), *(("k0", n) for n in range(5))])


async def test_the_first_handler_of_an_event_holds_up_its_key_though_it_is_a_further_one_of_another_event(
    tmp_path: Path,
) -> None:
    service, ran, broken = Service("pair", tables=tables), list[str](), [True]

    @service.on(Followed)
    async def follow(event: Followed) -> None:
        ran.append(f"follow {event.key}")

    @service.on(Happened, Followed, retry=Retry(attempts=1, hold=Hold(attempts=99, delay=0.05, factor=1)))
    async def both(event: Happened | Followed) -> None:
        if broken[0] and isinstance(event, Happened):
            raise RuntimeError("not yet")
        ran.append(f"both {type(event).__name__} {event.key}")

    @service.on(Happened)
    async def further(event: Happened) -> None:
        ran.append(f"further {event.key}")

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="k0"), Followed(key="k0"), Followed(key="k1"))
        await until(lambda: _number(service, held, 2))
        assert await world.running[0].reached(await world.store.head(), timeout=20.0)
        first = ["further k0", "both Followed k0", "follow k1", "both Followed k1"]
        assert sorted(ran) == sorted(first)
        broken[0] = False
        await world.settled()
        assert ran[4:] == ["both Happened k0", "follow k0"]


async def test_what_is_held_is_in_the_line_in_which_the_code_that_runs_keeps_the_order(tmp_path: Path) -> None:
    def version(*, above: bool) -> Service:
        service = Service("pair", tables=tables)
        if above:

            @service.on(Happened)
            async def other(event: Happened) -> None: ...

        @service.on(Happened, Followed, retry=Retry(attempts=1, hold=Hold(delay=600)))
        async def both(event: Happened | Followed) -> None:
            raise RuntimeError("it fails")

        return service

    for above in (False, True, False):
        service = version(above=above)
        async with embedded(tmp_path, service) as world:
            await world.append(Happened(key="k0"), Followed(key="k1"))
            await world.running[0].reached(await world.store.head(), timeout=20.0)
            async with service.engine.connect() as connection:
                lines = {*(await connection.execute(sa.select(held.c.type, held.c.line))).all()}
            assert lines == {("Happened", "both" if above else ""), ("Followed", "")}


@pytest.mark.parametrize(
    "retry", [Retry(attempts=1, hold=None), Retry(attempts=1, hold=Hold(delay=9000, maximum=9000))]
)
async def test_what_one_handler_gave_up_or_holds_hides_from_nobody_when_another_one_has_its_turn(
    tmp_path: Path, retry: Retry
) -> None:
    service = Service("pair", tables=tables)

    @service.on(Happened, retry=retry)
    async def first(event: Happened) -> None:
        if event.n == 0:
            raise RuntimeError("the older event")

    @service.on(Happened, retry=Retry(attempts=1, hold=Hold(delay=600)))
    async def second(event: Happened) -> None:
        if event.n == 1:
            raise RuntimeError("the younger event")

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="k0"), Happened(key="k0", n=1))
        await until(lambda: _holds(world, "second"))
        (part,) = (await world.report()).services
        (due,) = (row.due for row in part.held if row.handler == "second")
        assert part.held_due == due


async def _holds(world: World, handler: str) -> bool:
    (part,) = (await world.report()).services
    return handler in {row.handler for row in part.held}


@pytest.mark.parametrize("above", [False, True], ids=["becomes further", "becomes first"])
async def test_what_is_held_keeps_its_order_when_a_deploy_moves_it_to_another_line(tmp_path: Path, above: bool) -> None:
    broken = [True]

    def version(*, above: bool) -> Service:
        service = Service("pair", tables=tables)
        if above:

            @service.on(Happened)
            async def other(event: Happened) -> None: ...

        @service.on(Happened, retry=Retry(attempts=1, hold=Hold(attempts=1000, delay=0.05)))
        async def work(event: Happened, session: AsyncSession) -> None:
            await note(session, "work", event)
            if broken[0]:
                raise RuntimeError("not yet")

        return service

    async with embedded(tmp_path, before := version(above=above)) as world:
        await world.append(Happened(key="k0"), Happened(key="k0", n=1))
        await until(lambda: _number(before, held, 2))
    broken[0] = False
    async with embedded(tmp_path, after := version(above=not above)) as world:
        await world.append(Happened(key="k0", n=2))
        await world.settled()
        assert await effects(after) == {"work k0": [0, 1, 2]}


async def test_what_is_dead_holds_its_key_when_a_deploy_moves_it_to_another_line(tmp_path: Path) -> None:
    def version(*, above: bool) -> Service:
        service = Service("pair", tables=tables)
        if above:

            @service.on(Happened)
            async def other(event: Happened) -> None: ...

        @service.on(Happened, retry=Retry(permanent=(RuntimeError,)))
        async def work(event: Happened, session: AsyncSession) -> None:
            await note(session, "work", event)
            if event.n == 0:
                raise RuntimeError("never")

        return service

    async with embedded(tmp_path, before := version(above=False)) as world:
        await world.append(Happened(key="k0"))
        await until(lambda: _number(before, dead, 1))
    async with embedded(tmp_path, after := version(above=True)) as world:
        await world.append(Happened(key="k0", n=1))
        await until(lambda: _number(after, held, 1))
        assert await effects(after) == {}


async def test_two_handlers_may_hold_the_same_event(tmp_path: Path) -> None:
    pair = Pair()
    pair.broken = {"first", "tell", "second"}
    async with embedded(tmp_path, pair.service) as world:
        await world.append(Happened(key="k0"))
        await until(lambda: _number(pair.service, held, 3))
        pair.broken = set()
        await world.settled()
        assert await effects(pair.service) == {"first k0": [0], "second k0": [0]}
        assert pair.told == [("k0", 0)]


async def test_a_handler_that_was_committed_is_not_run_again_for_another_that_was_not(tmp_path: Path) -> None:
    pair = Pair()
    pair.open.clear()
    async with embedded(tmp_path, pair.service) as world:
        await world.append(Happened(key="k0"))
        await until(lambda: _number(pair.service, partials, 1))
        assert not (await world.report()).ok
    again = Pair()
    async with embedded(tmp_path, again.service) as world:
        await world.append(Happened(key="k0", n=1))
        await world.settled()
        assert await effects(again.service) == {"first k0": [0, 1], "second k0": [0, 1]}
        assert again.told == [("k0", 0), ("k0", 1)]
        await until(lambda: _number(again.service, partials, 0))


async def test_a_handler_that_left_while_an_event_waited_for_another_leaves_nothing_behind(tmp_path: Path) -> None:
    pair = Pair()
    pair.open.clear()
    async with embedded(tmp_path, pair.service) as world:
        await world.append(Happened(key="k0"))
        await until(lambda: _number(pair.service, partials, 1))
    alone = Service("pair", tables=tables)

    @alone.on(Happened)
    async def first(event: Happened, session: AsyncSession) -> None:
        await note(session, "first", event)

    async with embedded(tmp_path, alone) as world:
        await world.append(Happened(key="k0", n=1))
        await world.settled()
        assert await effects(alone) == {"first k0": [0, 1]}


@pytest.mark.parametrize("added", [False, True], ids=["there before", "added by the deploy"])
async def test_a_handler_that_left_when_it_was_done_with_an_event_that_waited_for_another_is_not_given_it_again(
    tmp_path: Path, added: bool
) -> None:
    def without_first() -> Service:
        service = Service("pair", tables=tables)

        @service.on(Happened)
        async def tell(event: Happened) -> None:
            told.append(event.n)

        return service

    told = list[int]()
    if added:
        async with embedded(tmp_path, without_first()) as world:
            await world.append(Happened(key="k0", n=7))
            await world.settled()
    pair = Pair()
    pair.open.clear()
    async with embedded(tmp_path, pair.service) as world:
        await world.append(Happened(key="k0"))
        await until(lambda: _number(pair.service, partials, 1))
    async with embedded(tmp_path, without_first()) as world:
        await world.append(Happened(key="k0", n=1))
        await world.settled()
        assert told[-2:] == [0, 1]
    back = Pair()
    async with embedded(tmp_path, back.service) as world:
        await world.append(Happened(key="k0", n=2))
        await world.settled()
        assert (await effects(back.service))["first k0"] == [0, 1, 2]


async def test_a_handler_that_was_renamed_when_it_was_done_with_an_event_that_waited_for_another_is_not_given_it_again(
    tmp_path: Path,
) -> None:
    told, gate = list[tuple[str, int]](), asyncio.Event()

    def version(name: str, *was: str) -> Service:
        service = Service("pair", tables=tables)

        @service.on(Happened, name=name, was=was)
        async def tell(event: Happened) -> None:
            told.append((name, event.n))

        @service.on(Happened)
        async def second(event: Happened) -> None:
            await gate.wait()

        return service

    async with embedded(tmp_path, before := version("tell")) as world:
        await world.append(Happened(key="k0"))
        await until(lambda: _number(before, partials, 1))
    gate.set()
    async with embedded(tmp_path, version("say", "tell")) as world:
        await world.append(Happened(key="k0", n=1))
        await world.settled()
        assert told == [("tell", 0), ("say", 1)]


async def test_on_any_is_given_every_event_whether_it_is_declared_or_not(tmp_path: Path) -> None:
    service, seen = Service("any", tables=tables), list[tuple[str, str, int]]()

    @service.on_any(name="audit everything", retry=QUICK)
    async def every(event: RecordedEvent, context: Context, session: AsyncSession) -> None:
        await session.execute(sa.insert(audit).values(key=event.type, n=event.version))
        seen.append((event.type, event.stream, context.attempt))
        if event.type == "Followed" and context.attempt == 1:
            raise RuntimeError("the first attempt fails")

    @service.on(Happened)
    async def typed(event: Happened, session: AsyncSession) -> None:
        await note(session, "typed", event)

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="a"), Followed(key="b"), Happened(key="a", n=1))
        await world.settled()
        found = await effects(service)
        assert found == {"Happened": [0, 1], "typed a": [0, 1], "Followed": [0]}
        assert [attempt for kind, _, attempt in seen if kind == "Followed"] == [1, 2]


async def _number(service: Service, table: sa.Table, wanted: int) -> bool:
    return await count(service, table) == wanted


async def _dead(service: Service, wanted: int) -> bool:
    return len(await letters(service)) == wanted
