"""How a service is divided, and what resizing does to its floors; who asks whom for a partition."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from tidings import Service
from tidings.buses import Subscription
from tidings.database.engine import Database, open_database
from tidings.database.inbox import Inbox
from tidings.database.layout import Layout, Range, lay_out, layout_of, lowest, ranges_of, resize, was_rebound
from tidings.database.layout import settled as settled_in
from tidings.database.tables import floors, partitions, watermarks
from tidings.errors import ConfigurationError, Fenced
from tidings.hosting.balance import asked_of, to_ask
from tidings.protocol.position import ALL_BUCKETS, BUCKETS

LOG = uuid4()
COUNTS = st.integers(1, BUCKETS)


@pytest.fixture
async def database() -> AsyncIterator[Database]:
    async with open_database("sqlite://") as opened:
        yield opened


async def joined(database: Database, layout: Layout, log: UUID = LOG) -> list[Range]:
    """Let every partition join."""
    for part in layout.subscriptions:
        await Inbox(database, "audit", log, part.buckets, epoch=layout.epoch).join()
    async with database.reading() as connection:
        return await ranges_of(connection, "audit", log)


async def now(database: Database, log: UUID = LOG) -> list[Range]:
    async with database.reading() as connection:
        return await ranges_of(connection, "audit", log)


async def stored(database: Database) -> Layout:
    async with database.reading() as connection:
        found = await layout_of(connection, "audit")
    assert found is not None
    return found


# ---- ranges and queues ---------------------------------------------------------------


@given(COUNTS)
def test_the_ranges_of_all_partitions_cover_every_bucket_once(count: int) -> None:
    parts = [Subscription("audit", index, count) for index in range(count)]
    assert [bucket for part in parts for bucket in part.buckets] == list(ALL_BUCKETS)
    sizes = {len(part.buckets) for part in parts}
    assert max(sizes) - min(sizes) <= 1, "no partition has much more than another"
    assert len({part.queue for part in parts}) == count


def test_a_service_that_is_not_divided_has_the_plain_queue() -> None:
    assert Subscription("audit").queue == "tidings.audit"
    assert [Subscription("audit", index, 2).queue for index in range(2)] == ["tidings.audit.0", "tidings.audit.1"]


@given(st.lists(COUNTS, min_size=2, max_size=6))
def test_every_queue_of_every_earlier_layout_is_a_stray_or_made_anew(counts: list[int]) -> None:
    layout = Layout("audit", counts[-1], len(counts) - 1, 0, max(counts))
    taken_away = {part.queue for part in [*layout.strays, *layout.subscriptions]}
    for count in counts:
        assert {Subscription("audit", index, count).queue for index in range(count)} <= taken_away
    assert not {part.queue for part in layout.strays} & {part.queue for part in layout.subscriptions}


def test_a_service_that_was_never_resized_has_no_strays() -> None:
    assert Layout("audit", 4, 0, 0, 4).strays == []


@pytest.mark.parametrize("count", [0, 257, -1, True, 1.5])
def test_a_number_of_partitions_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(ConfigurationError, match="1 to 256 partitions"):
        Service("audit", partitions=count)


# ---- laying out ----------------------------------------------------------------------


async def test_a_new_database_takes_what_is_declared_and_keeps_it(database: Database) -> None:
    assert (await lay_out(database, "audit", 4)).count == 4
    assert (await lay_out(database, "audit", None)).count == 4
    with pytest.raises(ConfigurationError, match=r"partitions=3, but its database .* says 4.*--resize 3"):
        await lay_out(database, "audit", 3)


async def test_a_database_of_an_older_tidings_is_one_partition_whatever_is_declared(database: Database) -> None:
    await Inbox(database, "audit", LOG, ALL_BUCKETS).join()
    with pytest.raises(ConfigurationError, match=r"partitions=4, but its database .* says 1"):
        await lay_out(database, "audit", 4)
    assert (await lay_out(database, "audit", None)).count == 1


async def test_who_has_not_heard_of_a_resizing_does_not_join(database: Database) -> None:
    layout = await lay_out(database, "audit", None)
    (late,) = (Inbox(database, "audit", LOG, part.buckets, epoch=layout.epoch) for part in layout.subscriptions)
    await resize(database, "audit", 2)
    with pytest.raises(Fenced, match="was resized"):
        await late.join()
    assert await now(database) == [], "it made no row"


async def test_who_has_not_heard_of_a_resizing_raises_no_floor(database: Database) -> None:
    layout = await lay_out(database, "audit", None)
    late = Inbox(database, "audit", LOG, ALL_BUCKETS, epoch=layout.epoch)
    await late.join()
    await resize(database, "audit", 2)
    async with database.transaction() as connection:
        await late.floor.raise_to(connection, 99)
    assert [row.floor for row in await now(database)] == [-1, -1]


async def test_queues_are_old_until_they_were_made_for_the_present_layout(database: Database) -> None:
    await lay_out(database, "audit", 2)
    _, first = await resize(database, "audit", 3)
    _, second = await resize(database, "audit", 4)
    await was_rebound(database, first)
    assert (await stored(database)).queues_are_old, "what was made was of a layout that is past"
    await was_rebound(database, second)
    assert not (await stored(database)).queues_are_old


# ---- resizing ------------------------------------------------------------------------


async def test_resizing_to_the_same_number_changes_nothing(database: Database) -> None:
    before = await lay_out(database, "audit", 2)
    assert await resize(database, "audit", 2) == (before, before)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(COUNTS, st.lists(st.integers(-1, 50), max_size=5)), min_size=1, max_size=6))
async def test_no_sequence_of_resizings_takes_a_bucket_for_settled_that_was_not(
    steps: list[tuple[int, list[int]]],
) -> None:
    """Floors of some ranges rise between resizes. The model keeps each bucket's true floor."""
    async with open_database("sqlite://") as database:
        true = dict.fromkeys(ALL_BUCKETS, -1)
        layout = await lay_out(database, "audit", steps[0][0])
        await joined(database, layout)
        for count, risen in steps:
            for part, floor in zip(layout.subscriptions, risen, strict=False):
                inbox = Inbox(database, "audit", LOG, part.buckets)
                async with database.transaction() as connection:
                    await inbox.floor.raise_to(connection, floor)
                true |= {bucket: max(true[bucket], floor) for bucket in part.buckets}
            before = await now(database)
            _, layout = await resize(database, "audit", count)
            rows = await now(database)
            assert [bucket for row in rows for bucket in range(row.first, row.last + 1)] == list(ALL_BUCKETS)
            for row in rows:
                overlapped = [old.floor for old in before if old.first <= row.last and old.last >= row.first]
                assert row.floor == min(overlapped), "the lowest of those that it overlaps: neither lost nor redone"
                assert row.floor <= min(true[bucket] for bucket in range(row.first, row.last + 1))


