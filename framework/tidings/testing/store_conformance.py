"""The conformance suite of event stores: the rules of `tidings.stores.EventStore` as tests. It knows no adapter.

    class TestMyStore(StoreConformance):
        @pytest.fixture
        async def store(self) -> AsyncIterator[EventStore]:
            async with open_store("mine://...") as store:
                yield store

The store may be shared and need not be empty: every test uses streams of its own, and positions that the store
returned. The suite needs pytest-asyncio. It covers every recorded case of EventStoreDB 24.2 on appending, reading,
metadata, deletion and catch-up subscriptions, under the rule that the case shows.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar, cast
from uuid import UUID, uuid4

import pytest

from tidings.errors import (
    AbilityMissing,
    EventTooLarge,
    InvalidAppend,
    InvalidMetadata,
    InvalidStreamName,
    PartlyRepeated,
    StoreUnavailable,
    StreamDeleted,
    StreamNotFound,
    WrongExpectedVersion,
)
from tidings.stores import (
    ANY,
    APPEND_LIMIT,
    EVERYTHING,
    NO_STREAM,
    OCTETS,
    STREAM_EXISTS,
    Ability,
    Appended,
    AppendedSeveral,
    CaughtUp,
    Checkpoint,
    EventData,
    EventStore,
    Expected,
    Filter,
    RecordedEvent,
    StreamAppend,
)

__all__ = ["PATIENCE", "Reopen", "StoreConformance", "event", "events", "eventually", "numbers", "read", "take"]

T = TypeVar("T")

PATIENCE: Final = 20.0
"""Seconds for which a test waits for something that must happen."""
SOFT: Final = 2**63 - 1

Reopen = Callable[[], AbstractAsyncContextManager[EventStore]]
"""Opens the store of the `store` fixture again, after the test has closed it."""


def event(number: int = 0, type: str = "Happened") -> EventData:
    """Make an event whose data holds a number."""
    return EventData(type, json.dumps({"n": number}).encode())


def events(*counted: int) -> list[EventData]:
    """Make one event per number."""
    return [event(number) for number in counted]


async def read(store: EventStore, stream: str, **options: Any) -> list[tuple[int, int]]:
    """Read the stream as (version, number) pairs."""
    return [(found.version, number(found)) async for found in store.read_stream(stream, **options)]


def number(found: RecordedEvent) -> int:
    """Return the number in an event's data."""
    return int(json.loads(found.data)["n"])


def numbers(found: list[Any]) -> list[int]:
    """Return the numbers of the events among the items of a subscription."""
    return [number(item) for item in found if isinstance(item, RecordedEvent)]


async def take(source: AsyncIterator[T], until: Callable[[list[T]], bool]) -> list[T]:
    """Collect items until `until` returns true for them. The source stays usable."""
    got: list[T] = []
    async with asyncio.timeout(PATIENCE):
        while not until(got):
            got.append(await anext(source))
    return got


def caught_up(got: list[Any]) -> bool:
    """Return whether a subscription has said that it caught up, a condition for `take`."""
    return any(isinstance(item, CaughtUp) for item in got)


def many(count: int) -> Callable[[list[Any]], bool]:
    """Return a condition for `take`: this many events, whatever else comes between them."""
    return lambda got: sum(isinstance(item, RecordedEvent) for item in got) >= count


