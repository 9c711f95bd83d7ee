"""Which process of a service takes the deliveries, and what it says about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from tidings.buses import Delivery, EventBus, Subscription
from tidings.dispatch import Dispatcher
from tidings.errors import Fenced
from tidings.healing import Pass
from tidings.inbox import Inbox
from tidings.intake import Intake
from tidings.message import Marker
from tidings.position import ALL_BUCKETS, Accepted

LOG = uuid4()


class Silent:
    """A bus that lets time go by, gives one marker, and then nothing any more. Time is here, too."""

    def __init__(self, silence: float) -> None:
        self.silence = silence
        self.now = 1000.0
        self.given = asyncio.Event()

    async def provision(self, subscription: Subscription | None = None) -> None:
        pass

    @asynccontextmanager
    async def consume(self, subscription: Subscription, *, prefetch: int) -> AsyncIterator[AsyncIterator[Delivery]]:
        yield self._deliveries()

    async def _deliveries(self) -> AsyncIterator[Delivery]:
        self.now += self.silence
        yield Delivery(1, Marker(LOG, 9, 6, {}).encode())
        self.given.set()
        await asyncio.Event().wait()


async def taking(bus: Silent, *, known: int, settled: int) -> list[str]:
    """What a process logs that knew of floor `known` where `settled` is committed; raises what ends it."""

    async def committed(bucket: int | None) -> int:
        return settled

    dispatcher: Any = SimpleNamespace(floor=known, settle=lambda step: None, active=asyncio.Event())
    intake = Intake(
        Subscription("shop"),
        cast("EventBus", bus),
        LOG,
        cast("Inbox", SimpleNamespace(settled=committed)),
        Accepted(ALL_BUCKETS, known, {}),
        cast("Dispatcher", dispatcher),
        cast("Pass", SimpleNamespace(under_way=False, start=lambda upto: None)),
        prefetch=10,
        clock=lambda: bus.now,
    )
    with capture_logs() as logs:
        running = asyncio.create_task(intake.run())
        given = asyncio.create_task(bus.given.wait())
        await asyncio.wait({running, given}, return_when=asyncio.FIRST_COMPLETED, timeout=10)
        given.cancel()
        running.cancel()
        try:
            await running
        except asyncio.CancelledError:
            assert intake.marker == 9, "the delivery was taken"
    return [line["event"] for line in logs]


async def test_a_process_says_that_it_consumes_when_it_is_given_something() -> None:
    assert await taking(Silent(1), known=6, settled=6) == ["service.connected", "service.consuming"]


async def test_a_standby_that_takes_over_begins_where_the_other_process_ended() -> None:
    with pytest.raises(Fenced, match=r"taking over from another process, .* up to position 8; .* knew of position 6"):
        await taking(Silent(3600), known=6, settled=8)


async def test_a_long_silence_alone_makes_nobody_join_again() -> None:
    assert await taking(Silent(3600), known=6, settled=6) == ["service.connected", "service.consuming"]