async def test_a_range_that_has_not_joined_counts_as_nothing_settled(database: Database) -> None:
    layout = await lay_out(database, "audit", 2)
    inbox = Inbox(database, "audit", LOG, layout.subscriptions[0].buckets)
    await inbox.join()
    async with database.transaction() as connection:
        await inbox.floor.raise_to(connection, 7)
    assert await settled_in(database, "audit", LOG) == -1
    assert await settled_in(database, "audit", LOG, 0) == 7
    assert await settled_in(database, "audit", LOG, 255) == -1
    await resize(database, "audit", 1)
    assert [row.floor for row in await now(database)] == [-1]


async def test_resizing_keeps_watermarks_and_other_services_and_does_each_log(database: Database) -> None:
    layout, other = await lay_out(database, "audit", None), uuid4()
    await joined(database, layout)
    await database_row(database, floors, {"service": "audit", "log": str(other), "position": 3})
    await database_row(database, floors, {"service": "another", "log": str(LOG), "position": 5})
    async with database.transaction() as connection:
        await connection.execute(watermarks.update().where(watermarks.c.bucket == 9).values(position=4))
    await resize(database, "audit", 2)
    assert [row.floor for row in await now(database, other)] == [3, 3]
    async with database.reading() as connection:
        assert [row.floor for row in await ranges_of(connection, "another", LOG)] == [5]
        assert await connection.scalar(sa.select(watermarks.c.position).where(watermarks.c.bucket == 9)) == 4


