"""An event chooses no class to import, no queue, no file, no SQL: what it says arrives as text, letter for letter."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.integration.embedded import Happened, embedded, letters, until
from tidings import Context, Event, EventData, Service
from tidings.modelling.handlers import Hold, Retry
from tidings.protocol.message import encode
from tidings.protocol.position import RESERVED, bucket_of, carried
from tidings.stores import ANY

HOSTILE = [
    "os.system",
    "antigravity:fly",
    "builtins.eval",
    "__import__('antigravity')",
    "../../../../tmp/owned",
    "/etc/passwd",
    "file:///etc/passwd",
    "C:\\windows",
    "'; DROP TABLE tidings_watermarks; --",
    '"; DELETE FROM tidings_dead; --',
    "' OR 1=1 --",
    "%s%(x)s{0}{x.__class__}$(id)`id`",
    ":name ? ?1 @p $1",
    "tidings.order",
    "amq.default",
    "#.*",
    "${jndi:ldap://host/x}",
    "!!python/object/apply:os.system",
    "__proto__",
    "\x00\x1b[2J",
    "x" * 5_000,
]


class Named(Event, name="Named"):
    text: str


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def listening() -> tuple[Service, list[tuple[str, str, object]]]:
    service, heard = Service("hostile"), []

    @service.on(Named, retry=Retry(attempts=1, hold=None, hold_key=False))
    async def hear(event: Named, context: Context) -> None:
        heard.append((event.text, context.event.stream, context.metadata.get("said")))
        if context.metadata.get("die"):
            raise ValueError(event.text)
        if context.metadata.get("wait"):
            raise LookupError(event.text)

    return service, heard


def stored(text: str, **metadata: object) -> EventData:
    document = {"said": text, "$correlationId": text, "tidingsHandler": text, "traceparent": text} | metadata
    return EventData("Named", json.dumps({"text": text, "__class__": text}).encode(), json.dumps(document).encode())


async def test_what_is_handled_and_what_dies_keeps_its_texts_and_touches_nothing_else(tmp_path: Path) -> None:
    service, heard = listening()
    inside = tmp_path / "inside"
    inside.mkdir()
    modules = set(sys.modules)
    async with embedded(inside, service) as world:
        before = files(tmp_path)
        for text in HOSTILE:
            key = {"partitionKey": text}
            await world.store.append(f"s-{text}", [stored(text, **key), stored(text, die=True, **key)], expected=ANY)
            await world.store.append(f"t-{text}", [EventData(text, b"{}", json.dumps(key).encode())], expected=ANY)
        await world.settled()
        assert {(text, stream, said) for text, stream, said in heard} == {(text, f"s-{text}", text) for text in HOSTILE}
        found = await letters(service)
        for letter, text in zip(found, HOSTILE, strict=True):
            assert letter.reason.startswith(f"ValueError: {text}"[:500])
            assert letter.stream == f"s-{text}"
        for letter, text in zip(found, HOSTILE, strict=True):
            readable = text.replace("\x00", "\\x00")  # in a key, which is compared
            kept = readable == text and len(text) <= 1000  # a longer one fits into no index of PostgreSQL's
            assert (letter.key == text) if kept else str(letter.key).startswith(f"{readable[:1000]}...")
        assert len({letter.key for letter in found}) == len(HOSTILE)
        async with world.running[0].database.reading() as connection:
            tables = set(await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names()))
        assert {name for name in tables if name.startswith("tidings")} >= {"tidings_dead", "tidings_watermarks"}
        assert all(name.startswith("hostile.db-begun-") for name in files(tmp_path) - before), "a file of Tidings' own"
    assert "antigravity" not in sys.modules
    assert not {name for name in set(sys.modules) - modules if name.startswith(("os.", "windows", "file"))}


async def test_a_held_event_comes_back_with_every_text_it_had(tmp_path: Path) -> None:
    service, heard = Service("hostile"), []

    @service.on(Named, retry=Retry(attempts=1, hold=Hold(attempts=3, delay=0.01)))
    async def hear(event: Named, context: Context) -> None:
        heard.append((event.text, context.event.stream, context.metadata.get("said")))
        if sum(text == event.text for text, _, _ in heard) < 2:
            raise LookupError(event.text)

    async with embedded(tmp_path, service) as world:
        for text in HOSTILE:
            await world.store.append(f"s-{text}", [stored(text, partitionKey=text)], expected=ANY)
        await world.settled()
    assert sorted(heard) == sorted(2 * [(text, f"s-{text}", text) for text in HOSTILE])


async def test_a_message_whose_every_field_is_hostile_is_settled_and_the_service_goes_on(tmp_path: Path) -> None:
    service, heard = listening()
    async with embedded(tmp_path, service) as world:
        await world.store.append("first", [stored("first")])
        await world.settled()
        (event,) = [event async for event in world.store.read_stream("first")]
        bucket = carried(event)
        assert bucket is not None
        good = encode(event, log=await world.store.log_id(), previous=event.position - 1, bucket=bucket)
        sent = 0
        async with world.bus.publisher() as publisher:
            for text in HOSTILE:
                forged = dict.fromkeys(good.headers, text)
                late = dict(good.headers) | {
                    "cloudEvents_partitionkey": text,
                    "tidings-bucket": bucket_of(text),
                    "cloudEvents_type": text,
                    "cloudEvents_subject": f"s-{text}",
                }
                for message in (
                    replace(good, headers=forged),
                    replace(good, headers=late),
                    replace(good, headers={}, type="tidings.marker", body=json.dumps({"log": text}).encode()),
                    replace(good, headers={text: text}, type=text, correlation_id=text, app_id=text, message_id=text),
                ):
                    await publisher.send(message)
                    sent += 1
        await world.store.append("last", [stored("last")])
        await until(lambda: [text for text, _, _ in heard] == ["first", "last"])
        await world.settled()
        found = await letters(service)
        repeated = [text for text in HOSTILE if not text.startswith(RESERVED)]
        assert len(found) == sent - len(repeated), "a position that was handled is a duplicate, whatever else it says"
        assert {letter.kind for letter in found} == {"message"}
        assert world.running[0].joins == 1


@pytest.mark.parametrize("name", ["$users", "tidings_relay-main", "tidings.marker", "$>", "tidings_Checkpoint"])
@pytest.mark.parametrize("header", ["cloudEvents_subject", "cloudEvents_type"])
async def test_a_message_cannot_bring_what_the_relay_never_carries(tmp_path: Path, name: str, header: str) -> None:
    service, _ = listening()
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="a"))
        await world.settled()
        (event,) = [event async for event in world.store.read_stream("Happened-a")]
        bucket = carried(event)
        assert bucket is not None
        good = encode(event, log=await world.store.log_id(), previous=event.position - 1, bucket=bucket)
        async with world.bus.publisher() as publisher:
            await publisher.send(replace(good, headers={**good.headers, header: name}))
        async with asyncio.timeout(20):
            while not (found := await letters(service)):
                await asyncio.sleep(0.01)
        assert "never carried" in found[0].reason
