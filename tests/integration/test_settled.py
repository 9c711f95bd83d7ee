"""`Runtime.settled` waits while something can move, and says at once when nothing can."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest

from tidings import Event, Hold, Retry, Runtime, Service, Settings


class Asked(Event, key="key"):
    key: str


def failing(retry: Retry, times: int = 10**6) -> Service:
    service, failures = Service("asking"), list[str]()

    @service.on(Asked, retry=retry)
    async def answer(event: Asked) -> None:
        if event.key == "bad" and len(failures) < times:
            failures.append(event.key)
            raise ValueError("no answer")

    return service


def in_memory() -> Settings:
    return Settings(store=f"memory://{uuid4().hex}", bus="memory://", database="sqlite:///:memory:")


LATER = Retry(attempts=1, hold=Hold(delay=600))
DEAD = Retry(attempts=1, hold=None)


@pytest.mark.parametrize(("retry", "events"), [(LATER, 1), (LATER, 3), (DEAD, 2)])
async def test_it_does_not_wait_for_what_is_held_until_later(retry: Retry, events: int) -> None:
    """Events behind a dead one of their key wait for an operator."""
    service = failing(retry)
    async with asyncio.timeout(60), Runtime(service, settings=in_memory()) as runtime:
        for key in ("good", *["bad"] * events):
            await service.append(key, Asked(key=key))
        with pytest.raises(TimeoutError, match="nothing that is held is tried within 300 s") as said:
            await runtime.settled(timeout=300)
        assert "no answer" in str(said.value)


async def test_it_waits_for_what_is_held_until_soon() -> None:
    service = failing(Retry(attempts=1, hold=Hold(delay=2.5, factor=1)), times=1)
    async with Runtime(service, settings=in_memory()) as runtime:
        await service.append("bad", Asked(key="bad"))
        assert (await runtime.settled(timeout=30)).ok


async def test_the_very_first_transaction_waits_for_its_append_too() -> None:
    """The process has joined, and the bus has delivered nothing yet."""
    service = failing(DEAD)
    async with Runtime(service, settings=in_memory()) as runtime:
        async with service.transaction() as (_, emit):
            emit("one", Asked(key="first"))
        await service.append("one", Asked(key="second"))
        events = [event async for event in runtime.store.read_stream("one")]
        assert [b"first" in event.data for event in events] == [True, False]


async def test_dead_letters_are_settled() -> None:
    service = failing(DEAD)
    async with Runtime(service, settings=in_memory()) as runtime:
        await service.append("bad", Asked(key="bad"))
        assert (await runtime.settled(timeout=30)).services[0].dead_count == 1
