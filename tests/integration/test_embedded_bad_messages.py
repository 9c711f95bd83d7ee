"""What stands in a queue without being what the relay wrote: a dead letter with its reason, and the rest goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.integration.embedded import Happened, World, assert_once_in_order, auditing, embedded, letters, many, rows
from tidings import EventData
from tidings.protocol.message import Marker, Message, encode
from tidings.protocol.position import carried
from tidings.stores import JSON

pytestmark = pytest.mark.postgresql

EVENTS = many(40, 7)
OTHER_LOG = UUID("00000000-0000-0000-0000-00000000beef")


async def good(world: World) -> Message:
    """Return the message of the last event."""
    async for event in world.store.read_all(backwards=True):
        bucket = carried(event)
        if bucket is not None:
            return encode(event, log=await world.store.log_id(), previous=event.position - 1, bucket=bucket)
    raise AssertionError


def headers(**changes: Any) -> Any:
    def change(message: Message) -> Message:
        return replace(message, headers={**message.headers, **{f"tidings-{k}": v for k, v in changes.items()}})

    return change


BAD: dict[str, tuple[Any, str]] = {
    "empty headers": (lambda message: replace(message, headers={}), "'tidings-position' is missing"),
    "position no number": (headers(position="twelve"), "'tidings-position' is 'twelve', not an integer"),
    "position a float": (headers(position=1.5), "not an integer"),
    "position true": (headers(position=True), "not an integer"),
    "position huge": (headers(position=2**70), "outside"),
    "previous not below": (headers(previous=2**60), "not below the position"),
    "bucket of another key": (lambda m: headers(bucket=(m.headers["tidings-bucket"] + 1) % 256)(m), "belongs to"),
    "log no UUID": (headers(log="mine"), "not a UUID"),
    "other log": (headers(log=str(OTHER_LOG)), "it belongs to log"),
    "strange content": (lambda m: replace(m, content_type="text/xml"), "content type"),
    "garbage marker": (lambda m: replace(m, type="tidings.marker", headers={}, body=b"\xff\0"), "marker's body"),
    "marker of numbers": (lambda m: replace(m, type="tidings.marker", headers={}, body=b"[1]"), "marker's body"),
    "marker of another log": (lambda m: Marker(OTHER_LOG, 5, 1, {}).encode(), "it belongs to log"),
    "surrogates": (lambda m: Message(b"x", "\udfff", "\ud800\0", {"\ud800": "\0\udfff"}), "missing"),
}


@pytest.mark.parametrize("what", list(BAD))
async def test_a_message_that_cannot_be_read_is_dead_with_its_reason(tmp_path: Path, what: str) -> None:
    change, reason = BAD[what]
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS[:20])
        await world.settled()
        async with world.bus.publisher() as publisher:
            await publisher.send(change(await good(world)))
        await world.append(*EVENTS[20:])
        await world.settled()
        assert_once_in_order(await rows(service), EVENTS)
        (letter,) = await letters(service)
        assert letter.kind == "message"
        assert letter.reason.startswith("MalformedMessage: ")
        assert reason in letter.reason
        assert world.running[0].joins == 1


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (EventData("Happened", b"not json", b'{"partitionKey":"x"}'), "SchemaError"),
        (EventData("Happened", b'{"n": 1}', b"also not json"), "SchemaError"),
        (EventData("Happened", b"not json", b'{"schemaVersion":9}'), "SchemaError"),
        (EventData("Happened", b'{"key":"x"}', b'{"schemaVersion":"new"}'), "SchemaError"),
        (EventData("Happened", b"\0\xff", content_type="application/octet-stream"), "SchemaError"),
        (EventData("Happened", b"[" * 100_000), "SchemaError"),
        (EventData("Unknown", b"anything"), None),
    ],
)
async def test_an_event_that_does_not_fit_is_dead_and_an_unknown_type_passes_by(
    tmp_path: Path, event: EventData, reason: str | None
) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS[:20])
        await world.store.append("foreign", [event])
        await world.append(*EVENTS[20:])
        await world.settled()
        assert_once_in_order(await rows(service), EVENTS)
        found = await letters(service)
        assert [letter.reason.partition(":")[0] for letter in found] == ([reason] if reason else [])
        assert [(letter.attempts, letter.data) for letter in found] == ([(1, event.data)] if reason else [])


async def test_of_a_relay_of_another_log_one_marker_is_kept(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS[:20])
        await world.settled()
        async with world.bus.publisher() as publisher:
            for position in range(5):
                await publisher.send(Marker(OTHER_LOG, position + 1, position, {}).encode())
        await world.append(*EVENTS[20:])
        await world.settled()
        assert_once_in_order(await rows(service), EVENTS)
        (letter,) = await letters(service)
        assert f"it belongs to log {OTHER_LOG}" in letter.reason


async def test_a_flood_of_messages_that_cannot_be_read_does_not_fill_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a relay of another store that publishes its whole log on this bus."""
    monkeypatch.setattr("tidings.delivery.allowance.KEPT", 20)
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS[:20])
        await world.settled()
        strange = headers(log=str(OTHER_LOG))(await good(world))
        async with world.bus.publisher() as publisher:
            for _ in range(200):
                await publisher.send(strange)
        await world.append(*EVENTS[20:])
        await world.settled()
        assert_once_in_order(await rows(service), EVENTS)
        assert len(await letters(service)) == 20
        (part,) = world.running[0].partitions
        assert part.refused is not None
        assert part.refused.startswith("180 messages were refused; the last: a message of type 'Happened'")
        assert str(OTHER_LOG) in part.refused


async def test_a_repeated_message_is_dropped(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS)
        await world.settled()
        message = await good(world)
        assert message.content_type == JSON
        async with world.bus.publisher() as publisher:
            for _ in range(50):
                await publisher.send(message)
        await world.append(Happened(key="last"))
        await world.settled()
        assert_once_in_order(await rows(service), [*EVENTS, Happened(key="last")])