async def test_after_a_resizing_nobody_is_taken_for_one_that_crashed(database: Database) -> None:
    await joined(database, await lay_out(database, "audit", None))
    async with database.transaction() as connection:
        await connection.execute(floors.update().values(active="at work, and about to end cleanly"))
    await resize(database, "audit", 2)
    assert [row.active for row in await now(database)] == [None, None]


async def test_an_interrupted_resizing_changed_nothing(database: Database) -> None:
    await joined(database, await lay_out(database, "audit", None))
    before = await stored(database), await now(database)
    async with database.engine.begin() as connection:  # the rows of the new ranges cannot be written
        await connection.execute(
            sa.text(
                "CREATE TRIGGER broken BEFORE INSERT ON tidings_floors BEGIN SELECT RAISE(ABORT, 'killed here'); END"
            )
        )
    with pytest.raises(sa.exc.IntegrityError, match="killed here"):
        await resize(database, "audit", 4)
    assert (await stored(database), await now(database)) == before


async def database_row(database: Database, table: sa.Table, values: dict[str, object]) -> None:
    async with database.transaction() as connection:
        await connection.execute(table.insert().values(first_bucket=0, last_bucket=255, **values))


# ---- balance -------------------------------------------------------------------------


def rows(*owners: str | None) -> list[Range]:
    count = len(owners)
    parts = (Subscription("audit", index, count).buckets for index in range(count))
    return [Range(part.start, part.stop - 1, 0, owner, None) for part, owner in zip(parts, owners, strict=True)]


def test_a_process_without_any_asks_for_half() -> None:
    assert to_ask(rows("a", "a", "a", "a"), "b") == {128: "a", 192: "a"}


@pytest.mark.parametrize(
    "owners", [("a", "b"), ("a", "a", "b"), ("a",), ("a", "b", "c"), (None, None), ("b", "b", "b", "a")]
)
def test_nobody_asks_where_that_would_even_nothing_out(owners: tuple[str | None, ...]) -> None:
    assert to_ask(rows(*owners), "b") == {}


def test_what_was_asked_for_is_not_asked_for_again() -> None:
    asked = [row._replace(asked="b") if row.first >= 128 else row for row in rows("a", "a", "a", "a")]
    assert to_ask(asked, "b") == {}
    assert to_ask(asked, "c") == {64: "a"}, "a third process counts what is left"


def test_only_the_one_at_work_is_asked() -> None:
    asked = [row._replace(asked="b") for row in rows("a", "c")]
    assert asked_of(asked, "a") == [0]
    assert asked_of(asked, "b") == []
    assert asked_of(rows("a", "c"), "a") == []


@given(st.integers(2, 24), st.integers(1, 6), st.randoms(use_true_random=False))
def test_asking_evens_out_and_comes_to_rest_whoever_is_first_in_line(count: int, processes: int, random) -> None:  # type: ignore[no-untyped-def]
    """The bus gives a queue to the first process in its line. A process that gives it up goes to the end."""
    names = [f"p{number}" for number in range(processes)]
    lines = [random.sample(names, processes) for _ in range(count)]
    for _ in range(50 * processes * count):
        table = rows(*(line[0] for line in lines))
        asks = [(first, owner) for name in names for first, owner in to_ask(table, name).items()]
        if not asks:
            break
        first, _ = random.choice(asks)
        line = lines[next(index for index, row in enumerate(table) if row.first == first)]
        line.append(line.pop(0))
    else:
        raise AssertionError("it never came to rest")
    shares = [sum(line[0] == name for line in lines) for name in names]
    assert max(shares) - min(shares) <= 1


def test_lowest_wants_every_bucket_covered() -> None:
    whole = [row._replace(floor=floor) for row, floor in zip(rows("a", "a"), (5, 3), strict=True)]
    assert lowest(whole) == 3
    assert lowest(whole[:1]) == lowest(whole[1:]) == lowest([]) == -1
    assert lowest(whole[1:], range(128, 256)) == 3


async def test_a_layout_can_be_read_where_nothing_was_laid_out(database: Database) -> None:
    async with database.reading() as connection:
        assert await layout_of(connection, "audit") is None
        assert await connection.scalar(sa.select(sa.func.count()).select_from(partitions)) == 0
