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

from tidings.buses import Delivery, Subscription
from tidings.database.inbox import Remembered
from tidings.delivery.healing import Pass
from tidings.delivery.intake import Intake
from tidings.delivery.pipeline import Pipeline
from tidings.delivery.site import TRUSTING, Joined
from tidings.errors import BusUnavailable, DatabaseUnavailable, Fenced
from tidings.protocol.message import Marker
from tidings.protocol.position import ALL_BUCKETS, Accepted

LOG = uuid4()


class Silent:
    """A bus, and a clock: time passes, one marker arrives, and then nothing more."""

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


async def taking(
    bus: Silent, *, known: int, settled: int, idle: bool = True, resized: Exception | None = None
) -> tuple[list[str], list[int]]:
    """Run a process that knows floor `known` where `settled` is committed. Return its log events, and the floors from
    which it began anew. Raises what ends it."""
    begun: list[int] = []
    accepted = Accepted(ALL_BUCKETS, known, {})

    async def committed() -> int:
        return settled

    async def join() -> Remembered:
        return Remembered(settled, {})

    async def check_layout() -> None:
        if resized is not None:
            raise resized

    async def resume(remembered: Remembered) -> None:
        begun.append(accepted.reached)

    async def take_over(*, unless_at_work: bool) -> None:
        assert not unless_at_work, "the bus has chosen it"

    takeover = SimpleNamespace(take_over=take_over, resume=resume, stand_by=lambda: None)
    admission = SimpleNamespace(settle=lambda step: None)
    pipeline: Any = SimpleNamespace(floor=known, idle=idle, takeover=takeover, admission=admission)
    site = SimpleNamespace(
        trust=TRUSTING, bus=bus, store=None, clock=lambda: bus.now, service=SimpleNamespace(prefetch=10)
    )
    inbox = SimpleNamespace(read_floor=committed, join=join, check_layout=check_layout)
    joined: Any = SimpleNamespace(site=site, inbox=inbox, lineage=SimpleNamespace(log=LOG))
    intake = Intake(
        Subscription("shop"),
        cast("Joined", joined),
        accepted,
        cast("Pipeline", pipeline),
        cast("Pass", SimpleNamespace(under_way=False, start=lambda upto: None)),
        head=9,
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
            assert intake.pulse.marker == 9, "the delivery was taken"
    return [line["event"] for line in logs], begun


CHOSEN = ["service.connected", "service.consuming"]


async def test_a_process_whose_service_was_resized_makes_no_queue() -> None:
    with pytest.raises(Fenced, match="resized"):
        await taking(Silent(1), known=6, settled=6, resized=Fenced("it was resized"))


async def test_a_process_connects_to_the_bus_though_its_database_does_not_answer() -> None:
    assert await taking(Silent(1), known=6, settled=6, resized=DatabaseUnavailable("away")) == (CHOSEN, [6])


async def test_a_process_says_that_it_consumes_when_it_is_given_something() -> None:
    assert await taking(Silent(1), known=6, settled=6) == (CHOSEN, [6])


async def test_a_standby_that_takes_over_begins_where_the_other_process_ended() -> None:
    assert await taking(Silent(1), known=6, settled=8) == (CHOSEN, [8])


async def test_work_of_an_earlier_connection_is_gone_on_with_while_nobody_else_did_any() -> None:
    assert await taking(Silent(1), known=6, settled=6, idle=False) == (CHOSEN, [])


async def test_work_of_an_earlier_connection_is_given_up_where_another_process_has_gone_on() -> None:
    with pytest.raises(Fenced, match=r"taking over from another process, .* up to position 8; .* knew of position 6"):
        await taking(Silent(1), known=6, settled=8, idle=False)


class Unbound(Silent):
    """A bus that delivers nothing before it was provisioned three times, and cannot be reached the second time."""

    provisioned = 0

    async def provision(self, subscription: Subscription | None = None) -> None:
        self.provisioned += 1
        if self.provisioned == 2:
            raise BusUnavailable("not now")

    async def _deliveries(self) -> AsyncIterator[Delivery]:
        while self.provisioned < 3:
            await asyncio.sleep(0.001)
        async for delivery in super()._deliveries():
            yield delivery


async def test_a_service_that_hears_no_marker_binds_its_queue_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay creates a deleted exchange again, but not the bindings of services."""
    monkeypatch.setattr("tidings.delivery.intake.SILENCE_SECONDS", 0.01)
    events, _ = await taking(Unbound(1), known=6, settled=6)
    assert events == ["service.connected", "bus.silent", "service.consuming"]
