"""What services have settled, proved from the log: what was replaced, skipped, added or swapped is found, by name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.integration.embedded import (
    Followed,
    Happened,
    StoreAround,
    World,
    auditing,
    embedded,
    emitting,
    many,
    rows,
    settings_for,
    until,
)
from tidings import EventData, EventStore, Relay, Retry, open_store
from tidings._support.tasks import supervised
from tidings.database.engine import open_database
from tidings.database.floors import Floor
from tidings.database.inbox import Inbox
from tidings.database.layout import resize
from tidings.database.tables import floors, proofs, watermarks
from tidings.delivery.intake import Intake
from tidings.errors import ConfigurationError, DatabaseUnavailable
from tidings.operations.recount import Recount, recount
from tidings.operations.replay import find_start, send_back
from tidings.operations.skip import skip
from tidings.protocol.message import Marker, encode
from tidings.protocol.position import BUCKETS, CARRIED, Accepted, Arrival, carried
from tidings.stores import RecordedEvent

pytestmark = [pytest.mark.served, pytest.mark.postgresql]

EVENTS = many(30, 5)
UNWANTED = [Followed(key=f"k{n % 5}", n=n) for n in range(20)]


async def proved(world: World, since: int | None = None) -> Recount:
    running = world.running[0]
    return await recount(world.store, [(running.service, running.database)], since=since)


async def events_of(store: EventStore) -> list[RecordedEvent]:
    return [event async for event in store.read_all(filter=CARRIED)]


def named(event: RecordedEvent) -> str:
    return f"{event.type} {event.id} at {event.stream}@{event.version}, position {event.position}"


async def stored(world: World) -> int:
    """Wait until all is settled and the floor says so. Return the position of the last event."""
    await world.settled()
    last = (await events_of(world.store))[-1].position

    async def is_stored() -> bool:
        return (await world.report()).services[0].floor >= last

    await until(is_stored)
    return last


async def mixed(world: World, part: slice = slice(None)) -> None:
    """Append what the service handles, and between it what no handler wants."""
    for wanted, unwanted in zip(EVENTS[part], [*UNWANTED, *UNWANTED[:10]][part], strict=True):
        await world.append(wanted)
        await world.append(unwanted)


async def test_what_a_service_settled_is_proved_across_restarts_with_events_that_no_handler_wants(
    tmp_path: Path,
) -> None:
    service = auditing()
    for part in (slice(0, 10), slice(10, 20), slice(20, 30)):
        async with embedded(tmp_path, service) as world:
            await mixed(world, part)
            last = await stored(world)
            found = await proved(world)
            assert (found.wrong, found.notes) == ([], [])
            assert found.proved["audit"] >= last
    assert f"audit: proved up to position {found.proved['audit']}" in str(found)


@contextmanager
def deaf_to(wanted: Callable[[int], bool]) -> Iterator[list[int]]:
    """Let services take some events for duplicates, as a bug would."""
    offer, read = Accepted.offer, Accepted.read
    passed: list[int] = []

    def deaf(self: Accepted, bucket: int, position: int, previous: int) -> Arrival:
        arrival = offer(self, bucket, position, previous)
        if arrival is Arrival.NEXT and wanted(position):
            passed.append(position)
            return Arrival.DUPLICATE
        return arrival

    def blind(self: Accepted, bucket: int, position: int) -> bool:
        if read(self, bucket, position):
            if not wanted(position):
                return True
            passed.append(position)
        return False

    with patch.object(Accepted, "offer", deaf), patch.object(Accepted, "read", blind):
        yield passed


@pytest.mark.parametrize("number", [1, 2, 5])
async def test_events_that_a_bug_skips_are_named_though_all_seems_settled(tmp_path: Path, number: int) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await world.append(*[Happened(key="k", n=n) for n in range(8)])
        await world.settled()
        skipping = range(await world.store.head() + 1, 2**62)
        with deaf_to(lambda position: position in skipping and len(passed) < number) as passed:
            for n in range(8, 20):
                await world.append(Happened(key="k", n=n))
            await world.settled()
        assert len(passed) == number
        assert len(await rows(service)) == 20 - number
        found = await proved(world)
        events = {event.position: event for event in await events_of(world.store)}
        assert found.proved == {}
        assert named(events[passed[0]]) in found.wrong[0]
        assert all("skipped" in wrong for wrong in found.wrong)
        again = await proved(world, since=-1) if number == 1 else found
        assert named(events[passed[0]]) in again.wrong[0], "it stays wrong until somebody mends it"


async def forged_service(folder: Path, forge: Callable[[list[RecordedEvent], int], list[RecordedEvent]]) -> Recount:
    """Let forged events come before those of the relay, which starts afterwards."""
    async with embedded(folder, auditing(), relay=False) as world:
        for n in range(6):
            await world.append(Happened(key="k", n=n))
        await world.store.append("tidings_noise", [EventData("tidings_Noise", b"{}")])
        log, events = await world.store.log_id(), await events_of(world.store)
        for event in forge(events, await world.store.head()):
            bucket = carried(event)
            assert bucket is not None
            async with world.publisher() as publisher:
                await publisher.send(encode(event, log=log, previous=-1, bucket=bucket))
        (part,) = world.running[0].partitions
        await until(lambda: part.intake is not None and part.intake.pulse.heard >= 1)
        async with supervised(Relay(world.store, world.bus, marker_seconds=0.2, checkpoint_seconds=0.1).run()):
            await world.settled()
        return await proved(world)


async def test_an_event_that_was_replaced_is_named(tmp_path: Path) -> None:
    first: list[RecordedEvent] = []

    def replaced(events: list[RecordedEvent], head: int) -> list[RecordedEvent]:
        first.append(events[0])
        return [events[0]._replace(data=b'{"key":"k","n":666}')]

    found = await forged_service(tmp_path, replaced)
    (wrong,) = found.wrong
    assert wrong.endswith(f"another event was settled in the place of {named(first[0])}: replaced")
    assert not found.ok


async def test_two_events_that_were_replaced_are_named(tmp_path: Path) -> None:
    both: list[RecordedEvent] = []

    def replaced(events: list[RecordedEvent], head: int) -> list[RecordedEvent]:
        both.extend(events[:2])
        return [event._replace(data=b'{"key":"k","n":%d}' % (666 + n)) for n, event in enumerate(both)]

    found = await forged_service(tmp_path, replaced)
    assert [wrong.partition("place of ")[2] for wrong in found.wrong] == [f"{named(event)}: replaced" for event in both]


async def test_a_foreign_event_and_what_was_passed_over_for_it_are_named(tmp_path: Path) -> None:
    """It has the position of an event that is not carried, above the real ones of its bucket."""
    real: list[RecordedEvent] = []

    def foreign(events: list[RecordedEvent], head: int) -> list[RecordedEvent]:
        real.extend(events)
        return [events[0]._replace(position=head, id_bytes=uuid4().bytes)]

    found = await forged_service(tmp_path, foreign)
    skipped, other = found.wrong[-2:]
    assert f"{named(real[0])} was passed over" in skipped
    assert "6 in all" in skipped
    assert "where the log has tidings_Noise" in other
    assert other.endswith(": foreign")


async def test_a_forged_marker_that_passes_over_what_the_log_holds_is_found(tmp_path: Path) -> None:
    async with embedded(tmp_path, auditing(), relay=False) as world:
        for n in range(6):
            await world.append(Happened(key="k", n=n))
        events, head = await events_of(world.store), await world.store.head()
        (part,) = world.running[0].partitions
        with patch.object(Intake, "_gap", lambda self, upto, step: self._admission.settle(step)):
            async with world.publisher() as publisher:
                await publisher.send(Marker(await world.store.log_id(), head, -1, {}).encode())
            await until(lambda: part.floor >= head)
            await world.settled()
        found = await proved(world)
        (wrong,) = found.wrong
        assert named(events[0]) in wrong
        assert "6 in all" in wrong


async def test_what_was_settled_out_of_order_is_named_for_good(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await mixed(world)
        await world.settled()
        events = await events_of(world.store)
        async with world.running[0].database.transaction() as connection:
            row = (await connection.execute(sa.select(watermarks).where(watermarks.c.receipt_at > 0).limit(1))).one()
            since, _, rest = row.receipt.split(" ", 2)
            changed = watermarks.update().where(watermarks.c.bucket == row.bucket)
            await connection.execute(changed.values(receipt=f"{since} {events[0].position} {rest}"))
        for _ in range(2):
            found = await proved(world)
            assert found.wrong == [
                f"audit: bucket {row.bucket}: {named(events[0])} was settled after a later one: out of order"
            ]


async def test_proving_goes_on_from_the_position_that_was_proved_last(tmp_path: Path) -> None:
    async with embedded(tmp_path, auditing()) as world:
        with pytest.raises(
            ConfigurationError, match="'audit' is not proved up to position 3; it has never been proved"
        ):
            await proved(world, since=3)
        await mixed(world, slice(0, 15))
        await stored(world)
        first = await proved(world)
        upto = first.proved["audit"]
        with pytest.raises(ConfigurationError, match=f"its last proof ends at {upto}: --since {upto}"):
            await proved(world, since=upto + 10**6)
        await mixed(world, slice(15, 30))
        await stored(world)
        second = await proved(world, since=upto)
        assert (second.wrong, second.notes) == ([], [])
        assert second.carried == 30
        assert second.events < first.events + second.events
        assert second.proved["audit"] > upto


async def test_a_proof_does_not_miss_what_was_done_wrong_after_the_last_one(tmp_path: Path) -> None:
    async with embedded(tmp_path, auditing()) as world:
        await mixed(world, slice(0, 10))
        await stored(world)
        upto = (await proved(world)).proved["audit"]
        with deaf_to(lambda position: not passed) as passed:
            await mixed(world, slice(10, 20))
            await world.settled()
        for _ in range(2):
            found = await proved(world, since=upto)
            (wrong,) = found.wrong
            assert f"position {passed[0]} was passed over: skipped" in wrong


async def test_held_dead_skipped_and_resized_buckets_contradict_nothing(tmp_path: Path) -> None:
    service = emitting()

    @service.on(Followed, retry=Retry(attempts=1, hold=None, hold_key=True, permanent=(ValueError,)))
    async def refuse(event: Followed) -> None:
        if event.key == "k1":
            raise ValueError("no")

    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS[:10])
        running = world.running[0]
        while not (await world.report()).services[0].dead_count:
            await running.reached(10**9, timeout=0.05)
        await world.append(Happened(key="k1", n=99))
        while not (await world.report()).services[0].held_count:
            await running.reached(10**9, timeout=0.05)
        found = await proved(world)
        assert (found.wrong, found.notes) == ([], [])
    settings = settings_for(tmp_path)
    async with open_database(settings.database_of("audit")) as database:
        await resize(database, "audit", 2)
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS[10:20])
        await until(lambda: _is_at_rest(world))
        found = await proved(world)
        assert (found.wrong, found.notes) == ([], [])


async def _is_at_rest(world: World) -> bool:
    report = await world.report()
    return not report.services[0].pending_count and not report.services[0].staged_count


async def test_an_event_that_an_operator_skips_is_settled(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service, relay=False) as world:
        await world.append(Happened(key="k", n=1))
        (event,) = await events_of(world.store)
        await skip(world.running[0].database, service, await world.store.log_id(), event)
        async with supervised(Relay(world.store, world.bus, marker_seconds=0.2, checkpoint_seconds=0.1).run()):
            await until(lambda: _is_at_rest(world))
        found = await proved(world)
        assert (found.wrong, found.notes) == ([], [])
        assert found.services[0].dead == 1


async def test_after_a_replay_receipts_begin_where_it_began(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await mixed(world, slice(0, 20))
        await world.settled()
        await proved(world)
        log, events = await world.store.log_id(), await events_of(world.store)
    async with (
        open_database(settings_for(tmp_path).database_of("audit")) as database,
        open_store(settings_for(tmp_path).store) as store,
    ):
        start = await find_start(store, events[10].position)
        assert start is not None
        await send_back(database, service, log, start)
        found = await recount(store, [(service, database)])
        assert found.wrong == []
        assert any("have no receipt" in note for note in found.notes)
    async with embedded(tmp_path, service) as world:
        await mixed(world, slice(20, 30))
        await stored(world)
        found = await proved(world)
        assert found.wrong == []
        assert all(f"begin after position {start.before} or later" in note for note in found.notes)
        assert found.proved.keys() == {"audit"}


async def test_a_version_without_receipts_that_was_at_work_meanwhile_makes_no_false_alarm(tmp_path: Path) -> None:
    """Rolling deploy: it moved watermarks and floor, and wrote no receipt."""
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await mixed(world, slice(0, 10))
        await world.settled()
    async with (
        open_database(settings_for(tmp_path).database_of("audit")) as database,
        open_store(settings_for(tmp_path).store) as store,
    ):
        await store.append("Followed-k1", [EventData("Followed", b'{"key":"k1","n":0}', b'{"partitionKey":"k1"}')])
        await store.append("Followed-k2", [EventData("Followed", b'{"key":"k2","n":0}') for _ in range(3)])
        head = await store.head()
        async with database.transaction() as connection:
            await connection.execute(floors.update().values(position=head))
        found = await recount(store, [(service, database)])
        assert found.wrong == []
    async with embedded(tmp_path, service) as world:
        await mixed(world, slice(10, 20))
        await world.settled()
        found = await proved(world)
        assert found.wrong == []
        assert any("receipts of" in note for note in found.notes)


async def test_an_older_database_has_receipts_from_its_upgrade_on(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await mixed(world, slice(0, 10))
        await world.settled()
    async with (
        open_database(settings_for(tmp_path).database_of("audit")) as database,
        database.transaction() as connection,
    ):
        await connection.execute(watermarks.update().values(receipt="", receipt_at=-1))
        await connection.execute(floors.update().values(receipted=-2))
        await connection.execute(proofs.delete())
    async with embedded(tmp_path, service) as world:
        await mixed(world, slice(10, 20))
        await world.settled()
        found = await proved(world)
        assert found.wrong == []
        (note,) = found.notes
        assert "the receipts of 256 buckets begin after position" in note
        with deaf_to(lambda position: not passed) as passed:
            await mixed(world, slice(20, 30))
            await world.settled()
        assert f"position {passed[0]} was passed over: skipped" in (await proved(world)).wrong[0]


class Shortened(StoreAround):
    """A log from which retention has removed the first events of a stream."""

    def __init__(self, store: EventStore, stream: str, number: int) -> None:
        super().__init__(store)
        self.gone = stream, number

    async def read_all(self, **options: Any) -> AsyncIterator[RecordedEvent]:
        stream, number = self.gone
        limit, found = options.pop("limit", None), 0
        async for event in self.inner.read_all(**options):
            if event.stream == stream and event.version < number:
                continue
            yield event
            if (found := found + 1) == limit:
                return


@pytest.mark.parametrize("number", [1, 2, 5])
async def test_what_retention_removes_is_noted_and_no_alarm(tmp_path: Path, number: int) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        for n in range(8):
            await world.append(Happened(key="k", n=n))
        await stored(world)
        await world.store.set_metadata("Happened-k", {"$maxCount": 8 - number})
        short, database = cast("EventStore", Shortened(world.store, "Happened-k", number)), world.running[0].database
        found = await recount(short, [(service, database)])
        assert found.wrong == []
        assert len(found.notes) == min(number, 3) - (number > 2) * 2
        assert all("retention" in note for note in found.notes)
        again = await recount(short, [(service, database)], since=found.proved["audit"])
        assert (again.wrong, again.notes) == ([], []), "it is told once"


async def test_proofs_that_are_noted_at_the_same_moment_do_not_disturb_each_other(tmp_path: Path) -> None:
    async with embedded(tmp_path, auditing()) as world:
        await world.append(*EVENTS[:5])
        await stored(world)
        found = await asyncio.gather(*[proved(world) for _ in range(5)])
        assert [(each.wrong, each.notes, each.proved) for each in found] == [([], [], found[0].proved)] * 5
        await proved(world, since=found[0].proved["audit"])


@pytest.mark.parametrize(
    "error",
    [
        DatabaseUnavailable("it lets nobody write"),
        sa.exc.ProgrammingError("INSERT", {}, Exception("permission denied")),
    ],
    ids=["unavailable", "forbidden"],
)
async def test_what_was_proved_is_told_also_where_the_database_takes_no_note_of_it(
    tmp_path: Path, error: Exception
) -> None:
    async with embedded(tmp_path, auditing()) as world:
        await world.append(*EVENTS[:5])
        await stored(world)

        @asynccontextmanager
        async def refusing(*_: object) -> AsyncIterator[None]:
            raise error
            yield

        with patch("tidings.operations.receipts.commanding", refusing):
            found = await proved(world)
        assert found.ok
        assert found.proved.keys() == {"audit"}
        (note,) = found.notes
        assert "its proof could not be noted" in note
        assert "lets nobody write" in note or "permission denied" in note


async def test_a_floor_that_an_older_version_raises_while_a_process_joins_has_no_receipts(tmp_path: Path) -> None:
    """Rolling deploy: what the older version passed over meanwhile is in no receipt, wherever this process ends."""
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS[:5])
        await stored(world)
    is_receipted = Floor.is_receipted

    async with (
        open_database(settings_for(tmp_path).database_of("audit")) as database,
        open_store(settings_for(tmp_path).store) as store,
    ):
        await store.append("Followed-k1", [EventData("Followed", b'{"key":"k1","n":0}')])
        log, head = await store.log_id(), await store.head()

        async def raised(self: Floor, connection: AsyncConnection) -> bool:
            await connection.execute(floors.update().values(position=head))
            return await is_receipted(self, connection)

        with patch.object(Floor, "is_receipted", raised):
            await Inbox(database, "audit", log, range(BUCKETS)).join()
        found = await recount(store, [(service, database)])
        assert found.wrong == []


@pytest.mark.parametrize("number", [1, 2, 5])
async def test_what_was_settled_where_a_log_without_retention_has_nothing_is_foreign(
    tmp_path: Path, number: int
) -> None:
    """Positions have gaps where they are offsets, and a forged message may name one."""
    service = auditing()
    async with embedded(tmp_path, service) as world:
        for n in range(8):
            await world.append(Happened(key="k", n=n))
        await stored(world)
        gaps, database = cast("EventStore", Shortened(world.store, "Happened-k", number)), world.running[0].database
        found = await recount(gaps, [(service, database)])
        assert not found.ok
        assert found.proved == {}
        assert all(wrong.endswith("foreign") for wrong in found.wrong)


class Rewritten(StoreAround):
    """A log whose first events have other data than what the service was given."""

    def __init__(self, store: EventStore, number: int) -> None:
        super().__init__(store)
        self.number = number

    async def read_all(self, **options: Any) -> AsyncIterator[RecordedEvent]:
        async for event in self.inner.read_all(**options):
            other = event.type == "Happened" and event.version < self.number
            yield event._replace(data=event.data + b" ") if other else event


@pytest.mark.parametrize("number", [1, 4])
async def test_what_was_replaced_is_no_note_though_retention_was_asked_for(tmp_path: Path, number: int) -> None:
    """Retention leaves fewer events in the log, never others."""
    service = auditing()
    async with embedded(tmp_path, service) as world:
        for n in range(8):
            await world.append(Happened(key="k", n=n))
        await world.store.set_metadata("nobodys", {"$maxCount": 1})
        await stored(world)
        found = await recount(
            cast("EventStore", Rewritten(world.store, number)), [(service, world.running[0].database)]
        )
        assert not found.ok
        assert found.proved == {}
        assert found.wrong


@pytest.mark.parametrize("kind", ["held", "dead"])
async def test_the_row_of_a_forged_event_is_named_with_what_to_do(tmp_path: Path, kind: str) -> None:
    async def fail(event: Happened, context: object, session: object) -> None:
        raise ValueError("no")

    retry = Retry(attempts=1) if kind == "held" else Retry(attempts=1, hold=None)
    service = auditing("audit", fail, retry=retry)
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="k", n=1))

        async def has_failed() -> bool:
            return bool(getattr((await proved(world)).services[0], kind) == 1)

        await until(has_failed)
        found = await recount(cast("EventStore", Rewritten(world.store, 1)), [(service, world.running[0].database)])
        (told,) = [wrong for wrong in found.wrong if "other content than the log has" in wrong]
        assert f"(tidings {kind} drop)" in told
        assert not [wrong for wrong in (await proved(world)).wrong if "other content" in wrong]
