"""A handler that always fails is paused alone: its events are held and tried key by key, everything else goes on."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from structlog.testing import capture_logs

from tests.integration.embedded import (
    Followed,
    Happened,
    assert_once_in_order,
    audit,
    count,
    embedded,
    letters,
    many,
    note,
    rows,
    tables,
    until,
)
from tidings import Context, Hold, Retry, Service
from tidings.database.tables import held

pytestmark = pytest.mark.timeout(60)

PAUSES = (0.05, 0.2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidings.delivery.breaker.PAUSES", PAUSES)


class Trouble:
    """Makes the handler of `Happened` fail for these keys; without keys, for all."""

    def __init__(self, *keys: str) -> None:
        self.keys: set[str] | None = set(keys) or None
        self.mended = False
        self.tried: list[str] = []

    def meet(self, event: Happened) -> None:
        self.tried.append(event.key)
        if not self.mended and (self.keys is None or event.key in self.keys):
            raise LookupError("no such appointment")


def two_handlers(trouble: Trouble, *, transactional: bool = True, retry: Retry | None = None) -> Service:
    service = Service("audit", tables=tables)
    retry = retry or Retry(attempts=3, delay=0.01, hold=Hold(attempts=50, delay=0.05, maximum=0.2))

    async def with_session(event: Happened, session: AsyncSession) -> None:
        await note(session, event)
        trouble.meet(event)

    async def without(event: Happened) -> None:
        trouble.meet(event)

    service.on(Happened, name="bad", retry=retry)(with_session if transactional else without)

    @service.on(Followed)
    async def good(event: Followed, session: AsyncSession) -> None:
        await session.execute(sa.insert(audit).values(key=event.key, n=event.n))

    return service


@pytest.mark.parametrize("transactional", [True, False])
async def test_other_handlers_and_keys_go_on_while_one_handler_is_paused(tmp_path: Path, transactional: bool) -> None:
    trouble = Trouble()
    service = two_handlers(trouble, transactional=transactional)
    good = [Followed(key=f"good-{n % 7}", n=n) for n in range(50)]
    async with embedded(tmp_path, service) as world:
        await world.append(*(Happened(key=f"bad-{n}", n=n) for n in range(40)))
        running = world.running[0]
        await until(lambda: running.paused is not None)
        assert list(running.paused_handlers) == ["bad"]
        assert "no such appointment" in (running.paused or "")
        await until(lambda: _held(service, 40))
        tried = len(trouble.tried)
        await world.append(*(Happened(key=f"late-{n}", n=n) for n in range(100)))
        await until(lambda: _held(service, 140))
        assert len(trouble.tried) - tried < 40, "they are held without an attempt, but for some trials"
        await world.append(*good)
        await until(lambda: _done(service, len(good)), 5)
        assert sorted(await rows(service)) == sorted((event.key, event.n) for event in good)
        report = (await world.report()).services[0]
        assert (report.pending_count, report.held_count) == (0, 140), "what is not tried is held, and can be skipped"
        assert running.paused is not None


async def test_trials_go_from_key_to_key_and_each_says_what_failed_and_what_is_next(tmp_path: Path) -> None:
    """Half of the handler's events can succeed: those that cannot do not hide a recovery."""
    bad = [f"bad-{n}" for n in range(20)]
    trouble = Trouble(*bad)
    service = two_handlers(trouble)
    with capture_logs() as logs:
        async with embedded(tmp_path, service) as world:
            running = world.running[0]
            await world.append(*(Happened(key=key) for key in bad))
            await until(lambda: running.paused is not None)
            await until(lambda: sum(line["event"] == "handler.trial_failed" for line in logs) >= 6)
            await world.append(*(Happened(key=f"good-{n}") for n in range(20)))
            await until(lambda: _done(service, 20))
            trouble.mended = True
            await world.settled()
            assert len(await rows(service)) == 40
            assert running.paused is None
    trials = [line for line in logs if line["event"] == "handler.trial_failed"]
    assert len({line["key"] for line in trials[:6]}) >= 5, "each trial is of another key"
    for line in trials:
        assert line["handler"] == "bad"
        assert line["reason"] == "LookupError: no such appointment"
        assert line["log_level"] == "warning"
        assert line["next_trial_in"] > 0
        assert {"event_id", "stream", "position", "trial", "next"} <= line.keys()
    assert next(line["handler"] for line in logs if line["event"] == "handler.paused") == "bad"
    assert "handler.resumed" in [line["event"] for line in logs]


