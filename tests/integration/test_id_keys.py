"""What a service emits reaches the log, and once, whoever appends under its ids, and whatever key made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import pytest
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.databases import remove_database
from tests.integration.embedded import QUICK, Followed, Happened, World, auditing, embedded, followed, letters, rows
from tidings import Aggregate, Context, EventData, Service, evolves
from tidings.errors import ConfigurationError
from tidings.modelling.codec import CAUSATION, CORRELATION
from tidings.protocol.identity import digest
from tidings.protocol.seal import new_key
from tidings.stores import RecordedEvent

pytestmark = [pytest.mark.served, pytest.mark.postgresql]

ONE, TWO = new_key(), new_key()


def keyed(*keys: str) -> dict[str, Any]:
    return {"id_keys": SecretStr(",".join(keys))}


async def outsider(world: World, event: RecordedEvent, kind: str = "Followed") -> None:
    """Append what somebody can who reads the log and knows the code, and is faster than the service."""
    log = str(await world.store.log_id())
    identity = digest("audit", "handle", log, str(event.position), "emit", "followed-a", "Followed", "0")
    metadata = f'{{"{CORRELATION}":"c","schemaVersion":1,"{CAUSATION}":"{event.id}","tidingsHandler":"audit.handle"}}'
    await world.store.append("followed-a", [EventData(kind, b'{"key":"a","n":666}', metadata.encode(), id=identity)])


def preceded(worlds: list[World], kind: str = "Followed") -> Service:
    """Declare a service whose handler is always preceded by the outsider."""

    async def follow(event: Happened, context: Context, session: AsyncSession) -> None:
        if worlds:
            await outsider(worlds[0], context.event, kind)
        context.emit(f"followed-{event.key}", Followed(key=event.key, n=event.n))

    return auditing("audit", follow)


async def numbers(world: World) -> list[int]:
    return [n for _, n in await followed(world.store)]


async def test_an_outsider_who_appends_first_keeps_no_event_of_a_service_with_a_key_out_of_the_log(
    tmp_path: Path,
) -> None:
    worlds: list[World] = []
    async with embedded(tmp_path, preceded(worlds), **keyed(ONE)) as world:
        worlds.append(world)
        await world.append(*(Happened(key="a", n=n) for n in range(5)))
        await world.settled()
        found = await numbers(world)
    assert [n for n in found if n != 666] == list(range(5))
    assert found.count(666) == 5


async def test_without_a_key_an_outsider_who_is_first_keeps_the_real_event_out(tmp_path: Path) -> None:
    """As docs/trust.md says."""
    worlds: list[World] = []
    async with embedded(tmp_path, preceded(worlds), relay=True) as world:
        worlds.append(world)
        await world.append(Happened(key="a", n=1))
        await world.settled()
        assert await numbers(world) == [666]


async def test_a_foreign_event_under_an_open_id_keeps_nothing_out_when_old_events_run_again(tmp_path: Path) -> None:
    service = auditing("audit", _follow)
    async with embedded(tmp_path, service, **keyed("open")) as world:
        await world.append(Happened(key="a", n=1))
        await world.settled()
        assert await numbers(world) == [1]
    async with embedded(tmp_path, service, relay=False, **keyed(ONE, "open")) as world:
        await world.append(Happened(key="a", n=2))
        async for event in world.store.read_all(backwards=True, limit=1):
            await outsider(world, event, "Other")
    await remove_database(tmp_path, "audit")
    async with embedded(tmp_path, service, **keyed(ONE, "open")) as world:
        await world.settled()
        assert await numbers(world) == [1, 2]
        assert "of stream 'followed-a', position" in (world.running[0].taken.told or "")


async def _follow(event: Happened, context: Context, session: AsyncSession) -> None:
    context.emit(f"followed-{event.key}", Followed(key=event.key, n=event.n))


async def test_keys_change_and_databases_are_lost_and_nothing_is_emitted_twice(tmp_path: Path) -> None:
    service = auditing("audit", _follow)
    for n, keys in enumerate((("open",), (ONE, "open"), (TWO, ONE, "open"), (ONE, TWO, "open"), (TWO, ONE, "open@1"))):
        async with embedded(tmp_path, service, **keyed(*keys)) as world:
            await world.append(Happened(key="a", n=n))
            await world.settled()
            assert sorted(await numbers(world)) == list(range(n + 1)), keys
        if n < 3:
            await remove_database(tmp_path, "audit")


async def test_a_service_does_not_start_without_a_key_that_it_has_used(tmp_path: Path) -> None:
    service = auditing("audit", _follow)
    async with embedded(tmp_path, service, **keyed(ONE)) as world:
        await world.append(Happened(key="a", n=1))
        await world.settled()
    for other in (keyed(TWO), {}):
        with pytest.raises(ConfigurationError, match="'audit' has made ids of emitted events with key"):
            async with embedded(tmp_path, service, **other):
                raise AssertionError("it started")
    async with embedded(tmp_path, service, **keyed(TWO, ONE)) as world:
        await world.append(Happened(key="a", n=2))
        await world.settled()
        assert await numbers(world) == [1, 2]
        assert len(await rows(service)) == 2
        assert not await letters(service)


# ---- what requests emit ------------------------------------------------------------------------


async def test_a_request_that_is_repeated_after_its_key_has_changed_appends_nothing_twice(tmp_path: Path) -> None:
    service = auditing("audit")

    async def book(world: World) -> UUID:
        async with service.transaction(idempotency_key="request-1") as (_, emit):
            return emit("followed-a", Followed(key="a", n=1))

    ids = []
    for keys in (("open",), (ONE, "open"), (TWO, ONE, "open@0")):
        async with embedded(tmp_path, service, **keyed(*keys)) as world:
            ids.append(await book(world))
            await world.settled()
            assert await numbers(world) == [1]
    assert len(set(ids)) == 3


# ---- what handlers decide ------------------------------------------------------------------------


class Account(Aggregate):
    def __init__(self) -> None:
        self.total = 0

    def add(self, n: int) -> None:
        self.record(Followed(key=self.id, n=n))

    @evolves(Followed)
    def added(self, event: Followed) -> None:
        self.total += event.n


async def test_a_change_is_made_once_under_whatever_key_and_is_kept_out_by_nobody(tmp_path: Path) -> None:
    service, fails, before = Service("audit"), [True], list[World]()
    accounts = service.repository(Account)

    @service.on(Happened, retry=QUICK)
    async def handle(event: Happened, context: Context) -> None:
        if before:  # somebody else appends under the id that the change would have without a key
            log = str(await before[0].store.log_id())
            base = digest("audit", "handle", log, str(context.position), "change", "account-a", "add", "0")
            foreign = EventData("Followed", b'{"key":"a","n":1000}', b'{"schemaVersion":1}', id=uuid5(base, "0"))
            await before[0].store.append("account-a", [foreign])
        await context.change(accounts, "a", Account.add, event.n)
        if fails and fails.pop():
            raise RuntimeError("after the change")

    async with embedded(tmp_path, service, **keyed("open")) as world:
        await accounts.create("a", Account.add, 0)
        await world.append(Happened(key="a", n=1))
        await world.settled()
    await remove_database(tmp_path, "audit")
    async with embedded(tmp_path, service, **keyed(ONE, "open")) as world:
        await world.settled()
        assert (await accounts.load("a")).total == 1
        before.append(world)
        await world.append(Happened(key="a", n=10))
        await world.settled()
        assert (await accounts.load("a")).total == 1011
        assert "'Followed' of stream 'account-a'" in (world.running[0].taken.told or "")
