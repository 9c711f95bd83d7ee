"""Whoever may publish on the bus claims positions that the log has not reached: nothing that the log holds is lost.

Believed, each of these makes a service pass over real events, or run a forged one in place of a real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from tests.integration.embedded import World, assert_once_in_order, auditing, embedded, letters, many, rows, until
from tidings import Relay, Service
from tidings._support.tasks import supervised
from tidings.hosting.gathering import Probe
from tidings.operations.verify import last_carried
from tidings.protocol.message import Marker, Message, encode
from tidings.protocol.position import CARRIED, bucket_of, carried
from tidings.protocol.seal import Seal, read_keys
from tidings.relay.checkpoints import read_checkpoint
from tidings.stores import RecordedEvent

pytestmark = pytest.mark.postgresql

EVENTS = many(40, 7)
KEY = "key-0"


async def marker(world: World, *, position: int | None = None, **claims: Any) -> Message:
    head = await world.store.head()
    claim = head + 20 if position is None else position
    return Marker(
        await world.store.log_id(),
        claim,
        claims.get("base", -1),
        {bucket_of(KEY): claim} if "touched" in claims else {},
    ).encode()


async def event(world: World, ahead: int) -> Message:
    position = await world.store.head() + ahead
    data, metadata = b'{"key":"%s","n":666}' % KEY.encode(), b'{"partitionKey":"%s"}' % KEY.encode()
    record = RecordedEvent(position, "forged", 0, "Happened", data, metadata, True, uuid4().bytes, 0)
    return encode(record, log=await world.store.log_id(), previous=-1, bucket=bucket_of(KEY))


@asynccontextmanager
async def quiet(folder: Path, service: Service) -> AsyncIterator[World]:
    """Run a service that has handled half of the events, when the relay appends nothing more: its checkpoints move the
    head, too."""
    async with embedded(folder, service) as world:
        await world.append(*EVENTS[:20])
        await world.settled()

        async def stored() -> bool:
            return await read_checkpoint(world.store, "main") >= await last_carried(world.store)

        await until(stored)
        yield world


FORGERIES: dict[str, Callable[[World], Awaitable[Message]]] = {
    "marker that raises the floor": marker,
    "marker with a base beyond the log": lambda world: marker(world, base=2**62, position=5),
    "marker that touches beyond the log": lambda world: marker(world, touched=True),
    "marker that passes over the log for ever": lambda world: marker(world, position=2**63 - 1, base=2**63 - 1),
    "event far ahead": lambda world: event(world, 20),
    "event in the next one's place": lambda world: event(world, 1),
    "event at the end of all positions": lambda world: event(world, 2**62),
}


@pytest.mark.parametrize("what", list(FORGERIES))
async def test_what_claims_more_than_the_log_holds_is_refused_named_and_loses_nothing(
    tmp_path: Path, what: str
) -> None:
    service = auditing()
    async with quiet(tmp_path, service) as world:
        with capture_logs() as logs:
            async with world.publisher() as publisher:
                await publisher.send(await FORGERIES[what](world))
            await world.append(*EVENTS[20:])
            await world.settled()
        assert_once_in_order(await rows(service), EVENTS)
        assert await letters(service) == []
        (refused,) = [line for line in logs if line["event"] == "message.refused"]
        assert refused["refused"] == 1
        assert "the log ends at" in refused["reason"]
        (part,) = world.running[0].partitions
        assert part.refused is not None
        assert part.refused.endswith(refused["reason"])
        assert world.running[0].joins == 1


async def test_a_marker_of_another_log_that_waited_beside_one_of_a_third_is_not_taken_for_our_own(
    tmp_path: Path,
) -> None:
    service = auditing()
    async with quiet(tmp_path, service) as world:
        head, log, other, third = await world.store.head(), await world.store.log_id(), uuid4(), uuid4()
        async with world.publisher() as publisher:
            for forged in (
                Marker(other, 1, 0, {}),
                Marker(log, head + 999, -1, {}),
                Marker(other, head + 60, -1, {}),
                Marker(third, 1, 0, {}),
            ):
                await publisher.send(forged.encode())
        await world.append(*EVENTS[20:])
        await world.settled()
        assert_once_in_order(await rows(service), EVENTS)


# ---- at or below the head, only a key or the log itself tells what is forged --------------------

KEYS = SecretStr("5eed" * 16)


async def handled_of_forged(folder: Path, **trust: Any) -> tuple[list[int], int, int]:
    """Have a forged event arrive in the place of one that the log holds, before the relay publishes. Return the numbers
    that were handled, how many messages were refused, and the joins."""
    service = auditing()
    async with embedded(folder, service, relay=False, **trust) as world:
        await world.append(*EVENTS[:3])
        (first,) = [event async for event in world.store.read_all(limit=1, filter=CARRIED)]
        forged = first._replace(data=b'{"key":"k0","n":666}')
        bucket = carried(first)
        assert bucket is not None
        async with world.publisher() as publisher:
            message = encode(forged, log=await world.store.log_id(), previous=-1, bucket=bucket)
            await publisher.send(message)
            await publisher.send(replace(message, headers={**message.headers, "tidings-seal": "0" * 32}))
        (part,) = world.running[0].partitions
        await until(lambda: part.intake is not None and part.intake.pulse.heard + part.intake.pulse.refused >= 2)
        if trust.get("bus_keys") is not None:
            assert part.heard_age is None, "what is refused is not heard: it excuses no missing marker"
        seal = None if trust.get("bus_keys") is None else Seal(read_keys(KEYS.get_secret_value()))
        relay = Relay(world.store, world.bus, marker_seconds=0.2, checkpoint_seconds=0.1, seal=seal)
        async with supervised(relay.run()):
            await world.settled()
            await world.append(*EVENTS[3:])
            await world.settled()
        assert part.intake is not None
        assert await letters(service) == []
        return sorted(n for _, n in await rows(service)), part.intake.pulse.refused, world.running[0].joins


async def test_with_a_key_nothing_is_taken_that_the_relay_has_not_sealed(tmp_path: Path) -> None:
    numbers, refused, joins = await handled_of_forged(tmp_path, bus_keys=KEYS)
    assert numbers == sorted(event.n for event in EVENTS)
    assert (refused, joins) == (2, 1)


async def test_read_from_the_log_a_forged_message_only_rings_the_bell(tmp_path: Path) -> None:
    numbers, _, joins = await handled_of_forged(tmp_path, bus_content="log")
    assert numbers == sorted(event.n for event in EVENTS)
    assert joins == 1


async def test_read_from_the_log_what_cannot_be_read_is_counted_and_kept_nowhere(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service, bus_content="log") as world:
        await world.append(*EVENTS[:3])
        async with world.publisher() as publisher:
            for number in range(20):
                await publisher.send(Message(b"x" * 1000, f"m{number}", "Happened"))
        await world.append(*EVENTS[3:])
        await world.settled()
        (part,) = world.running[0].partitions
        assert part.intake is not None
        assert part.intake.pulse.refused == 20
        assert part.refused is not None
        assert "cannot be read" in part.refused
        assert await letters(service) == []
        assert_once_in_order(await rows(service), EVENTS)


async def test_without_either_whoever_may_publish_is_believed_up_to_the_head(tmp_path: Path) -> None:
    """SECURITY.md says so: this is what the two others keep out."""
    numbers, _, _ = await handled_of_forged(tmp_path)
    assert 666 in numbers


@pytest.mark.parametrize("content", ["message", "log"])
async def test_with_a_key_everything_is_handled_once_and_in_order(tmp_path: Path, content: str) -> None:
    service = auditing()
    async with embedded(tmp_path, service, bus_keys=KEYS, bus_content=content) as world:
        for event in EVENTS:
            await world.append(event)
        await world.settled()
        assert_once_in_order(await rows(service), EVENTS)
        (part,) = world.running[0].partitions
        assert part.refused is None


# ---- old messages, sent again ---------------------------------------------------------------------


@pytest.mark.parametrize("trust", [{}, {"bus_keys": KEYS}, {"bus_keys": KEYS, "bus_content": "log"}], ids=str)
async def test_old_markers_that_are_sent_for_ever_hide_neither_a_dead_relay_nor_what_the_log_holds(
    tmp_path: Path, trust: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("own_clock.SILENT_SECONDS", "own_clock.LOOK_SECONDS", "intake.SILENCE_SECONDS"):
        monkeypatch.setattr(f"tidings.delivery.{name}", 0.2)
    service = auditing()
    seal = Seal(read_keys(KEYS.get_secret_value())) if trust else None
    async with embedded(tmp_path, service, relay=False, **trust) as world:
        relay = Relay(world.store, world.bus, marker_seconds=0.2, checkpoint_seconds=0.1, seal=seal)
        async with supervised(relay.run()):
            await world.append(*EVENTS[:20])
            await world.settled()
        (part,) = world.running[0].partitions
        assert part.intake is not None
        pulse, log, last = part.intake.pulse, await world.store.log_id(), relay.confirmed
        old = [Marker(log, position, position - 1, {}).encode(seal) for position in (last, last - 1, 1, last)]

        async def again() -> None:
            async with world.publisher() as publisher:
                while True:
                    for marker in old:
                        await publisher.send(marker)
                    await asyncio.sleep(0.02)

        async with supervised(again()):
            before = pulse.heard
            await until(lambda: pulse.heard > before + 20)
            assert part.marker_age is not None
            assert part.marker_age < 30, "the log holds nothing more: the relay may be at rest"
            await world.append(*EVENTS[20:])
            await until(handled(service, len(EVENTS)))
            heard_at, before = pulse.marker_at, pulse.heard
            await until(lambda: pulse.heard > before + 20)
            assert pulse.marker_at == heard_at, "a marker that falls short of the log proves no relay"
            assert part.read_age is not None
            async with supervised(Relay(world.store, world.bus, marker_seconds=0.2, seal=seal).run()):
                await until(lambda: pulse.marker_at != heard_at)
                await world.settled()
        assert_once_in_order(await rows(service), EVENTS)


@pytest.mark.parametrize("trust", [{}, {"bus_keys": KEYS}], ids=str)
async def test_old_markers_in_ascending_order_are_no_news_to_a_service_that_was_restarted(
    tmp_path: Path, trust: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a relay told to be started while messages come: it may be one that begins again."""
    for name in ("own_clock.SILENT_SECONDS", "own_clock.LOOK_SECONDS", "intake.SILENCE_SECONDS"):
        monkeypatch.setattr(f"tidings.delivery.{name}", 0.2)
    monkeypatch.setattr("tidings.hosting.checks.MARKER_SECONDS", 0.5)
    service = auditing()
    seal = Seal(read_keys(KEYS.get_secret_value())) if trust else None
    async with embedded(tmp_path, service, relay=False, **trust) as world:
        relay = Relay(world.store, world.bus, marker_seconds=0.2, checkpoint_seconds=0.1, seal=seal)
        async with supervised(relay.run()):
            await world.append(*EVENTS[:20])
            await world.settled()
        last, log = await last_carried(world.store), await world.store.log_id()

        async def stored() -> bool:
            return (await world.report()).services[0].floor >= last

        await until(stored)
    service = auditing()
    async with embedded(tmp_path, service, relay=False, **trust) as world:
        (part,) = world.running[0].partitions
        assert part.intake is not None
        news, probe = part.intake.pulse.news, Probe((service,))

        async def ascending() -> None:
            async with world.publisher() as publisher:
                while True:
                    for position in range(last + 1):
                        await publisher.send(Marker(log, position, position - 1, {}).encode(seal))
                        await asyncio.sleep(0.02)

        async with supervised(ascending()):
            await world.append(*EVENTS[20:])
            await until(handled(service, len(EVENTS)))
            await until(lambda: news.came_at is not None)
            assert news.at is None

            async def told() -> bool:
                document = (await probe.ready()).document()
                (said,) = [str(check) for check in document["checks"] if check["name"] == "audit.markers"]
                return "Messages come, but none newer than position" in said and "start a relay" not in said

            await until(told)
            async with supervised(Relay(world.store, world.bus, marker_seconds=0.1, seal=seal).run()):
                await until(lambda: news.at is not None)
                await world.settled()
        assert_once_in_order(await rows(service), EVENTS)


def handled(service: Service, number: int) -> Callable[[], Awaitable[bool]]:
    async def all_are() -> bool:
        return len(await rows(service)) == number

    return all_are
