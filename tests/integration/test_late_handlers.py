"""Handlers that come later, leave, come back or are renamed: each event once for each, in order, none forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.embedded import Happened, audit, count, embedded, many, rows, tables, until
from tidings import Context, Hold, Retry, Service
from tidings.database.tables import held, spans
from tidings.modelling.roster import SKIPPED
from tidings.operations.dead import DeadLetters
from tidings.operations.replay import find_start, send_back
from tidings.protocol.position import BUCKETS

Since = Literal["start", "now"] | int | None
EVENTS = many(120, 5)
OLD, NEW = EVENTS[:60], EVENTS[60:]


def service(
    *names: str, since: Since = None, replay: bool = True, was: tuple[str, ...] = (), **options: int
) -> Service:
    """Declare a service whose handlers write audit rows; `since`, `replay` and `was` are for the last handler."""
    made = Service("late", tables=tables, **options)  # type: ignore[arg-type]
    for name in names:
        last = name == names[-1]

        async def handle(event: Happened, context: Context, session: AsyncSession) -> None:
            again = " again" if context.replayed else ""
            await session.execute(sa.insert(audit).values(key=f"{context.handler} {event.key}{again}", n=event.n))

        made.on(
            Happened,
            name=name,
            since=since if last else None,
            replay=replay or not last,
            was=was if last else (),
            retry=Retry(attempts=2, delay=0.01, hold=Hold(attempts=3, delay=0.05)),
        )(handle)
    return made


async def done(of: Service, name: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for key, n in await rows(of):
        handler, _, which = key.partition(" ")
        if handler == name:
            found.setdefault(which, []).append(n)
    return found


def by_key(events: Sequence[Happened]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for event in events:
        found.setdefault(event.key, []).append(event.n)
    return found


async def live(folder: Path, of: Service, *events: Happened) -> None:
    """Run one deploy: append, and wait until everything is settled."""
    async with embedded(folder, of) as world:
        await world.append(*events)
        await world.settled()
        await until(lambda: _caught_up(of))
        assert await world.running[0].reached(await world.store.head(), timeout=20.0)

        async def begun() -> bool:
            (part,) = (await world.report()).services
            return not any(handler.state == "to begin" for handler in part.handlers)

        await until(begun)


async def _caught_up(of: Service) -> bool:
    async with of.engine.connect() as connection:
        left = sa.select(sa.func.count()).select_from(spans).where(spans.c.kind != SKIPPED)
        return not await connection.scalar(left.where(spans.c.handler.in_(list(of.named))))


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize(
    ("since", "expected"), [("start", EVENTS), ("now", NEW), (None, NEW)], ids=["start", "now", "without"]
)
async def test_a_handler_added_later_begins_where_it_was_declared_to(
    tmp_path: Path, since: Since, expected: list[Happened], partitions: int
) -> None:
    await live(tmp_path, service("first", partitions=partitions), *OLD)
    late = service("first", "second", since=since)
    async with embedded(tmp_path, late) as world:
        await world.append(*NEW)
        await world.settled()
        await until(lambda: _caught_up(late))
        assert await done(late, "second") == by_key(expected)
        assert await done(late, "first") == by_key(EVENTS)


async def test_a_handler_may_begin_at_a_position(tmp_path: Path) -> None:
    first = service("first")
    async with embedded(tmp_path, first) as world:
        await world.append(*(Happened(key="k", n=n) for n in range(10)))
        await world.settled()
        positions = [event.position async for event in world.store.read_all() if event.type == "Happened"]
    late = service("first", "second", since=positions[4])
    async with embedded(tmp_path, late) as world:
        await until(lambda: _has(late, "second", 6))
        await until(lambda: _caught_up(late))
        assert await done(late, "second") == {"k": [4, 5, 6, 7, 8, 9]}


async def test_a_handler_that_leaves_and_comes_back_goes_on_where_it_left(tmp_path: Path) -> None:
    await live(tmp_path, service("first", "second"), *EVENTS[:40])
    await live(tmp_path, service("first"), *EVENTS[40:80])
    back = service("first", "second")
    async with embedded(tmp_path, back) as world:
        await world.append(*EVENTS[80:])
        await world.settled()
        await until(lambda: _caught_up(back))
        assert await done(back, "second") == await done(back, "first") == by_key(EVENTS)


@pytest.mark.parametrize("was", [("second",), ()], ids=["said", "unsaid"])
async def test_a_renamed_handler_goes_on_where_it_was(tmp_path: Path, was: tuple[str, ...]) -> None:
    await live(tmp_path, service("first", "second"), *OLD)
    renamed = service("first", "third", was=was)
    async with embedded(tmp_path, renamed) as world:
        await world.append(*NEW)
        await world.settled()
        assert await done(renamed, "second") == by_key(OLD)
        assert await done(renamed, "third") == by_key(NEW)
        if was:
            assert await count(renamed, spans) == 0


async def test_a_former_name_that_is_said_later_counts_from_the_beginning(tmp_path: Path) -> None:
    await live(tmp_path, service("first", "second"), *EVENTS[:40])
    await live(tmp_path, service("first", "third"), *EVENTS[40:80])
    said = service("first", "third", was=("second",))
    async with embedded(tmp_path, said, relay=False) as world:
        report = await world.report()
        assert (report.ok, report.services[0].handlers) == (True, [])
    await live(tmp_path, said, *EVENTS[80:])
    async with embedded(tmp_path, said, relay=False) as world:
        assert (await world.report()).services[0].handlers == []
        assert await done(said, "second") == by_key(EVENTS[:40])
        assert await done(said, "third") == by_key(EVENTS[40:])
        assert await count(said, spans) == 0


async def test_a_rename_that_is_rolled_back_and_deployed_again_runs_nothing_twice(tmp_path: Path) -> None:
    old, new = service("first", "second"), service("first", "third", was=("second",))
    for number in range(6):
        version = (old, new)[number % 2]
        async with embedded(tmp_path, version, relay=False) as world:
            report = await world.report()
            assert report.services[0].handlers == []
        await live(tmp_path, version, *EVENTS[20 * number : 20 * number + 20])
    async with embedded(tmp_path, old, relay=False) as world:
        assert (await world.report()).services[0].handlers == []
        both = [*(await done(old, "second")).items(), *(await done(old, "third")).items()]
        numbers = {key: sorted(n for of, some in both if of == key for n in some) for key in by_key(EVENTS)}
        assert numbers == by_key(EVENTS)
        assert await count(old, spans) == 0


async def test_what_a_handler_that_left_holds_or_gave_up_is_given_to_no_other_one(tmp_path: Path) -> None:
    ran: list[tuple[str, int]] = []

    def version(name: str, *was: str, broken: bool = False) -> Service:
        made = Service("late", tables=tables)
        retry = Retry(attempts=1, hold=Hold(attempts=1, delay=0.05), permanent=(KeyError,))

        @made.on(Happened, name=name, was=was, since="now", retry=retry)
        async def handle(event: Happened) -> None:
            if broken and event.n == 0:
                raise KeyError("dead at once")
            ran.append((name, event.n))

        return made

    pack = version("pack", broken=True)
    async with embedded(tmp_path, pack) as world:
        await world.append(Happened(key="dead", n=0), Happened(key="dead", n=2))
        await until(lambda: _number(pack, held, 1))
    thank = version("thank")
    async with embedded(tmp_path, thank) as world:
        await world.append(Happened(key="new", n=3))
        await until(lambda: ran == [("thank", 3)])
        dead = DeadLetters(world.running[0].database, "late", await world.store.log_id())
        (letter,) = await dead.list()
        assert letter.handler == "pack"
        await dead.retry([letter.id])
        await world.append(Happened(key="new", n=4))
        await until(lambda: ran == [("thank", 3), ("thank", 4)])
        (part,) = (await world.report()).services
        assert [row.handler for row in part.held] == ["pack", "pack"]
        assert "declare that with was=('pack',)" in part.held[0].reason
    for name, was in (("wrap", ("pack",)), ("pack", ())):
        again = version(name, *was)
        async with embedded(tmp_path, again) as world:
            await world.settled()
            assert ran[2:4] == [("wrap", 0), ("wrap", 2)]


async def test_what_a_renamed_handler_holds_is_its_own_after_a_rollback(tmp_path: Path) -> None:
    def version(name: str, *was: str, broken: bool) -> Service:
        made = Service("late", tables=tables)

        @made.on(Happened, name=name, was=was, retry=Retry(attempts=1, hold=Hold(attempts=99, delay=0.05, factor=1)))
        async def handle(event: Happened, session: AsyncSession) -> None:
            await session.execute(sa.insert(audit).values(key="k", n=event.n))
            if broken and event.n == 1:
                raise RuntimeError("not yet")

        return made

    new = version("new", "old", broken=True)
    async with embedded(tmp_path, new) as world:
        await world.append(*(Happened(key="k", n=n) for n in range(4)))
        await until(lambda: _number(new, held, 3))
    old = version("old", broken=False)
    async with embedded(tmp_path, old) as world:
        await world.append(Happened(key="k", n=4))
        await world.settled()
        assert await rows(old) == [("k", n) for n in range(5)]


async def test_a_past_may_be_added_later(tmp_path: Path) -> None:
    await live(tmp_path, service("first"), *OLD)
    await live(tmp_path, service("first", "second"), *EVENTS[60:90])
    late = service("first", "second", since="start")
    async with embedded(tmp_path, late) as world:
        await world.append(*EVENTS[90:])
        await world.settled()
        await until(lambda: _caught_up(late))
        found = await done(late, "second")
        assert {key: sorted(numbers) for key, numbers in found.items()} == by_key(EVENTS)
        assert await count(late, spans) == 0


async def test_a_replay_gives_a_late_handler_what_it_was_not_given(tmp_path: Path) -> None:
    await live(tmp_path, service("first"), *OLD)
    late = service("first", "second")
    await live(tmp_path, late, *NEW)
    async with embedded(tmp_path, late) as world:
        start = await find_start(world.store, 0)
        assert start is not None
        await send_back(world.running[0].database, late, await world.store.log_id(), start)
        await until(lambda: _has(late, "second", 180))
        await world.settled()
        again = await done(late, "second")
        assert {key: again[f"{key} again"] for key in by_key(EVENTS)} == by_key(EVENTS)


@pytest.mark.parametrize("since", [1, 2])
async def test_a_replay_gives_a_handler_nothing_before_the_position_at_which_it_was_to_begin(
    tmp_path: Path, since: int
) -> None:
    late = service("first", "second", since=since)
    await live(tmp_path, late, *OLD)
    async with embedded(tmp_path, late) as world:
        before = await count(late, spans)
        assert before == BUCKETS
        start = await find_start(world.store, 0)
        assert start is not None
        await send_back(world.running[0].database, late, await world.store.log_id(), start)
        assert await count(late, spans) == before
        await world.settled()


async def test_what_fails_in_the_past_is_held_and_keeps_its_order(tmp_path: Path) -> None:
    await live(tmp_path, service("first"), *(Happened(key="k", n=n) for n in range(6)))
    late, broken = Service("late", tables=tables), [True]

    @late.on(Happened)
    async def first(event: Happened) -> None: ...

    @late.on(Happened, since="start", retry=Retry(attempts=1, hold=Hold(attempts=50, delay=0.05, factor=1)))
    async def second(event: Happened, session: AsyncSession) -> None:
        await session.execute(sa.insert(audit).values(key="second k", n=event.n))
        if broken[0] and event.n == 2:
            raise RuntimeError("not yet")

    async with embedded(tmp_path, late) as world:
        await world.append(Happened(key="k", n=6))
        await until(lambda: _number(late, held, 5))
        assert await done(late, "second") == {"k": [0, 1]}
        broken[0] = False
        await world.settled()
        assert await done(late, "second") == {"k": [0, 1, 2, 3, 4, 5, 6]}


async def _has(of: Service, name: str, wanted: int) -> bool:
    return sum(map(len, (await done(of, name)).values())) >= wanted


async def _number(of: Service, table: sa.Table, wanted: int) -> bool:
    return await count(of, table) == wanted


async def test_the_past_of_a_paused_handler_stays_in_the_log_and_is_done_when_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.delivery.breaker.PAUSES", (0.05, 0.1))
    down, done = True, list[tuple[str, int]]()

    async def late(event: Happened) -> None:
        if down:
            raise ConnectionError("the gateway is down")
        done.append((event.key, event.n))

    async def first(event: Happened) -> None: ...

    def deploy(*, with_late: bool) -> Service:
        made = Service("audit", tables=tables, prefetch=20)
        made.on(Happened)(first)
        if with_late:
            made.on(Happened, since="start", retry=Retry(attempts=1, hold=Hold(attempts=10_000, delay=0.05)))(late)
        return made

    events = many(600, 50)
    async with embedded(tmp_path, deploy(with_late=False)) as world:
        await world.append(*events)
        await world.settled()
    async with embedded(tmp_path, paused := deploy(with_late=True)) as world:
        running = world.running[0]
        await until(lambda: running.paused is not None)
        pipeline = running.partitions[0].pipeline
        assert pipeline is not None
        await until(lambda: pipeline.idle)
        before, trials = await count(paused, held), pipeline.stages.runner.ended
        assert before < 500, "of 600"
        await until(lambda: pipeline.stages.runner.ended > trials + 5)
        assert await count(paused, held) == before, "none is read any more"
        down = False
        await until(lambda: _caught_up(paused))
        await world.settled()
    for key in {event.key for event in events}:
        assert [n for of, n in done if of == key] == [event.n for event in events if event.key == key]