@pytest.mark.parametrize("hold", [Hold(attempts=2, delay=0.01), None])
async def test_trials_count_so_that_poison_is_dead_in_the_end(tmp_path: Path, hold: Hold | None) -> None:
    trouble = Trouble()
    service = two_handlers(trouble, retry=Retry(attempts=2, delay=0.01, hold=hold, hold_key=False))
    async with embedded(tmp_path, service) as world:
        events = [Happened(key=f"bad-{n}") for n in range(24)]
        await world.append(*events)
        await until(lambda: world.running[0].paused is not None)
        await until(lambda: _dead(service, len(events)), 40)
        assert await count(service, held) == 0
        expected = 2 + (hold.attempts if hold else 0)
        assert {letter.attempts for letter in await letters(service)} <= {2, expected, expected - 1}
        assert all(letter.handler == "bad" for letter in await letters(service))
        assert all(trouble.tried.count(event.key) >= 2 for event in events), "each had its quick attempts, too"


async def test_each_handler_keeps_its_order_per_key_while_one_is_paused(tmp_path: Path) -> None:
    """Events of one key have two handlers: neither waits for the other, and both keep their order."""
    trouble = Trouble()
    service = two_handlers(trouble)
    numbers: dict[str, int] = defaultdict(int)
    events: list[Happened | Followed] = []
    for n in range(400):
        key = f"k{n * 7919 % 40}"
        kind: Any = Happened if n * 31 % 3 else Followed
        events.append(kind(key=key, n=numbers[key]))
        numbers[key] += 1
    async with embedded(tmp_path, service) as world:
        running = world.running[0]
        for event in events[:200]:
            await service.append(f"mixed-{event.key}", event)
        await until(lambda: running.paused is not None)
        for event in events[200:300]:
            await service.append(f"mixed-{event.key}", event)
        await until(lambda: len(trouble.tried) > 80)
        trouble.mended = True
        for event in events[300:]:
            await service.append(f"mixed-{event.key}", event)
        await world.settled()
        found = await rows(service)
        for kind in (Happened, Followed):
            own = {(event.key, event.n) for event in events if isinstance(event, kind)}
            expected = [Happened(key=key, n=n) for key, n in own]
            assert_once_in_order([row for row in found if row in own], expected)
        assert len(found) == len(events)


async def test_a_paused_handler_whose_events_were_all_dropped_is_tried_with_the_next_one(tmp_path: Path) -> None:
    trouble = Trouble()
    service = two_handlers(trouble)
    async with embedded(tmp_path, service) as world:
        running = world.running[0]
        await world.append(*(Happened(key=f"bad-{n}") for n in range(30)))
        await until(lambda: running.paused is not None)
        await until(lambda: _held(service, 30))
        async with running.database.transaction() as connection:
            await connection.execute(held.delete())
        trouble.mended = True
        await until(lambda: running.paused is not None)
        await world.append(Happened(key="new", n=1))
        await until(lambda: _done(service, 1))
        assert running.paused is None


@pytest.mark.parametrize("transactional", [True, False])
async def test_what_was_held_for_a_paused_handler_outlives_a_restart(tmp_path: Path, transactional: bool) -> None:
    broken, mended = Trouble(), Trouble("nobody")
    events = many(60, 30)
    first = two_handlers(broken)
    async with embedded(tmp_path, first) as world:
        await world.append(*events)
        await until(lambda: _held(first, 60))
    second = two_handlers(mended, transactional=transactional)
    async with embedded(tmp_path, second) as world:
        await world.settled()
        if transactional:
            assert_once_in_order(await rows(second), events)
        assert len(mended.tried) == len(events)


async def test_context_attempt_counts_trials(tmp_path: Path) -> None:
    seen: dict[int, list[int]] = defaultdict(list)
    service = Service("audit", tables=tables)

    @service.on(Happened, retry=Retry(attempts=1, hold=Hold(attempts=3, delay=0.01), hold_key=False))
    async def bad(event: Happened, context: Context) -> None:
        seen[context.position].append(context.attempt)
        raise LookupError

    async with embedded(tmp_path, service) as world:
        await world.append(*(Happened(key=f"bad-{n}") for n in range(22)))
        await until(lambda: _dead(service, 22), 40)
        assert all(attempts == list(range(1, len(attempts) + 1)) for attempts in seen.values())


async def _done(service: Service, number: int) -> bool:
    return await count(service, audit) == number


async def _held(service: Service, number: int) -> bool:
    return await count(service, held) == number


async def _dead(service: Service, number: int) -> bool:
    return len(await letters(service)) == number
