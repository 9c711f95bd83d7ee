"""What verify, why, replay and status say of a handler that is new, behind, or was not given the past."""

from __future__ import annotations

from pathlib import Path

from tests.integration.embedded import Happened, embedded
from tests.integration.test_late_handlers import Since, live, service
from tidings.database.tables import spans
from tidings.modelling.roster import BEHIND, SKIPPED, Span
from tidings.operations.recount import recount
from tidings.operations.replay import find_start, plan
from tidings.operations.timeline import trace
from tidings.operations.verify import Report, verify

EVENTS = [Happened(key=f"k{n}", n=n) for n in range(3)]


async def looked(folder: Path, since: Since = None, *, started: bool = True) -> tuple[Report, str, str, list[str]]:
    """Return what is said about `second`, which was added after three events: by verify, by verify --deep, about the
    first event, and by the plan of a replay."""
    late = service("first", "second", since=since)
    if started:
        await live(folder, late)
    async with embedded(folder, service("first", *(["second"] if started else []), since=since), relay=False) as world:
        pair = [(late, world.running[0].database)]
        report = await verify(world.store, pair)
        deep = await recount(world.store, pair)
        start = await find_start(world.store, 0)
        assert start is not None
        timeline = await trace(world.store, pair, start.position)
        shares = (await plan(world.store, world.running[0].database, late, start)).shares
        return (
            report,
            str(deep),
            ", ".join(f"{each.handler} {each.state}" for each in timeline.event.services),
            [f"{share.handler} {share.run} {share.never_given}" for share in shares],
        )


async def test_what_a_late_handler_was_not_given_is_said_everywhere(tmp_path: Path) -> None:
    await live(tmp_path, service("first"), *EVENTS)
    report, deep, why, shares = await looked(tmp_path)
    assert report.ok
    (handler,) = report.services[0].handlers
    assert (handler.handler, handler.state) == ("second", "at work")
    assert f"handler second runs from position {handler.skipped_upto + 1} on" in str(report)
    assert "3 of them were settled before handler second began, and never given to it" in deep
    assert why == "first settled, second not given"
    assert shares == ["first 3 0", "second 0 3"]


async def test_a_handler_that_is_to_be_given_the_past_and_was_not_started_is_not_settled(tmp_path: Path) -> None:
    await live(tmp_path, service("first"), *EVENTS)
    report, _, _, shares = await looked(tmp_path, "start", started=False)
    assert not report.ok
    assert "handler second has NOT begun" in str(report)
    assert shares == ["first 3 0", "second 0 3"]


async def test_a_handler_that_is_new_and_to_begin_now_is_no_reason_to_say_unsettled(tmp_path: Path) -> None:
    await live(tmp_path, service("first"), *EVENTS)
    report, *_ = await looked(tmp_path, started=False)
    assert report.ok
    assert "handler second has not begun" in str(report)


async def test_nothing_is_said_of_a_handler_that_has_had_everything(tmp_path: Path) -> None:
    await live(tmp_path, service("first"), *EVENTS)
    report, deep, why, shares = await looked(tmp_path, "start")
    assert report.ok
    assert report.services[0].handlers == []
    assert "handler second" not in deep
    assert why == "None settled"
    assert shares == ["first 3 0", "second 3 0"]


async def test_a_handler_that_catches_up_is_not_settled_and_its_events_are_counted(tmp_path: Path) -> None:
    late = service("first", "second")
    await live(tmp_path, late, *EVENTS)
    async with embedded(tmp_path, late, relay=False) as world:
        database, log = world.running[0].database, await world.store.log_id()
        async with database.transaction() as connection:
            own = {"service": "late", "log": str(log)}
            rows = [own | Span(bucket, "second", BEHIND, -1, -1)._asdict() for bucket in range(256)]
            await connection.execute(spans.insert(), rows)
        report = await verify(world.store, [(late, database)])
        deep = await recount(world.store, [(late, database)])
    assert not report.ok
    assert "handler second catches up: done up to position -1, 3 events are pending" in str(report)
    assert not deep.ok
    assert "3 of them are still to be given to handler second" in str(deep)


async def test_a_handler_that_left_is_said_and_is_no_fault(tmp_path: Path) -> None:
    await live(tmp_path, service("first", "second"), *EVENTS)
    await live(tmp_path, service("first"), *EVENTS)
    async with embedded(tmp_path, service("first"), relay=False) as world:
        report = await world.report()
    assert report.ok
    assert "handler second is not in this code" in str(report)


def test_a_span_covers_what_is_above_its_beginning_and_not_above_its_end() -> None:
    assert [Span(0, "h", SKIPPED, 3, 5).covers(position) for position in (3, 4, 5, 6)] == [False, True, True, False]
    assert [Span(0, "h", BEHIND, 3, -1).covers(position) for position in (3, 4, 600)] == [False, True, True]
