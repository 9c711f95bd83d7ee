"""An outage is told at once, then ever more seldom, and its end once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tidings._support import telling
from tidings._support.telling import KINDS, Telling


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def warning(self, event: str, **facts: Any) -> None:
        self.lines.append((event, facts))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_an_outage_of_an_hour_is_told_ten_times_and_not_twothousand(log: Log, clock: Clock) -> None:
    told = Telling(log, clock)
    for n in range(2400):
        told.failed("relay.interrupted", f"no answer to request {n} within 2.5 s", relay="main")
        clock.now += 1.5
    told.over("relay.resumed", relay="main")
    assert log.lines[0] == (
        "relay.interrupted",
        {"error": "no answer to request 0 within 2.5 s", "relay": "main"},
    )
    lasting = [facts["lasting"] for _, facts in log.lines[1:-1]]
    assert lasting == [60.0, 180.0, 420.0, 900.0, 1500.0, 2100.0, 2700.0, 3300.0]
    assert log.lines[1][1]["attempts"] == 41
    assert log.lines[-1] == ("relay.resumed", {"seconds": 3600.0, "attempts": 2400, "relay": "main"})
    told.over("relay.resumed")
    assert len(log.lines) == 10, "an end is told once"


def test_another_failure_of_the_same_outage_is_told_at_once(log: Log, clock: Clock) -> None:
    told = Telling(log, clock)
    for _ in range(10):
        told.failed("service.rejoining", "connection refused")
        told.failed("service.rejoining", "the server is starting up")
        told.failed("bus.lost", "connection refused")
        clock.now += 1
    assert [(event, facts["error"]) for event, facts in log.lines] == [
        ("service.rejoining", "connection refused"),
        ("service.rejoining", "the server is starting up"),
        ("bus.lost", "connection refused"),
    ]


def test_failures_that_are_never_the_same_do_not_fill_the_log_either(log: Log, clock: Clock) -> None:
    told = Telling(log, clock)
    for n in range(500):
        told.failed("service.rejoining", "x" * n)
    assert len(log.lines) == KINDS
    told.failed("staged.waiting", "of stream a", kind="")
    assert len(log.lines) == KINDS


def test_the_next_outage_is_told_anew(log: Log, clock: Clock) -> None:
    told = Telling(log, clock)
    for _ in range(2):
        told.failed("process.waiting", "connection refused", kind="")
        told.failed("process.waiting", "no route", kind="")
        told.over("process.goes_on")
    assert [event for event, _ in log.lines] == ["process.waiting", "process.goes_on"] * 2
    assert log.lines[3][1]["attempts"] == 2


async def test_what_only_seems_over_is_not_told(log: Log, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    timers: list[float] = []
    later = loop.call_later

    def counted(delay: float, *rest: Any) -> asyncio.TimerHandle:
        timers.append(delay)
        return later(delay, *rest)

    monkeypatch.setattr(telling, "STEADY_SECONDS", 1e-3)
    monkeypatch.setattr(loop, "call_later", counted)
    told = Telling(log, clock)
    told.seems_over("service.rejoined")
    assert not timers, "there was no outage"
    told.failed("service.rejoining", "away")
    told.seems_over("service.rejoined")
    told.failed("service.rejoining", "away")
    clock.now += 30
    told.seems_over("service.rejoined")
    told.seems_over("service.rejoined")
    assert timers == [1e-3, 1e-3]
    clock.now += 5
    while len(log.lines) < 2:
        await asyncio.sleep(1e-3)
    assert log.lines[1:] == [("service.rejoined", {"seconds": 30.0, "attempts": 2})]


async def test_whose_task_has_ended_tells_no_end(log: Log, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "STEADY_SECONDS", 1e-3)
    told = Telling(log, clock)

    async def join() -> None:
        told.seems_over("service.rejoined")

    told.failed("service.rejoining", "away")
    await asyncio.create_task(join())
    while told._seems_over is not None:
        await asyncio.sleep(1e-3)
    assert len(log.lines) == 1
