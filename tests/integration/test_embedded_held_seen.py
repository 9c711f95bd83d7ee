"""What operators see of held events, and what brings them back: tracebacks, a deploy of other code, quick retries."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import structlog

from tests.integration.databases import database_url
from tests.integration.embedded import Followed, Happened, count, embedded, many, until
from tidings import Context, Hold, Retry, Runtime, Service, Settings
from tidings.database.tables import held

NEVER = Hold(attempts=5, delay=3600.0, maximum=3600.0)


def said(logs: list[Any], *events: str) -> list[dict[str, Any]]:
    return [entry for entry in logs if entry["event"] in events]


async def test_the_first_failure_of_a_kind_is_logged_with_its_traceback_and_the_others_in_one_line(
    tmp_path: Path,
) -> None:
    service = Service("audit")

    @service.on(Happened, retry=Retry(attempts=2, delay=0.001, hold=NEVER))
    async def first(event: Happened) -> None:
        dict[str, int]()["missing"]

    @service.on(Followed, retry=Retry(attempts=1, hold=NEVER))
    async def second(event: Followed) -> None:
        if event.n:
            raise ValueError("with a number")
        raise ValueError("without")

    with structlog.testing.capture_logs() as logs:
        async with embedded(tmp_path, service) as world:
            await world.append(*many(7, 7))
            await world.append(Followed(key="a"), Followed(key="b"), Followed(key="c", n=1))
            await until(lambda: _count(service, held, 10))
    failures = said(logs, "event.retrying", "event.held")
    assert len(failures) == 2 * 7 + 3
    shown = [entry for entry in failures if "exception" in entry]
    assert len(shown) == 3, "two places in one handler, and the other handler"
    (missing,) = (entry for entry in shown if entry["handler"] == "first")
    assert "Traceback" in missing["exception"]
    assert 'dict[str, int]()["missing"]' in missing["exception"]
    for entry in failures:
        file, _, line = entry["place"].rpartition(":")
        assert (file, line.isdecimal()) == (__file__, True)
        assert entry["error"] == ("KeyError" if entry["handler"] == "first" else "ValueError")


async def _count(service: Service, table: sa.Table, number: int) -> bool:
    return await count(service, table) == number


async def test_what_waited_behind_a_held_event_gets_its_quick_retries(tmp_path: Path) -> None:
    service = Service("audit")
    attempts: list[tuple[int, int]] = []
    mended = asyncio.Event()

    @service.on(Happened, retry=Retry(attempts=3, delay=0.001, hold=Hold(attempts=1000, delay=0.05, factor=1)))
    async def handle(event: Happened, context: Context) -> None:
        attempts.append((event.n, context.attempt))
        if event.n == 0 and not mended.is_set():
            raise ValueError("for now")
        if event.n == 1 and context.attempt < 3:
            raise ValueError("twice")

    with structlog.testing.capture_logs() as logs:
        async with embedded(tmp_path, service) as world:
            await world.append(Happened(key="k"), Happened(key="k", n=1), Happened(key="k", n=2))
            await until(lambda: _count(service, held, 3))
            mended.set()
            await world.settled()
    assert [attempt for n, attempt in attempts if n == 1] == [1, 2, 3]
    assert [n for n, _ in attempts if n] == [1, 1, 1, 2]
    assert {entry["position"] for entry in said(logs, "event.held")} == {
        entry["position"] for entry in said(logs, "event.held") if entry["attempt"] >= 3
    }, "the first alone was held again; its follower never"


def failing(*, mended: bool, other: bool = False) -> Service:
    """Declare the handler as it was before, or after, a deploy."""
    service = Service("audit")
    retry = Retry(attempts=1, hold=NEVER)

    async def bad(event: Happened) -> None:
        if event.n % 2:
            raise ValueError("a bug in half of them")

    async def good(event: Happened) -> None:
        """Nothing to do."""

    async def stays(event: Followed) -> None:
        raise ValueError("still")

    service.on(Happened, retry=retry, name="handle")(good if mended else bad)
    service.on(Followed, retry=retry)(stays)
    return service


async def test_after_a_deploy_of_other_code_held_events_of_changed_handlers_are_due_at_once(tmp_path: Path) -> None:
    before = failing(mended=False)
    async with embedded(tmp_path, before) as world:
        await world.append(*many(60, 30), Followed(key="other"))
        await until(lambda: _count(before, held, 31))
    same = failing(mended=False)
    async with embedded(tmp_path, same) as world:
        await world.append(Happened(key="new", n=1))
        await until(lambda: _count(same, held, 32))
        assert await _attempts(same) == {1, 0}, "a restart of the same code changes nothing"
    after = failing(mended=True)
    with structlog.testing.capture_logs() as logs:
        async with embedded(tmp_path, after) as world:
            await until(lambda: _count(after, held, 1))
            assert await _attempts(after) == {1}, "what failed in a handler that did not change waits for its time"
            assert (await world.report()).services[0].held[0].handler == "stays"
    (entry,) = said(logs, "service.tries_held_again")
    assert entry["events"] == 16


async def _attempts(service: Service) -> set[int]:
    async with service.engine.connect() as connection:
        return set(await connection.scalars(sa.select(held.c.attempts)))


def idle(name: str) -> Service:
    service = Service(name)

    @service.on(Happened)
    async def handle(event: Happened) -> None:
        """Nothing to do."""

    return service


async def test_a_service_that_begins_at_the_start_of_a_log_with_history_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with embedded(tmp_path, idle("orders")) as world:
            await world.append(*many(10, 3))
            await world.settled()
        async with embedded(tmp_path, idle("orders")) as world:
            await world.settled()
        assert said(logs, "service.begins_at_the_start") == [], "on an empty log, and where it goes on"
        monkeypatch.setattr("tidings.hosting.beginning.YOUNG_SECONDS", -1.0)
        async with embedded(tmp_path, idle("order")) as world:
            await world.settled()
    (entry,) = said(logs, "service.begins_at_the_start")
    assert (entry["log_level"], entry["service"]) == ("warning", "order")
    assert "If it was renamed" in entry["advice"]


async def test_a_new_service_on_a_young_log_is_no_reason_for_a_warning(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        async with embedded(tmp_path, idle("orders")) as world:
            await world.append(*many(10, 3))
            await world.settled()
        async with embedded(tmp_path, idle("shipping")) as world:
            await world.settled()
    (entry,) = said(logs, "service.begins_at_the_start")
    assert (entry["log_level"], entry["service"]) == ("info", "shipping")


async def test_a_service_whose_database_knows_one_that_is_gone_is_warned_on_a_young_log_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one database for all services, the former name of a renamed service is still in it."""
    monkeypatch.setattr("tidings.database.presence.PARTING_SECONDS", 10.0)
    settings = Settings(
        store=f"sqlite:///{tmp_path}/log.db",
        bus=f"memory://{tmp_path.name}",
        database=database_url(tmp_path, "all"),
    )
    first, beside, renamed = idle("orders"), idle("shipping"), idle("order")
    with structlog.testing.capture_logs() as logs:
        async with Runtime(first, settings=settings) as runtime:
            await first.append("happened-1", Happened(key="k"))
            await runtime.settled()
            async with beside.running(settings, store=runtime.store, bus=runtime.bus):
                """Another service in the database is at work, so it is not a former name of this one."""
        async with Runtime(renamed, settings=settings) as runtime:
            await runtime.settled()
    neighbour, after = said(logs, "service.begins_at_the_start")
    assert (neighbour["log_level"], neighbour["service"]) == ("info", "shipping")
    assert (after["log_level"], after["service"]) == ("warning", "order")
    assert "Its database also knows orders" in after["advice"]