def closing(source: AsyncIterator[T]) -> AbstractAsyncContextManager[AsyncIterator[T]]:
    """Close a read or subscription at the end of the block."""
    return cast("AbstractAsyncContextManager[AsyncIterator[T]]", aclosing(cast("Any", source)))


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until a condition holds, for `PATIENCE` seconds."""
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110 - what is waited for happens in the store, often in a server
            await asyncio.sleep(0.02)


class StoreConformance:
    """The suite: derive a class and define the fixture `store`, and `reopen` and `advance` if the adapter can."""

    pytestmark = pytest.mark.asyncio

    @pytest.fixture
    def store(self) -> Any:
        """Override it: the open store of the adapter under test."""
        raise NotImplementedError("define an async fixture `store` that yields an open EventStore")

    @pytest.fixture
    def empty(self, store: EventStore) -> EventStore:
        """A store with an empty log. If the adapter has none, the rules hold for any other store, too."""
        return store

    @pytest.fixture
    def reopen(self) -> Reopen | None:
        """Return a function that opens the same log again. None skips the tests that need it."""
        return None

    @pytest.fixture
    def advance(self) -> Callable[[float], None]:
        """Return a function that moves the store's clock by some seconds. By default, it waits for real time."""
        return lambda seconds: None

    @pytest.fixture
    def abilities(self) -> frozenset[Ability]:
        """Return what the store can do beyond the rules: by default, everything. Override it to leave something out."""
        return frozenset(Ability)

    @pytest.fixture
    def several(self, store: EventStore, abilities: frozenset[Ability]) -> EventStore:
        """The store, for tests of appends over several streams. It skips them if `abilities` leaves these out."""
        if Ability.APPEND_SEVERAL not in abilities:
            pytest.skip(f"by its `abilities`, this store does not offer {Ability.APPEND_SEVERAL.value}")
        return store

    @pytest.fixture
    def stream(self) -> str:
        """The name of a stream that no other test uses."""
        return f"conformance-{uuid4().hex}"

    async def refused(
        self, store: EventStore, stream: str, batch: list[EventData], expected: Expected, actual: int
    ) -> None:
        """Assert that an append is refused and writes nothing."""
        with pytest.raises(WrongExpectedVersion) as refusal:
            await store.append(stream, batch, expected=expected)
        assert (refusal.value.stream, refusal.value.actual) == (stream, actual)

    # ---- append: expected versions

    async def test_an_append_to_a_new_stream_has_version_0(self, store: EventStore, stream: str) -> None:
        appended = await store.append(stream, [event(7)], expected=NO_STREAM)
        assert appended.version == 0
        assert appended.position > 0
        assert await read(store, stream) == [(0, 7)]

    async def test_the_events_of_an_append_have_consecutive_versions(self, store: EventStore, stream: str) -> None:
        assert (await store.append(stream, events(0, 1, 2), expected=NO_STREAM)).version == 2
        assert (await store.append(stream, events(3, 4), expected=2)).version == 4
        assert await read(store, stream) == [(n, n) for n in range(5)]

    async def test_events_that_can_be_read_only_once_are_all_appended(self, store: EventStore, stream: str) -> None:
        appended = await store.append(stream, iter(events(0, 1, 2)))  # type: ignore[arg-type]
        assert appended.version == 2
        assert await read(store, stream) == [(0, 0), (1, 1), (2, 2)]

    async def test_an_append_answers_with_the_position_of_its_last_event(self, store: EventStore, stream: str) -> None:
        appended = await store.append(stream, events(0, 1, 2), expected=NO_STREAM)
        positions = [found.position async for found in store.read_stream(stream)]
        assert positions == sorted(set(positions))
        assert positions[-1] == appended.position

    async def test_positions_increase_across_streams(self, store: EventStore, stream: str) -> None:
        positions = [(await store.append(f"{stream}-{n % 3}", [event(n)])).position for n in range(9)]
        assert positions == sorted(set(positions))

    async def test_no_stream_is_refused_when_there_is_one(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(1), expected=NO_STREAM)
        await self.refused(store, stream, events(2), NO_STREAM, 0)
        await self.refused(store, stream, events(2, 3), NO_STREAM, 0)
        assert await read(store, stream) == [(0, 1)]

    async def test_a_version_above_the_last_is_refused(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0), expected=NO_STREAM)
        await self.refused(store, stream, events(1), 7, 0)

    async def test_a_version_below_the_last_is_refused(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1, 2), expected=NO_STREAM)
        await self.refused(store, stream, events(9), 0, 2)
        await self.refused(store, stream, events(8, 9), 1, 2)

    async def test_a_version_of_a_missing_stream_is_refused(self, store: EventStore, stream: str) -> None:
        await self.refused(store, stream, events(0), 0, -1)

    async def test_stream_exists_is_refused_for_a_missing_stream(self, store: EventStore, stream: str) -> None:
        await self.refused(store, stream, events(0), STREAM_EXISTS, -1)

    async def test_any_and_stream_exists_append_at_the_end(self, store: EventStore, stream: str) -> None:
        assert (await store.append(stream, events(1), expected=ANY)).version == 0
        assert (await store.append(stream, events(2), expected=STREAM_EXISTS)).version == 1
        assert await read(store, stream) == [(0, 1), (1, 2)]

    async def test_concurrent_appends_with_one_version_let_one_win(self, store: EventStore, stream: str) -> None:
        outcomes = await asyncio.gather(
            *(store.append(stream, [event(n)], expected=NO_STREAM) for n in range(10)), return_exceptions=True
        )
        assert sum(isinstance(outcome, WrongExpectedVersion) for outcome in outcomes) == 9
        winner = next(n for n, outcome in enumerate(outcomes) if isinstance(outcome, Appended))
        assert await read(store, stream) == [(0, winner)]

    async def test_appends_started_one_after_the_other_are_applied_in_that_order(
        self, store: EventStore, stream: str
    ) -> None:
        appends = [asyncio.ensure_future(store.append(stream, [event(n)])) for n in range(100)]
        appended = await asyncio.gather(*appends)
        assert await read(store, stream) == [(n, n) for n in range(100)]
        assert [answer.version for answer in appended] == list(range(100))

    # ---- append: nothing, and limits

    async def test_an_empty_append_writes_nothing(self, store: EventStore, stream: str) -> None:
        assert (await store.append(stream, [], expected=NO_STREAM)).version == -1
        assert (await store.append(stream, [], expected=ANY)).version == -1
        with pytest.raises(StreamNotFound):
            await read(store, stream)

    async def test_the_version_of_a_stream_without_events_may_be_expected(self, store: EventStore, stream: str) -> None:
        version = (await store.append(stream, [])).version
        assert (await store.append(stream, events(0), expected=version)).version == 0
        with pytest.raises(WrongExpectedVersion) as refused:
            await store.append(stream, events(1), expected=version)
        assert refused.value.expected == "no stream", "it is said as if NO_STREAM had been expected"

    async def test_an_empty_append_checks_the_expected_version(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0), expected=NO_STREAM)
        assert (await store.append(stream, [], expected=0)).version == 0
        assert (await store.append(stream, [], expected=ANY)).version == 0
        await self.refused(store, stream, [], NO_STREAM, 0)
        assert await read(store, stream) == [(0, 0)]

    async def limit(self, store: EventStore) -> int:
        """Return the bytes of an append that the store takes, learnt from a refusal: a server's limit is a setting."""
        for size in (APPEND_LIMIT + 1, 16 * APPEND_LIMIT + 1, 256 * APPEND_LIMIT + 1):
            try:
                await store.append(f"limit-{uuid4().hex}", [EventData("Big", b"x" * size)], expected=NO_STREAM)
            except EventTooLarge as refusal:
                return refusal.limit
        raise AssertionError("the store has no limit that it names")

    async def test_an_append_just_under_the_limit_is_taken(self, store: EventStore, stream: str) -> None:
        size = await self.limit(store) * 95 // 100
        await store.append(stream, [EventData("Big", b"x" * size)], expected=NO_STREAM)
        assert [len(found.data) async for found in store.read_stream(stream)] == [size]

    async def test_an_append_over_the_limit_is_refused_whole(self, store: EventStore, stream: str) -> None:
        limit = await self.limit(store)
        for sizes in ((limit + 100_000,), (limit * 6 // 10, limit * 6 // 10)):
            with pytest.raises(EventTooLarge) as refusal:
                await store.append(stream, [EventData("Big", b"x" * size) for size in sizes], expected=NO_STREAM)
            assert refusal.value.size > refusal.value.limit
        with pytest.raises(StreamNotFound):
            await read(store, stream)

    async def test_an_empty_type_name_or_id_is_refused(self, store: EventStore, stream: str) -> None:
        for name in ("", "$$"):
            with pytest.raises(InvalidStreamName):
                await store.append(name, [event()])
        with pytest.raises(InvalidStreamName):
            await store.append(stream, [event(type="")])
        with pytest.raises(InvalidStreamName):
            await store.append(stream, [EventData("Happened", b"{}", id=UUID(int=0))])

    async def test_names_that_begin_with_a_dollar_are_ordinary(self, store: EventStore, stream: str) -> None:
        for name in (f"${stream}", f"$${stream}"):
            assert (await store.append(name, [event(3)], expected=NO_STREAM)).version == 0
            assert await read(store, name) == [(0, 3)]

    # ---- append: bytes

    async def test_names_types_and_data_may_be_any_unicode(self, store: EventStore, stream: str) -> None:
        name, data = f"{stream} наказ 订单 ✓ 🧾 a/b?c#d", '{"ключ": "値"}'.encode()
        await store.append(name, [EventData("Замовлено✓", data, b'{"k":"\xc3\xa9"}')], expected=NO_STREAM)
        [found] = [found async for found in store.read_stream(name)]
        assert (found.stream, found.type, found.data, found.metadata) == (name, "Замовлено✓", data, b'{"k":"\xc3\xa9"}')

    async def test_octets_come_back_as_they_were(self, store: EventStore, stream: str) -> None:
        sent = EventData("Bin", bytes(range(256)), b"\x01\x00\xff", content_type=OCTETS)
        odd = EventData("Odd", b"<x/>", content_type="text/xml")
        await store.append(stream, [sent, odd], expected=NO_STREAM)
        [found, other] = [found async for found in store.read_stream(stream)]
        assert (found.data, found.metadata, found.content_type) == (sent.data, sent.metadata, OCTETS)
        assert (other.data, other.content_type) == (b"<x/>", OCTETS)

    async def test_data_marked_json_is_not_looked_at(self, store: EventStore, stream: str) -> None:
        await store.append(stream, [EventData("Happened", b"{nope"), EventData("Happened", b"", b"")])
        got = [(found.data, found.metadata, found.is_json) async for found in store.read_stream(stream)]
        assert got == [(b"{nope", b"", True), (b"", b"", True)]

    async def test_an_event_keeps_its_id_and_gets_the_time(self, store: EventStore, stream: str) -> None:
        sent = event()
        await store.append(stream, [sent])
        [found] = [found async for found in store.read_stream(stream)]
        assert found.id == sent.id
        assert abs(found.recorded_at - datetime.now(UTC)) < timedelta(days=1)
        assert isinstance(found.is_json, bool)

    # ---- append: idempotency

    @pytest.mark.parametrize("expected", [NO_STREAM, ANY], ids=["no_stream", "any"])
    async def test_the_same_ids_again_answer_as_before_and_write_nothing(
        self, store: EventStore, stream: str, expected: Expected
    ) -> None:
        batch = events(0, 1, 2)
        first = await store.append(stream, batch, expected=NO_STREAM)
        assert await store.append(stream, batch, expected=expected) == first
        assert await read(store, stream) == [(0, 0), (1, 1), (2, 2)]

    async def test_stream_exists_is_idempotent_with_the_same_ids(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0))
        batch = events(1, 2)
        first = await store.append(stream, batch, expected=STREAM_EXISTS)
        assert await store.append(stream, batch, expected=STREAM_EXISTS) == first
        assert await read(store, stream) == [(0, 0), (1, 1), (2, 2)]

    async def test_the_first_part_of_a_batch_again_answers_with_its_last_event(
        self, store: EventStore, stream: str
    ) -> None:
        batch = events(0, 1, 2, 3)
        await store.append(stream, batch, expected=NO_STREAM)
        positions = [found.position async for found in store.read_stream(stream)]
        for expected in (NO_STREAM, ANY):
            assert await store.append(stream, batch[:2], expected=expected) == (1, positions[1])
        assert len(await read(store, stream)) == 4

    async def test_a_batch_that_runs_past_what_was_written_is_refused(self, store: EventStore, stream: str) -> None:
        batch = events(0, 1, 2, 3)
        await store.append(stream, batch[:2], expected=NO_STREAM)
        await self.refused(store, stream, batch, NO_STREAM, 1)
        await self.refused(store, stream, batch, ANY, 1)
        assert len(await read(store, stream)) == 2

    async def test_a_piece_of_the_stream_again_at_its_version_is_idempotent(
        self, store: EventStore, stream: str
    ) -> None:
        batch = events(0, 1, 2, 3)
        last = await store.append(stream, batch, expected=NO_STREAM)
        assert (await store.append(stream, batch[1:3], expected=0)).version == 2
        await self.refused(store, stream, [batch[2], batch[1]], 0, 3)
        await self.refused(store, stream, batch[2:], 0, 3)
        assert await store.append(stream, batch[2:], expected=1) == last
        assert len(await read(store, stream)) == 4

    async def test_with_any_a_new_first_id_writes_the_whole_batch(self, store: EventStore, stream: str) -> None:
        known, new = event(1), event(2)
        await store.append(stream, [known], expected=NO_STREAM)
        assert (await store.append(stream, [new, known], expected=ANY)).version == 2
        assert await read(store, stream) == [(0, 1), (1, 2), (2, 1)]

    async def test_at_the_last_version_ids_are_not_looked_at(self, store: EventStore, stream: str) -> None:
        again = event(1)
        await store.append(stream, [again], expected=NO_STREAM)
        assert (await store.append(stream, [again], expected=0)).version == 1
        assert await read(store, stream) == [(0, 1), (1, 1)]

    async def test_the_same_id_in_another_stream_is_another_event(self, store: EventStore, stream: str) -> None:
        shared = event(1)
        await store.append(f"{stream}-a", [shared], expected=NO_STREAM)
        await store.append(f"{stream}-b", [shared], expected=ANY)
        assert await read(store, f"{stream}-b") == [(0, 1)]

    async def test_repetitions_that_are_under_way_together_write_once(self, store: EventStore, stream: str) -> None:
        for expected in (ANY, NO_STREAM):
            # Ids of their own: a store remembers only the first stream of each id.
            name, batch = f"{stream}-{expected.name}", events(0, 1)
            answers = await asyncio.gather(*(store.append(name, batch, expected=expected) for _ in range(8)))
            assert len(set(answers)) == 1
            assert await read(store, name) == [(0, 0), (1, 1)]

    async def test_what_is_no_expected_version_is_refused_as_such(self, store: EventStore, stream: str) -> None:
        for bad in (None, "0"):
            with pytest.raises(TypeError, match="an expected version is"):
                await store.append(stream, events(0), expected=bad)  # type: ignore[arg-type]
        assert await self.numbers_of(store, stream) == []

    # ---- append over several streams

    async def test_the_store_has_the_abilities_that_it_is_said_to_have(
        self, store: EventStore, stream: str, abilities: frozenset[Ability]
    ) -> None:
        assert await store.abilities() == abilities
        if Ability.APPEND_SEVERAL not in abilities:
            with pytest.raises(AbilityMissing, match="append_several") as missing:
                await store.append_several([StreamAppend(stream, events(0)), StreamAppend(f"{stream}-b", events(1))])
            assert missing.value.ability == Ability.APPEND_SEVERAL.value
            with pytest.raises(StreamNotFound):
                await read(store, stream)

    async def test_several_streams_get_their_events_in_the_order_given(
        self, several: EventStore, stream: str, abilities: frozenset[Ability]
    ) -> None:
        a, b, c = (f"{stream}-{name}" for name in "abc")
        await several.append(b, events(0, 1))
        before = await several.head()
        done = await several.append_several(
            [StreamAppend(c, events(2, 3), NO_STREAM), StreamAppend(a, events(4)), StreamAppend(b, events(5, 6), 1)]
        )
        assert dict(done.versions) == {c: 1, a: 0, b: 3}
        found = [found async for found in several.read_all(after=before, filter=Filter(stream_prefixes=(stream,)))]
        assert [(item.stream, item.version, number(item)) for item in found] == [
            (c, 0, 2),
            (c, 1, 3),
            (a, 0, 4),
            (b, 2, 5),
            (b, 3, 6),
        ]
        assert found[-1].position == done.position
        if Ability.CONSECUTIVE_POSITIONS in abilities:
            assert [item.position for item in found] == list(range(done.position - 4, done.position + 1))

    async def test_no_event_of_several_streams_is_lost_that_can_be_read_only_once(
        self, several: EventStore, stream: str
    ) -> None:
        once: list[Any] = [iter(events(0, 1)), iter(events(2))]
        parts: Any = iter([StreamAppend(stream, once[0]), StreamAppend(f"{stream}-b", once[1])])
        await several.append_several(parts)
        assert await read(several, stream) == [(0, 0), (1, 1)]
        assert await read(several, f"{stream}-b") == [(0, 2)]

    async def test_several_streams_that_were_deleted_begin_again_with_their_events_side_by_side(
        self, several: EventStore, stream: str, abilities: frozenset[Ability]
    ) -> None:
        a, b = f"{stream}-a", f"{stream}-b"
        for name in (a, b):
            await several.append(name, events(0))
            await several.delete(name)
        done = await several.append_several([StreamAppend(a, events(1, 2)), StreamAppend(b, events(3, 4))])
        assert dict(done.versions) == {a: 2, b: 2}
        for name in (a, b):
            first, second = [found async for found in several.read_stream(name)]
            assert (first.version, second.version) == (1, 2)
            if Ability.CONSECUTIVE_POSITIONS in abilities:
                assert second.position == first.position + 1
        assert second.position == done.position

    @pytest.mark.parametrize("empty", [False, True], ids=["written", "only checked"])
    @pytest.mark.parametrize(
        ("expected", "has", "says"),
        [
            (NO_STREAM, 1, "no stream"),
            (STREAM_EXISTS, 0, "an existing stream"),
            (7, 2, "version 7"),
            (0, 3, "version 0"),
            (0, 0, "version 0"),
        ],
        ids=["no_stream", "exists", "above", "below", "missing"],
    )
    async def test_whichever_of_several_streams_is_not_as_expected_nothing_is_written(
        self, several: EventStore, stream: str, empty: bool, expected: Expected, has: int, says: str
    ) -> None:
        for place in range(3):
            names = [f"{stream}-{place}-{n}" for n in range(3)]
            wrong = names[place]
            if has:
                await several.append(wrong, events(*range(has)))
            parts = [StreamAppend(name, events(90), NO_STREAM) for name in names]
            parts[place] = StreamAppend(wrong, [] if empty else events(91), expected)
            with pytest.raises(WrongExpectedVersion) as refusal:
                await several.append_several(parts)
            assert (refusal.value.stream, refusal.value.expected, refusal.value.actual) == (wrong, says, has - 1)
        assert await self.numbers_of(several, stream) == 3 * list(range(has))

    async def numbers_of(self, store: EventStore, stream: str) -> list[int]:
        """Return the numbers of all events of streams whose names begin so, in the order of the log."""
        return numbers([found async for found in store.read_all(filter=Filter(stream_prefixes=(stream,)))])

    async def test_a_stream_without_events_is_only_checked(self, several: EventStore, stream: str) -> None:
        a, b, c = (f"{stream}-{name}" for name in "abc")
        await several.append(a, events(0, 1))
        for checked in (StreamAppend[EventData](a, (), 1), StreamAppend[EventData](a, (), STREAM_EXISTS)):
            done = await several.append_several([checked, StreamAppend(b, events(2)), StreamAppend(c, expected=-1)])
            assert list(done.versions) == [b]
        done = await several.append_several([StreamAppend(c), StreamAppend(b, events(3))])
        assert dict(done.versions) == {b: 2}, "with ANY nothing is demanded"
        assert await read(several, a) == [(0, 0), (1, 1)]
        with pytest.raises(StreamNotFound):
            await read(several, c)

    async def test_an_append_over_several_streams_that_cannot_be_meant_is_refused(
        self, several: EventStore, stream: str
    ) -> None:
        other, twice = f"{stream}-b", event(1)
        with pytest.raises(InvalidAppend, match="named twice") as refused:
            await several.append_several([StreamAppend(stream, events(0)), StreamAppend(stream, events(1))])
        assert refused.value.stream == stream
        with pytest.raises(InvalidAppend, match="comes twice") as refused:
            await several.append_several([StreamAppend(stream, [twice]), StreamAppend(other, [twice])])
        assert refused.value.stream == other
        with pytest.raises(InvalidAppend, match="metadata") as refused:
            await several.append_several([StreamAppend(stream, events(0)), StreamAppend(f"$${other}", events(1))])
        assert refused.value.stream == f"$${other}"
        for nothing in ([], [StreamAppend[EventData](stream)], [StreamAppend[EventData](stream, [], NO_STREAM)]):
            with pytest.raises(InvalidAppend, match="no events"):
                await several.append_several(nothing)
        with pytest.raises(InvalidAppend, match="1001 streams"):
            await several.append_several([StreamAppend(f"{stream}-{n}", events(n)) for n in range(1001)])
        for bad in (StreamAppend("", events(0)), StreamAppend(other, [event(type="")])):
            with pytest.raises(InvalidStreamName):
                await several.append_several([StreamAppend(stream, events(0)), bad])
        assert await self.numbers_of(several, stream) == []

    async def test_one_append_may_be_over_a_thousand_streams(self, several: EventStore, stream: str) -> None:
        done = await several.append_several([StreamAppend(f"{stream}-{n}", events(n)) for n in range(1000)])
        assert dict(done.versions) == {f"{stream}-{n}": 0 for n in range(1000)}
        assert await self.numbers_of(several, stream) == list(range(1000))

    @pytest.mark.parametrize("expected", [NO_STREAM, ANY], ids=["no_stream", "any"])
    async def test_an_append_over_several_streams_again_answers_as_before(
        self, several: EventStore, stream: str, expected: Expected
    ) -> None:
        a, b, checked = (f"{stream}-{name}" for name in "abc")
        await several.append(a, events(0))
        parts = [
            StreamAppend(a, events(1, 2), 0),
            StreamAppend(b, events(3), expected),
            StreamAppend(checked, expected=-1),
        ]
        first = await several.append_several(parts)
        assert await several.append_several(parts) == first
        await several.append(a, events(4))
        await several.append(b, events(5))
        await several.append(checked, events(6))
        assert await several.append_several(parts) == first, "also when the streams have gone on"
        assert await self.numbers_of(several, stream) == [0, 1, 2, 3, 4, 5, 6]

    async def test_repetitions_over_several_streams_that_are_under_way_together_write_once(
        self, several: EventStore, stream: str
    ) -> None:
        parts = [StreamAppend(f"{stream}-{n}", events(n)) for n in range(3)]
        answers = await asyncio.gather(*(several.append_several(parts) for _ in range(8)))
        assert all(answer == answers[0] for answer in answers)
        assert await self.numbers_of(several, stream) == [0, 1, 2]

    @pytest.mark.parametrize("expected", [NO_STREAM, ANY], ids=["no_stream", "any"])
    async def test_a_part_of_an_append_over_several_streams_again_is_refused(
        self, several: EventStore, stream: str, expected: Expected
    ) -> None:
        a, b = f"{stream}-a", f"{stream}-b"
        known, new = events(0, 1), event(2)
        await several.append(a, known)
        parts = [StreamAppend(a, known, expected), StreamAppend(b, [new])]
        for some in (parts, parts[::-1]):
            with pytest.raises(PartlyRepeated) as refused:
                await several.append_several(some)
            assert (refused.value.stream, refused.value.version) == (a, 1)
        for batch in ([*known, new], [known[0], new]):
            with pytest.raises((PartlyRepeated, WrongExpectedVersion), match=a):
                await several.append_several([StreamAppend(b, events(3)), StreamAppend(a, batch, expected)])
        assert await self.numbers_of(several, stream) == [0, 1]

    async def test_appends_over_the_same_streams_in_any_order_all_happen_each_in_one_piece(
        self, several: EventStore, stream: str
    ) -> None:
        names = [f"{stream}-{n}" for n in range(4)]
        before = await several.head()

        async def write(writer: int) -> None:
            for n in range(12):
                turned = [names[(writer + n + at) % 4] for at in range(4)]
                order = turned if n % 2 else turned[::-1]
                await several.append_several([StreamAppend(name, [event(writer * 100 + n)]) for name in order])
                await several.append(names[n % 4], [event(1_000_000)])

        async with asyncio.timeout(3 * PATIENCE), asyncio.TaskGroup() as tasks:
            for writer in range(8):
                tasks.create_task(write(writer))
        own = Filter(stream_prefixes=(stream,))
        found = [found async for found in several.read_all(after=before, filter=own)]
        positions = [item.position for item in found]
        assert positions == sorted(set(positions))
        together = [number(item) for item in found if number(item) < 1_000_000]
        at = [place for place, item in enumerate(found) if number(item) < 1_000_000]
        assert len(together) == 8 * 12 * 4
        for begin in range(0, len(together), 4):
            assert len(set(together[begin : begin + 4])) == 1, "no other append stands between its events"
            assert at[begin + 3] - at[begin] == 3
        for name in names:
            assert [found.version async for found in several.read_stream(name)] == list(range(8 * 15))

    async def test_of_appends_over_several_streams_that_expect_the_same_one_wins(
        self, several: EventStore, stream: str
    ) -> None:
        a, b = f"{stream}-a", f"{stream}-b"
        contenders = [
            [StreamAppend(a, [event(n)], NO_STREAM), StreamAppend(b, [event(n)])][:: 1 if n % 2 else -1]
            for n in range(10)
        ]
        outcomes = await asyncio.gather(*map(several.append_several, contenders), return_exceptions=True)
        assert sum(isinstance(outcome, WrongExpectedVersion) for outcome in outcomes) == 9
        winner = next(n for n, outcome in enumerate(outcomes) if isinstance(outcome, AppendedSeveral))
        assert await self.numbers_of(several, stream) == [winner, winner]

    async def test_an_append_over_several_streams_over_the_limit_is_refused_whole(
        self, several: EventStore, stream: str
    ) -> None:
        limit = await self.limit(several)
        parts = [StreamAppend(f"{stream}-{n}", [EventData("Big", b"x" * (limit * 6 // 10))]) for n in range(2)]
        with pytest.raises(EventTooLarge) as refusal:
            await several.append_several([StreamAppend(f"{stream}-small", events(0)), *parts])
        assert refusal.value.size > refusal.value.limit
        assert refusal.value.stream in {part.stream for part in parts}
        assert await self.numbers_of(several, stream) == []

    async def test_several_streams_may_have_names_of_every_kind(self, several: EventStore, stream: str) -> None:
        names = [f"{stream}{ending}" for ending in ("", " наказ 🧾 a/b?c#d", "%x", "_*[", "." * 40, "'\";--", "\t")]
        names.append(f"${stream}")
        done = await several.append_several(
            [StreamAppend(name, [event(n, f"Тип{n}🧾")], NO_STREAM) for n, name in enumerate(names)]
        )
        assert dict(done.versions) == dict.fromkeys(names, 0)
        for n, name in enumerate(names):
            assert await read(several, name) == [(0, n)]

    async def test_what_several_streams_get_comes_back_as_it_was(self, several: EventStore, stream: str) -> None:
        """Metadata is a JSON object here, and a server may add names that begin with a dollar."""
        metadata = {"$correlationId": "c-1", "schemaVersion": 2, "user": "Їжак 🧾", "deep": {"k": [1, 1.5, None, True]}}
        sent = EventData("Happened", b'{"n":1}', json.dumps(metadata).encode())
        octets = EventData("Bin", bytes(range(256)), content_type=OCTETS)
        await several.append_several([StreamAppend(stream, [sent]), StreamAppend(f"{stream}-b", [octets])])
        [found] = [found async for found in several.read_stream(stream)]
        assert (found.id, found.type, found.data, found.is_json) == (sent.id, "Happened", sent.data, True)
        assert json.loads(found.metadata).items() >= metadata.items()
        [other] = [found async for found in several.read_stream(f"{stream}-b")]
        assert (other.id, other.type, other.data, other.content_type) == (octets.id, "Bin", octets.data, OCTETS)

    async def test_a_tombstoned_stream_among_several_is_named_and_nothing_is_written(
        self, several: EventStore, stream: str
    ) -> None:
        gone, other = f"{stream}-gone", f"{stream}-b"
        await several.append(gone, events(0))
        await several.tombstone(gone)
        before = await several.head()
        for part in (
            StreamAppend(gone, events(1)),
            StreamAppend(gone, events(1), NO_STREAM),
            StreamAppend(gone, events(1), 0),
            StreamAppend[EventData](gone, [], 0),
            StreamAppend[EventData](gone, [], STREAM_EXISTS),
        ):
            for parts in ([part, StreamAppend(other, events(2))], [StreamAppend(other, events(2)), part]):
                with pytest.raises(StreamDeleted) as deleted:
                    await several.append_several(parts)
                assert (deleted.value.stream, deleted.value.tombstoned) == (gone, True)
        with pytest.raises(StreamNotFound):
            await read(several, other)
        assert [found async for found in several.read_all(after=before, filter=Filter(stream_prefixes=(stream,)))] == []

    async def test_a_deleted_stream_among_several_begins_again(self, several: EventStore, stream: str) -> None:
        gone, other, third = (f"{stream}-{name}" for name in "abc")
        await several.append(gone, events(0, 1))
        await several.delete(gone)
        for part in (StreamAppend(gone, events(9), STREAM_EXISTS), StreamAppend[EventData](gone, [], STREAM_EXISTS)):
            with pytest.raises(StreamDeleted) as deleted:
                await several.append_several([StreamAppend(other, events(9)), part])
            assert (deleted.value.stream, deleted.value.tombstoned) == (gone, False)
        for state in (NO_STREAM, 1):
            await several.append_several([StreamAppend(third, events(2)), StreamAppend(gone, expected=state)])
        done = await several.append_several([StreamAppend(gone, events(3), NO_STREAM), StreamAppend(other, events(4))])
        assert dict(done.versions) == {gone: 2, other: 0}
        assert await read(several, gone) == [(2, 3)]
        assert await read(several, other) == [(0, 4)]

    async def test_a_closed_store_takes_no_append_over_several_streams(self, several: EventStore, stream: str) -> None:
        await several.close()
        with pytest.raises(StoreUnavailable, match="closed"):
            await several.append_several([StreamAppend(stream, events(0)), StreamAppend(f"{stream}-b", events(1))])

    async def test_what_was_acknowledged_over_several_streams_is_there_after_reopening(
        self, several: EventStore, stream: str, reopen: Reopen | None
    ) -> None:
        if reopen is None:
            pytest.skip("this adapter cannot reopen")
        parts = [StreamAppend(f"{stream}-{n}", events(2 * n, 2 * n + 1), NO_STREAM) for n in range(3)]
        first = await several.append_several(parts)
        await several.close()
        async with reopen() as again:
            assert await again.append_several(parts) == first
            assert await self.numbers_of(again, stream) == [0, 1, 2, 3, 4, 5]

    # ---- reading a stream

    async def test_reading_a_missing_stream_raises_stream_not_found(self, store: EventStore, stream: str) -> None:
        for backwards in (False, True):
            with pytest.raises(StreamNotFound) as missing:
                await read(store, stream, backwards=backwards)
            assert missing.value.stream == stream

    async def test_reading_begins_at_a_version_inclusive(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        assert await read(store, stream, start=3) == [(3, 3), (4, 4)]
        assert await read(store, stream, start=5) == []
        assert await read(store, stream, start=99) == []

    async def test_reading_backwards_begins_at_the_end_or_a_version_inclusive(
        self, store: EventStore, stream: str
    ) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        whole = [(n, n) for n in (4, 3, 2, 1, 0)]
        assert await read(store, stream, backwards=True) == whole
        assert await read(store, stream, backwards=True, start=2) == whole[2:]
        assert await read(store, stream, backwards=True, start=99) == whole

    async def test_a_read_ends_at_its_limit(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        assert await read(store, stream, limit=2) == [(0, 0), (1, 1)]
        assert await read(store, stream, limit=2, backwards=True) == [(4, 4), (3, 3)]
        assert await read(store, stream, limit=0) == []

    async def test_a_long_stream_is_read_whole_in_both_directions(self, store: EventStore, stream: str) -> None:
        for begin in range(0, 2_000, 500):
            await store.append(stream, events(*range(begin, begin + 500)))
        assert await read(store, stream) == [(n, n) for n in range(2_000)]
        assert await read(store, stream, backwards=True) == [(n, n) for n in reversed(range(2_000))]

    # ---- reading the log

    async def test_reading_all_is_in_position_order_across_streams(self, store: EventStore, stream: str) -> None:
        for n in range(6):
            await store.append(f"{stream}-{n % 2}", [event(n)])
        found = [found async for found in store.read_all(filter=Filter(stream_prefixes=(stream,)))]
        assert numbers(found) == list(range(6))
        assert [item.version for item in found] == [0, 0, 1, 1, 2, 2]
        positions = [item.position for item in found]
        assert positions == sorted(set(positions))

    async def test_reading_all_begins_behind_a_position(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        at = [found.position async for found in store.read_stream(stream)][2]
        own = Filter(stream_prefixes=(stream,))
        assert numbers([found async for found in store.read_all(after=at, filter=own)]) == [3, 4]
        assert numbers([found async for found in store.read_all(after=at, filter=own, backwards=True)]) == [4, 3]
        assert numbers([found async for found in store.read_all(after=at, filter=own, limit=1)]) == [3]
        assert numbers([found async for found in store.read_all(after=at, filter=own, limit=1, backwards=True)]) == [4]

    async def test_reading_all_begins_behind_a_position_without_event(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0))
        await store.append(stream, events(1, 2, 3))
        at = [found.position async for found in store.read_stream(stream)]
        own = Filter(stream_prefixes=(stream,))
        for n in range(4):
            for limit in (None, 1):
                found = [found async for found in store.read_all(after=at[n] - 1, filter=own, limit=limit)]
                assert numbers(found) == list(range(n, 4))[:limit]

    async def test_reading_all_behind_the_last_position_is_empty(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0))
        async for found in store.read_all(after=await store.head()):
            assert not found.stream.startswith(stream)

    async def test_a_filter_by_type_takes_whole_names(self, store: EventStore, stream: str) -> None:
        kind = f"T{stream[-12:]}"
        await store.append(stream, [event(1, kind), event(2, kind + "Other"), event(3), event(4, kind)])
        found = [found async for found in store.read_all(filter=Filter(types=(kind, "Never")))]
        assert numbers(found) == [1, 4]

    async def test_the_conditions_of_a_filter_hold_together(self, store: EventStore, stream: str) -> None:
        await store.append(f"{stream}-a", [event(1, "A"), event(2, "B")])
        await store.append(f"{stream}-b", [event(3, "A")])
        await store.append(f"{stream}-bb", [event(4, "A")])

        async def through(**conditions: tuple[str, ...]) -> list[int]:
            return numbers([found async for found in store.read_all(filter=Filter(**conditions))])

        assert await through(stream_prefixes=(f"{stream}-a", f"{stream}-b")) == [1, 2, 3, 4]
        assert await through(stream_prefixes=(f"{stream}-",), types=("A",)) == [1, 3, 4]
        assert await through(stream_prefixes=(stream,), exclude_stream_prefixes=(f"{stream}-b",)) == [1, 2]
        assert await through(stream_prefixes=(stream,), exclude_stream_prefixes=("$", f"{stream}-bb")) == [1, 2, 3]

    async def test_a_prefix_is_a_text_not_a_pattern(self, store: EventStore, stream: str) -> None:
        for n, name in enumerate((f"{stream}.x", f"{stream}ax", f"{stream}%x", f"{stream}_x", f"{stream}*[x")):
            await store.append(name, [event(n)])
        for n, prefix in enumerate((".", "a", "%", "_", "*[")):
            own = Filter(stream_prefixes=(stream + prefix,))
            assert numbers([found async for found in store.read_all(filter=own)]) == [n]

    async def test_the_head_is_the_position_of_the_last_event(self, store: EventStore, stream: str) -> None:
        appended = await store.append(stream, events(0))
        assert await store.head() >= appended.position
        later = await store.append(stream, events(1))
        assert await store.head() >= later.position > appended.position

    async def test_what_was_acknowledged_can_be_read_at_once(self, store: EventStore, stream: str) -> None:
        for n in range(20):
            await store.append(stream, [event(n)])
            assert await read(store, stream, backwards=True, limit=1) == [(n, n)]

    async def test_the_log_has_one_identity_that_is_in_it(self, store: EventStore) -> None:
        identity = await store.log_id()
        assert await store.log_id() == identity
        [first] = [found async for found in store.read_stream("tidings_log", limit=1)]
        assert first.version == 0
        assert str(identity) in first.data.decode()

    # ---- metadata and retention

    async def test_a_stream_without_metadata_has_none_at_version_minus_1(self, store: EventStore, stream: str) -> None:
        assert await store.get_metadata(stream) == ({}, -1)

    async def test_metadata_is_replaced_and_versioned(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0))
        assert (await store.set_metadata(stream, {"k": 1, "é": "✓"})).version == 0
        assert await store.get_metadata(stream) == ({"k": 1, "é": "✓"}, 0)
        assert (await store.set_metadata(stream, {"k": 2}, expected=0)).version == 1
        assert await store.get_metadata(stream) == ({"k": 2}, 1)
        with pytest.raises(WrongExpectedVersion):
            await store.set_metadata(stream, {"k": 3}, expected=0)
        assert await store.get_metadata(stream) == ({"k": 2}, 1)

    async def test_a_stream_with_metadata_alone_exists_for_appends_but_not_for_reads(
        self, store: EventStore, stream: str
    ) -> None:
        await store.set_metadata(stream, {"k": 1})
        with pytest.raises(StreamNotFound):
            await read(store, stream)
        assert (await store.append(stream, events(0), expected=STREAM_EXISTS)).version == 0
        assert await read(store, stream) == [(0, 0)]

    async def test_a_metadata_stream_shows_its_last_event_only(self, store: EventStore, stream: str) -> None:
        await store.set_metadata(stream, {"n": 1})
        await store.set_metadata(stream, {"n": 2})
        [found] = [found async for found in store.read_stream(f"$${stream}")]
        assert (found.version, found.type, json.loads(found.data)) == (1, "$metadata", {"n": 2})

    async def test_max_count_shows_the_last_events(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        await store.set_metadata(stream, {"$maxCount": 2})
        assert await read(store, stream) == [(3, 3), (4, 4)]
        assert await read(store, stream, start=0, limit=1) == [(3, 3)]
        assert await read(store, stream, backwards=True) == [(4, 4), (3, 3)]
        assert (await store.append(stream, events(5), expected=4)).version == 5
        assert await read(store, stream) == [(4, 4), (5, 5)]

    async def test_truncate_before_hides_what_is_below(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        await store.set_metadata(stream, {"$tb": 3})
        assert await read(store, stream) == [(3, 3), (4, 4)]
        assert await read(store, stream, backwards=True) == [(4, 4), (3, 3)]
        await store.append(stream, events(7), expected=4)
        assert await read(store, stream) == [(3, 3), (4, 4), (5, 7)]

    async def test_a_stream_truncated_beyond_its_end_is_empty_but_exists(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        await store.set_metadata(stream, {"$tb": 50})
        assert await read(store, stream) == []
        await store.append(stream, events(7), expected=4)
        await self.refused(store, stream, events(8), NO_STREAM, 5)
        assert await read(store, stream) == []

    async def test_max_age_hides_older_events(
        self, store: EventStore, stream: str, advance: Callable[[float], None]
    ) -> None:
        await store.append(stream, events(0, 1))
        await store.set_metadata(stream, {"$maxAge": 1})
        advance(2.2)

        async def hidden() -> bool:
            return await read(store, stream) == []

        await eventually(hidden)
        await store.append(stream, events(9))
        assert (await store.append(stream, [], expected=2)).version == 2
        # Not visible if the test itself was delayed for a second and the clock is real.
        assert await read(store, stream) in ([(2, 9)], [])

    async def test_truncation_hides_nothing_of_the_log(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        await store.set_metadata(stream, {"$maxCount": 1, "$tb": 2})
        own = Filter(stream_prefixes=(stream,))
        assert numbers([found async for found in store.read_all(filter=own)]) == [0, 1, 2, 3, 4]

    # ---- soft delete

    async def test_a_deleted_stream_is_not_found_and_continues_its_versions(
        self, store: EventStore, stream: str
    ) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        await store.delete(stream, expected=4)
        with pytest.raises(StreamNotFound):
            await read(store, stream)
        assert (await store.append(stream, events(9), expected=NO_STREAM)).version == 5
        assert await read(store, stream) == [(5, 9)]

    @pytest.mark.parametrize("expected", [ANY, NO_STREAM, 1], ids=["any", "no_stream", "last_version"])
    async def test_writing_after_a_delete_truncates_before_the_new_events(
        self, store: EventStore, stream: str, expected: Expected
    ) -> None:
        await store.append(stream, events(0, 1))
        await store.delete(stream)
        assert (await store.get_metadata(stream)).values == {"$tb": SOFT}
        assert (await store.append(stream, events(8, 9), expected=expected)).version == 3
        assert await read(store, stream) == [(2, 8), (3, 9)]
        assert await store.get_metadata(stream) == ({"$tb": 2}, 1)

    async def test_after_a_delete_other_versions_and_stream_exists_are_refused(
        self, store: EventStore, stream: str
    ) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        await store.delete(stream)
        await self.refused(store, stream, events(9), 2, 4)
        with pytest.raises(StreamDeleted) as deleted:
            await store.append(stream, events(9), expected=STREAM_EXISTS)
        assert not deleted.value.tombstoned
        with pytest.raises(StreamNotFound):
            await read(store, stream)

    async def test_repeating_an_append_after_a_delete_does_not_bring_it_back(
        self, store: EventStore, stream: str
    ) -> None:
        batch = events(0, 1)
        await store.append(stream, batch, expected=NO_STREAM)
        await store.delete(stream)
        assert (await store.append(stream, batch, expected=NO_STREAM)).version == 1
        with pytest.raises(StreamNotFound):
            await read(store, stream)

    async def test_setting_metadata_of_a_deleted_stream_makes_it_exist_and_empty(
        self, store: EventStore, stream: str
    ) -> None:
        await store.append(stream, events(0, 1))
        await store.delete(stream)
        await store.set_metadata(stream, {"k": 1})
        assert await store.get_metadata(stream) == ({"k": 1, "$tb": 2}, 2)
        assert await read(store, stream) == []
        assert (await store.append(stream, events(2), expected=STREAM_EXISTS)).version == 2
        assert await read(store, stream) == [(2, 2)]

    async def test_a_delete_replaces_the_metadata(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0))
        await store.set_metadata(stream, {"k": 1})
        await store.delete(stream)
        assert await store.get_metadata(stream) == ({"$tb": SOFT}, 1)

    async def test_a_delete_with_a_wrong_version_or_of_nothing_is_refused(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        with pytest.raises(WrongExpectedVersion) as wrong:
            await store.delete(stream, expected=1)
        assert wrong.value.actual == 4
        for expected in (1, ANY, STREAM_EXISTS):
            with pytest.raises(WrongExpectedVersion) as missing:
                await store.delete(f"{stream}-none", expected=expected)
            assert missing.value.actual == -1
        assert len(await read(store, stream)) == 5

    async def test_a_delete_may_be_repeated(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        for expected in (ANY, ANY, 4):
            await store.delete(stream, expected=expected)
        with pytest.raises(StreamNotFound):
            await read(store, stream)

    async def test_a_delete_is_an_event_of_the_log_and_hides_none(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0))
        await store.delete(stream)
        await store.append(stream, events(5))
        own = Filter(stream_prefixes=(stream, f"$${stream}"))
        shown = [(e.stream, e.version, e.type) async for e in store.read_all(filter=own)]
        meta = f"$${stream}"
        assert shown == [
            (stream, 0, "Happened"),
            (meta, 0, "$metadata"),
            (stream, 1, "Happened"),
            (meta, 1, "$metadata"),
        ]

    # ---- tombstone

    async def test_a_tombstoned_stream_refuses_every_use(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        await store.tombstone(stream, expected=4)
        uses: list[Callable[[], Awaitable[object]]] = [
            lambda: read(store, stream),
            lambda: read(store, stream, backwards=True),
            lambda: store.append(stream, events(9), expected=ANY),
            lambda: store.append(stream, events(9), expected=NO_STREAM),
            lambda: store.append(stream, events(9), expected=4),
            lambda: store.append(stream, [], expected=ANY),
            lambda: store.delete(stream),
            lambda: store.tombstone(stream),
            lambda: store.get_metadata(stream),
            lambda: store.set_metadata(stream, {"k": 1}),
            lambda: read(store, f"$${stream}"),
            lambda: take(store.subscribe_stream(stream), many(1)),
        ]
        for use in uses:
            with pytest.raises(StreamDeleted) as deleted:
                await use()
            assert deleted.value.tombstoned

    async def test_a_missing_stream_can_be_tombstoned(self, store: EventStore, stream: str) -> None:
        await store.tombstone(f"{stream}-a", expected=ANY)
        await store.tombstone(f"{stream}-b", expected=NO_STREAM)
        for expected in (3, STREAM_EXISTS):
            with pytest.raises(WrongExpectedVersion) as wrong:
                await store.tombstone(f"{stream}-c", expected=expected)
            assert wrong.value.actual == -1
        for name in ("a", "b"):
            with pytest.raises(StreamDeleted):
                await read(store, f"{stream}-{name}")

    async def test_a_tombstone_is_an_event_of_the_log_and_hides_none(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0))
        await store.tombstone(stream)
        found = [found async for found in store.read_all(filter=Filter(stream_prefixes=(stream,)))]
        assert [(item.version, item.type) for item in found] == [(0, "Happened"), (SOFT, "$streamDeleted")]
        assert found[1].position > found[0].position

    # ---- what would end a server

    async def test_a_stream_that_would_hold_metadata_of_nothing_is_refused(self, store: EventStore) -> None:
        for name in ("", "$$", "$$$$"):
            uses: list[Callable[[], Awaitable[object]]] = [
                lambda name=name: store.append(name, [event()]),  # type: ignore[misc]
                lambda name=name: store.set_metadata(name, {"k": 1}),  # type: ignore[misc]
                lambda name=name: store.delete(name),  # type: ignore[misc]
                lambda name=name: store.tombstone(name),  # type: ignore[misc]
                lambda name=name: read(store, name),  # type: ignore[misc]
            ]
            for use in uses:
                with pytest.raises(InvalidStreamName):
                    await use()

    @pytest.mark.parametrize("seconds", [60_000_000_001, 60_000_000_000.5, 922_337_203_686, 2**63, 10**30, 1e300])
    async def test_a_max_age_before_the_beginning_of_time_is_refused_and_nothing_is_written(
        self, store: EventStore, stream: str, seconds: float
    ) -> None:
        document = json.dumps({"k": 1, "$maxAge": seconds}).encode()
        twice = b'{"$maxAge": %s, "$maxAge": 1}' % json.dumps(seconds).encode()
        escaped = document.replace(b"$", b"\\u0024")
        with pytest.raises(InvalidMetadata, match=r"\$maxAge.*60000000000 seconds"):
            await store.set_metadata(stream, {"k": 1, "$maxAge": seconds})
        for data in (document, twice, escaped):
            with pytest.raises(InvalidMetadata):
                await store.append(f"$${stream}", [event(), EventData("$metadata", data)])
        with pytest.raises(InvalidMetadata, match="not JSON"):
            await store.append(f"$${stream}", [EventData("$metadata", document.replace(b'"', b"'"))])
        assert await store.get_metadata(stream) == ({}, -1)
        await store.set_metadata(stream, {"$maxAge": 60_000_000_000, "custom": {"$maxAge": seconds}})
        await store.append(stream, events(1))
        assert await read(store, stream) == [(0, 1)]

    async def test_a_metadata_stream_cannot_be_deleted(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0))
        await store.set_metadata(stream, {"k": 1})
        for close in (store.delete, store.tombstone):
            for expected in (ANY, 0):
                with pytest.raises(InvalidStreamName, match="set_metadata"):
                    await close(f"$${stream}", expected=expected)
        assert await store.get_metadata(stream) == ({"k": 1}, 0)

    async def test_metadata_of_a_tombstoned_stream_can_neither_be_written_nor_deleted(
        self, store: EventStore, stream: str
    ) -> None:
        await store.append(stream, events(0))
        await store.tombstone(stream)
        for _ in range(2):
            with pytest.raises(StreamDeleted) as deleted:
                await store.set_metadata(stream, {"k": 1})
            assert (deleted.value.stream, deleted.value.tombstoned) == (stream, True)
            with pytest.raises(StreamDeleted):
                await store.append(f"$${stream}", [EventData("$metadata", b"{}")])
            with pytest.raises(InvalidStreamName):
                await store.delete(f"$${stream}")
        await store.append(f"{stream}-other", events(1))

    async def test_metadata_written_one_after_the_other_is_applied_in_that_order(
        self, store: EventStore, stream: str
    ) -> None:
        writes = [asyncio.ensure_future(store.set_metadata(stream, {"n": n})) for n in range(30)]
        assert [(await write).version for write in writes] == list(range(30))
        assert await store.get_metadata(stream) == ({"n": 29}, 29)

    # ---- catch-up subscriptions to a stream

    async def test_a_stream_subscription_reads_history_then_goes_live(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1))
        async with closing(store.subscribe_stream(stream)) as subscription:
            history = await take(subscription, caught_up)
            assert numbers(history) == [0, 1]
            assert isinstance(history[-1], CaughtUp)
            await store.append(stream, events(9))
            await store.append(f"{stream}-other", events(8))
            await store.append(stream, events(10))
            assert numbers(await take(subscription, many(2))) == [9, 10]

    async def test_a_stream_subscription_begins_behind_a_version(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        async with closing(store.subscribe_stream(stream, after_version=2)) as subscription:
            assert numbers(await take(subscription, caught_up)) == [3, 4]
        async with closing(store.subscribe_stream(stream, after_version=4)) as subscription:
            assert numbers(await take(subscription, caught_up)) == []
            await store.append(stream, events(5))
            assert numbers(await take(subscription, many(1))) == [5]

    async def test_a_missing_stream_is_waited_for(self, store: EventStore, stream: str) -> None:
        async with closing(store.subscribe_stream(stream)) as subscription:
            assert numbers(await take(subscription, caught_up)) == []
            await store.append(stream, events(1), expected=NO_STREAM)
            assert numbers(await take(subscription, many(1))) == [1]

    async def test_a_deleted_stream_is_waited_for(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1))
        await store.delete(stream)
        async with closing(store.subscribe_stream(stream)) as subscription:
            assert numbers(await take(subscription, caught_up)) == []
            await store.append(stream, events(2))
            assert numbers(await take(subscription, many(1))) == [2]

    async def test_a_subscription_survives_the_delete_of_its_stream(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0))
        async with closing(store.subscribe_stream(stream)) as subscription:
            await take(subscription, caught_up)
            await store.delete(stream)
            await store.append(stream, events(8))
            [found] = [e for e in await take(subscription, many(1)) if isinstance(e, RecordedEvent)]
            assert (found.version, number(found)) == (1, 8)

    async def test_a_tombstone_is_delivered_and_ends_the_subscription(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0))
        async with closing(store.subscribe_stream(stream)) as subscription:
            await take(subscription, caught_up)
            await store.tombstone(stream)
            [last] = [e for e in await take(subscription, many(1)) if isinstance(e, RecordedEvent)]
            assert (last.version, last.type) == (SOFT, "$streamDeleted")
            with pytest.raises(StreamDeleted):
                await take(subscription, many(1))

    async def test_a_stream_subscription_begins_with_what_may_be_read(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        await store.set_metadata(stream, {"$maxCount": 2})
        async with closing(store.subscribe_stream(stream)) as subscription:
            assert numbers(await take(subscription, caught_up)) == [3, 4]

    # ---- catch-up subscriptions to the log

    async def test_a_log_subscription_begins_behind_a_position(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0, 1, 2, 3, 4))
        at = [found.position async for found in store.read_stream(stream)][2]
        own = Filter(stream_prefixes=(stream,))
        async with closing(store.subscribe_all(after=at, filter=own)) as subscription:
            assert numbers(await take(subscription, many(2))) == [3, 4]

    async def test_a_log_subscription_says_when_it_has_caught_up(self, store: EventStore, stream: str) -> None:
        before = (await store.append(stream, events(0, 1))).position
        first = (await store.append(stream, events(2))).position
        async with closing(store.subscribe_all(after=before, filter=Filter(stream_prefixes=(stream,)))) as source:
            history = await take(source, caught_up)
            assert numbers(history) == [2]
            assert isinstance(history[-1], CaughtUp)
            assert history[-1].position >= first
            await store.append(stream, events(9))
            assert numbers(await take(source, many(1))) == [9]

    async def test_a_log_subscription_without_a_filter_shows_everything(self, store: EventStore, stream: str) -> None:
        before = await store.head()
        await store.append(stream, events(0))
        await store.set_metadata(stream, {"k": 1})
        async with closing(store.subscribe_all(after=before)) as source:
            got = await take(source, caught_up)
            names = [item.stream for item in got if isinstance(item, RecordedEvent) and stream in item.stream]
            assert names == [stream, f"$${stream}"]

    async def test_checkpoints_move_where_nothing_matches_and_never_beyond_the_log(
        self, store: EventStore, stream: str
    ) -> None:
        """The last checkpoint may lag behind the end of the log, but not behind an event that matches the filter."""
        before = await store.head()
        first = (await store.append(stream, events(0))).position
        await store.append(stream, events(*range(1, 1_000)))
        nothing = Filter(stream_prefixes=(f"never-{stream}",))
        async with closing(store.subscribe_all(after=before, filter=nothing)) as source:
            got = await take(source, caught_up)
            head = await store.head()
        checkpoints = [item.position for item in got if isinstance(item, Checkpoint)]
        assert checkpoints == sorted(set(checkpoints))
        assert first < checkpoints[-1] <= got[-1].position <= head
        assert not numbers(got)
        assert [found async for found in store.read_all(after=checkpoints[-1], filter=nothing)] == []

    # ---- from an empty log on

    @pytest.mark.parametrize("filtered", ["prefix", "excluding", "type", "not"])
    async def test_who_follows_an_empty_log_is_told_no_place_beyond_it_and_then_every_event(
        self, empty: EventStore, stream: str, filtered: str
    ) -> None:
        own = {
            "prefix": Filter(stream_prefixes=(stream,)),
            "excluding": Filter(exclude_stream_prefixes=("$", "tidings_", f"other-{stream}")),
            "type": Filter(types=(f"T{stream}",)),
            "not": EVERYTHING,
        }[filtered]

        def mine(got: list[Any]) -> list[int]:
            return numbers([item for item in got if getattr(item, "stream", "") == stream])

        async with closing(empty.subscribe_all(filter=own)) as source:
            got = await take(source, caught_up)
            await self.in_the_log(empty, got)
            await empty.append(f"other-{stream}", events(99), expected=NO_STREAM)
            for n in range(40):
                await empty.append(stream, [event(n, f"T{stream}")])
            later = await take(source, lambda found: len(mine(found)) == 40)
            await self.in_the_log(empty, later)
        assert mine(later) == list(range(40))
        assert not mine(got)

    async def test_from_every_place_that_was_told_since_the_log_was_empty_nothing_is_missed(
        self, empty: EventStore, stream: str
    ) -> None:
        own = Filter(stream_prefixes=(stream,))
        async with closing(empty.subscribe_all(filter=own)) as source:
            told = await take(source, caught_up)
            await empty.append(f"other-{stream}", events(*range(70)), expected=NO_STREAM)
            told += await take(source, lambda got: any(isinstance(item, Checkpoint) for item in got))
            await empty.append(stream, events(0, 1, 2), expected=NO_STREAM)
            told += await take(source, many(3))
        await self.in_the_log(empty, told)
        for item in told:
            behind = [0, 1, 2][number(item) + 1 :] if isinstance(item, RecordedEvent) else [0, 1, 2]
            async with closing(empty.subscribe_all(after=item.position, filter=own)) as source:
                assert numbers(await take(source, caught_up)) == behind

    async def test_a_stream_followed_since_the_log_was_empty_is_waited_for(
        self, empty: EventStore, stream: str
    ) -> None:
        async with closing(empty.subscribe_stream(stream)) as source:
            told = await take(source, caught_up)
            await empty.append(stream, events(0), expected=NO_STREAM)
            told += await take(source, many(1))
        await self.in_the_log(empty, told)
        assert numbers(told) == [0]

    async def in_the_log(self, store: EventStore, told: list[Any]) -> None:
        """Assert that the log has reached every position, or that it is -1."""
        head = await store.head()
        assert -1 <= head < 2**63
        for item in told:
            assert -1 <= item.position <= head, item

    async def test_no_gap_and_no_repetition_where_history_meets_live(self, store: EventStore, stream: str) -> None:
        total, writers = 400, 4

        async def write(writer: int) -> None:
            for n in range(writer, total, writers):
                await store.append(f"{stream}-{writer}", [event(n)])

        async def follow(own: Filter) -> list[RecordedEvent]:
            async with closing(store.subscribe_all(after=before, filter=own)) as source:
                return [item for item in await take(source, many(total)) if isinstance(item, RecordedEvent)]

        async def follow_stream(writer: int) -> list[int]:
            async with closing(store.subscribe_stream(f"{stream}-{writer}")) as source:
                return numbers(await take(source, many(total // writers)))

        before = await store.head()
        async with asyncio.TaskGroup() as tasks:
            followers = []
            for writer in range(writers):
                tasks.create_task(write(writer))
            # Each one begins at another moment while events are written.
            for _ in range(8):
                followers.append(tasks.create_task(follow(Filter(stream_prefixes=(stream,)))))
                await asyncio.sleep(0)
            streams = [tasks.create_task(follow_stream(writer)) for writer in range(writers)]
        for follower in followers:
            positions = [item.position for item in follower.result()]
            assert positions == sorted(set(positions))
            assert sorted(numbers(list(follower.result()))) == list(range(total))
        for writer, follower_of_stream in enumerate(streams):
            assert follower_of_stream.result() == list(range(writer, total, writers))

    async def test_checkpoint_or_event_a_position_resumes_without_loss(self, store: EventStore, stream: str) -> None:
        before, own = await store.head(), Filter(stream_prefixes=(stream,))
        seen: list[int] = []
        position = before
        for n in range(0, 30, 3):
            await store.append(stream, events(n, n + 1, n + 2))
            await store.append(f"other-{stream}", events(99))
            async with closing(store.subscribe_all(after=position, filter=own)) as source:
                for item in await take(source, caught_up if n % 2 else many(1)):
                    seen += numbers([item])
                    position = max(position, item.position)
        async with closing(store.subscribe_all(after=position, filter=own)) as source:
            seen += numbers(await take(source, caught_up))
        assert seen == list(range(30))

    # ---- closing and coming back

    async def test_a_closed_store_says_so(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0))
        await store.close()
        await store.close()
        for use in (lambda: store.append(stream, events(1)), lambda: read(store, stream), lambda: store.head()):
            with pytest.raises(StoreUnavailable, match="closed"):
                await use()

    async def test_closing_ends_subscriptions_with_an_error(self, store: EventStore, stream: str) -> None:
        await store.append(stream, events(0))
        caught = asyncio.Event()

        async def follow() -> None:
            async for item in store.subscribe_all():
                if isinstance(item, CaughtUp):
                    caught.set()

        following = asyncio.ensure_future(follow())
        async with asyncio.timeout(PATIENCE):
            await caught.wait()
            await store.close()
            with pytest.raises(StoreUnavailable):
                await following

    async def test_what_was_acknowledged_is_there_after_reopening(
        self, store: EventStore, stream: str, reopen: Reopen | None
    ) -> None:
        if reopen is None:
            pytest.skip("this adapter cannot reopen")
        identity, batch = await store.log_id(), events(0, 1, 2)
        first = await store.append(stream, batch, expected=NO_STREAM)
        tail = events(3)
        second = await store.append(stream, tail, expected=2)
        await store.set_metadata(stream, {"k": 1})
        await store.close()
        async with reopen() as again:
            assert await again.log_id() == identity
            assert await read(again, stream) == [(n, n) for n in range(4)]
            assert await again.get_metadata(stream) == ({"k": 1}, 0)
            # NO_STREAM and explicit versions are idempotent forever.
            assert await again.append(stream, batch, expected=NO_STREAM) == first
            assert await again.append(stream, tail, expected=2) == second
            assert (await again.append(stream, events(4), expected=3)).position > second.position
