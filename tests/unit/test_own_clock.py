"""When a service reads the log without being told to: only while nothing new comes, and only in the process at work."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from tidings.buses import Subscription, TopologyItem
from tidings.delivery.news import News
from tidings.delivery.own_clock import LOOK_SECONDS, SILENT_SECONDS, OwnClock
from tidings.errors import BusUnavailable, DatabaseUnavailable, StoreUnavailable
from tidings.protocol.position import ALL_BUCKETS, Accepted
from tidings.stores import Filter, RecordedEvent

PART = Subscription("shop")


class Surroundings:
    """A log of 10 events for services, of which this one has settled 4, and all else that an `OwnClock` looks at."""

    def __init__(self) -> None:
        self.now, self.head_, self.settled, self.consumers = 1000.0, 10, 4, 1
        self.last, self.heads = 10, 0
        self.active: str | None = "me"
        self.counts_all_consumers = True
        self.error: Exception | None = None
        self.accepted = Accepted(ALL_BUCKETS, 4, {})
        pipeline: Any = SimpleNamespace(floor=4, unsettled=0)
        healing: Any = SimpleNamespace(under_way=False)
        self.pipeline, self.healing = pipeline, healing
        site = SimpleNamespace(store=self, bus=self, clock=lambda: self.now, service=SimpleNamespace(prefetch=10))
        site.process = "me"
        joined: Any = SimpleNamespace(site=site, inbox=self)
        self.news = News()
        self.own_clock = OwnClock(PART, joined, self.accepted, pipeline, healing, self.news)
        self.own_clock.begin()

    async def head(self) -> int:
        if self.error is not None:
            raise self.error
        self.heads += 1
        return self.head_

    async def read_all(self, *, after: int, filter: Filter) -> AsyncIterator[RecordedEvent]:
        """Events for services up to `last`; beyond it a type that no service gets."""
        for position in range(after + 1, self.head_ + 1):
            kind = "Placed" if position <= self.last else "tidings.noted"
            yield RecordedEvent(position, "order-1", position, kind, b"{}", b"", True, bytes(16), 0)

    async def read_floor(self) -> int:
        return self.settled

    async def read_active(self) -> str | None:
        return self.active

    async def inspect(self, subscriptions: list[Subscription]) -> list[TopologyItem]:
        return [TopologyItem("exchange", "e", "fits"), TopologyItem("queue", PART.queue, "fits", "", 0, self.consumers)]

    async def looks(self, times: int = 2, *, chosen: bool = True) -> int | None:
        """Return what the last of some looks said, 5 s apart, after the silence was over."""
        self.now += SILENT_SECONDS
        due = None
        for _ in range(times):
            due = await self.own_clock.due(chosen=chosen)
            self.now += 5.0
        return due


@pytest.fixture
def around() -> Surroundings:
    return Surroundings()


async def test_what_two_looks_in_silence_find_in_the_log_is_read(around: Surroundings) -> None:
    assert await around.looks(1) is None, "a process at work may be about to do it"
    assert await around.looks(1) == 10
    assert around.own_clock.read_at == around.now - 5.0


async def test_nothing_is_read_while_news_comes(around: Surroundings) -> None:
    around.news.hear(5, around.now + SILENT_SECONDS + 10.0)
    assert await around.looks(4) is None


async def test_a_message_that_is_sent_again_and_again_is_no_news(around: Surroundings) -> None:
    around.news.hear(5, around.now)
    around.now += SILENT_SECONDS
    due = None
    for _ in range(2):
        around.now += 5.0
        around.news.hear(5, around.now)
        around.news.hear(3, around.now)
        due = await around.own_clock.due(chosen=True)
    assert due == 10


async def test_a_marker_that_falls_short_of_what_was_found_proves_no_relay(around: Surroundings) -> None:
    assert around.news.current(4)
    await around.looks(2)
    assert not around.news.current(4), "the log holds an event at 5 that was never published"
    assert around.news.current(5)


async def test_what_is_for_no_service_makes_no_marker_old(around: Surroundings) -> None:
    around.last = 4
    assert await around.looks(3) is None
    assert around.news.current(4)
    around.head_, around.last = 11, 11
    assert await around.looks(2) == 11
    assert not around.news.current(10)


async def test_an_idle_log_is_asked_for_its_head_seldom(around: Surroundings) -> None:
    around.accepted.reach(10)
    await around.looks(24)
    assert around.heads <= 24 * 5.0 / LOOK_SECONDS + 1


async def test_nothing_is_read_before_a_new_connection_was_silent(around: Surroundings) -> None:
    await around.looks(1)
    around.own_clock.begin()
    assert await around.own_clock.due(chosen=True) is None


async def test_nothing_is_read_where_everything_was_accepted(around: Surroundings) -> None:
    around.accepted.reach(10)
    assert await around.looks(3) is None


async def test_what_the_first_look_found_is_read_and_no_more(around: Surroundings) -> None:
    await around.looks(1)
    around.head_ = 20
    assert await around.own_clock.due(chosen=True) == 10


async def test_another_process_that_goes_on_is_left_alone(around: Surroundings) -> None:
    around.settled = 9
    assert await around.looks(3) is None


async def test_a_standby_reads_only_if_nobody_else_consumes(around: Surroundings) -> None:
    around.consumers = 2
    assert await around.looks(3, chosen=False) is None
    around.consumers = 1
    assert await around.looks(1, chosen=False) == 10


@pytest.mark.parametrize(("active", "upto"), [(None, 10), ("me", 10), ("another", None)])
async def test_where_the_bus_counts_only_the_consumer_at_work_the_database_says_who_that_is(
    around: Surroundings, active: str | None, upto: int | None
) -> None:
    around.counts_all_consumers, around.active = False, active
    assert await around.looks(2, chosen=False) == upto


async def test_a_full_service_reads_nothing(around: Surroundings) -> None:
    around.pipeline.unsettled = 10
    assert await around.looks(3) is None


async def test_a_pass_under_way_is_enough(around: Surroundings) -> None:
    around.healing.under_way = True
    assert await around.looks(3) is None


@pytest.mark.parametrize("error", [StoreUnavailable("away"), DatabaseUnavailable("away"), BusUnavailable("away")])
async def test_what_does_not_answer_is_asked_again(around: Surroundings, error: Exception) -> None:
    await around.looks(1)
    around.error = error
    assert await around.looks(1) is None
    around.error = None
    assert await around.looks(1) == 10


async def test_it_is_over_when_news_comes(around: Surroundings) -> None:
    assert await around.looks(2) == 10
    around.news.hear(11, around.now)
    assert await around.own_clock.due(chosen=True) is None
    assert around.own_clock.read_at is None
