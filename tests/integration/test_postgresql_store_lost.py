"""Appends to the PostgreSQL log whose outcome is unknown: each is written once, and has the outcome that it had."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest

import tidings.stores.postgresql.writer as writer
from tests.integration.postgresql_log import locked
from tidings import open_store
from tidings.errors import StoreUnavailable, StreamDeleted, WrongExpectedVersion
from tidings.stores import ANY, NO_STREAM, STREAM_EXISTS, EventStore, Expected, StreamAppend
from tidings.stores.postgresql.appender import Appender
from tidings.testing.store_conformance import events, read


@pytest.fixture
async def store(postgresql_url: str) -> AsyncIterator[EventStore]:
    async with open_store(postgresql_url) as store:
        yield store


@pytest.fixture
def lose_answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function: the answers of the next so many transactions are lost, after they were committed."""
    left = 0
    write = Appender.write

    async def losing(self: Appender, connection: Any, group: Any) -> Any:
        nonlocal left
        outcomes = await write(self, connection, group)
        if left:
            left -= 1
            raise ConnectionResetError("lost on the way")
        return outcomes

    def begin(count: int) -> None:
        nonlocal left
        left = count

    monkeypatch.setattr(Appender, "write", losing)
    return begin


@pytest.mark.parametrize("expected", [ANY, STREAM_EXISTS, 0], ids=["any", "stream_exists", "version"])
@pytest.mark.parametrize("lost", [1, 3])
async def test_an_append_whose_answer_was_lost_is_written_once(
    store: EventStore, lose_answers: Callable[[int], None], expected: Expected, lost: int
) -> None:
    await store.append("s", events(0))
    lose_answers(lost)
    appended = await store.append("s", events(1, 2), expected=expected)
    assert appended == (2, await store.head())
    assert (await store.append("new", events(3), expected=NO_STREAM)).version == 0
    assert await read(store, "s") == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize("lost", [1, 3])
async def test_an_append_over_several_streams_whose_answer_was_lost_is_written_once(
    store: EventStore, lose_answers: Callable[[int], None], lost: int
) -> None:
    await store.append("s", events(0))
    lose_answers(lost)
    several, single = await asyncio.gather(
        store.append_several([StreamAppend("s", events(1, 2)), StreamAppend("new", events(3)), StreamAppend("other")]),
        store.append("s", events(4)),
    )
    assert (dict(several.versions), single.version) == ({"s": 2, "new": 0}, 3)
    assert (several.position, single.position) == (single.position - 1, await store.head())
    assert await read(store, "s") == [(0, 0), (1, 1), (2, 2), (3, 4)]


async def test_an_append_whose_answer_stays_lost_is_said_to_have_an_unknown_outcome(
    store: EventStore, lose_answers: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "AGAIN_SECONDS", 0.0)
    lose_answers(1)
    appended = events(0)
    with pytest.raises(StoreUnavailable, match="may or may not have been: to be sure, append the same events"):
        await store.append("s", appended)
    assert (await store.append("s", appended)).version == 0
    assert await read(store, "s") == [(0, 0)]
    monkeypatch.setattr(Appender, "write", _refusing)
    with pytest.raises(StoreUnavailable, match="it did not answer") as refused:
        await store.append("s", events(1))
    assert "may or may not" not in str(refused.value), "nothing was sent"


async def _refusing(self: Appender, connection: Any, group: Any) -> Any:
    raise TimeoutError


async def test_a_group_whose_answer_was_lost_has_the_outcomes_that_it_had(
    store: EventStore, lose_answers: Callable[[int], None]
) -> None:
    await store.append("s", events(0))
    lose_answers(2)
    outcomes = await asyncio.gather(
        store.append("a", events(1)),
        store.append("s", events(2), expected=9),
        store.append("s", events(3), expected=0),
        store.append("s", events(4)),
        store.set_metadata("s", {"k": 1}),
        store.delete("a"),
        store.tombstone("b"),
        return_exceptions=True,
    )
    assert [type(each) for each in outcomes if isinstance(each, Exception)] == [WrongExpectedVersion]
    assert await read(store, "s") == [(0, 0), (1, 3), (2, 4)]
    assert (await store.get_metadata("s")).values == {"k": 1}
    with pytest.raises(StreamDeleted):
        await read(store, "b")
    with pytest.raises(StreamDeleted):
        await store.tombstone("b")


async def test_an_append_that_happened_before_its_stream_was_closed_is_answered(
    postgresql_url: str, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, lost = Appender.write, False
    async with open_store(postgresql_url) as other:

        async def losing(self: Appender, connection: Any, group: Any) -> Any:
            nonlocal lost
            outcomes = await write(self, connection, group)
            if not lost:
                lost = True
                await other.tombstone("s")
                raise ConnectionResetError("lost on the way")
            return outcomes

        monkeypatch.setattr(Appender, "write", losing)
        lost = True
        await store.append("s", events(0))
        lost = False
        assert (await store.append("s", events(1))).version == 1
        with pytest.raises(StreamDeleted):
            await store.append("s", events(2))
        with pytest.raises(StreamDeleted):
            await store.tombstone("s")


async def log(store: EventStore, after: int) -> list[tuple[str, int, str]]:
    return [(found.stream, found.version, found.type) async for found in store.read_all(after=after)]


def told(outcome: object) -> object:
    return type(outcome) if isinstance(outcome, Exception) else outcome


@pytest.mark.parametrize("expected", [ANY, NO_STREAM], ids=["any", "no_stream"])
@pytest.mark.parametrize("lost", [1, 3])
async def test_a_stream_that_was_deleted_and_made_again_is_so_once(
    store: EventStore, lose_answers: Callable[[int], None], expected: Expected, lost: int
) -> None:
    await store.append("s", events(0))
    head = await store.head()
    lose_answers(lost)
    _, appended = await asyncio.gather(store.delete("s"), store.append("s", events(1), expected=expected))
    assert appended == (1, head + 2)
    assert await read(store, "s") == [(1, 1)]
    assert await log(store, head) == [("$$s", 0, "$metadata"), ("s", 1, "Happened"), ("$$s", 1, "$metadata")]
    await store.delete("s")
    lose_answers(lost)
    again = await store.append("s", events(2), expected=NO_STREAM)
    assert again == (2, await store.head() - 1)
    assert await read(store, "s") == [(2, 2)]


async def test_a_deletion_whose_answer_was_lost_is_no_refusal(
    store: EventStore, lose_answers: Callable[[int], None]
) -> None:
    await store.append("s", events(0))
    lose_answers(1)
    await store.delete("s", expected=STREAM_EXISTS)
    with pytest.raises(StreamDeleted):
        await store.delete("s", expected=STREAM_EXISTS)


@pytest.mark.parametrize("first", [1, STREAM_EXISTS], ids=["version", "stream_exists"])
async def test_an_append_that_was_refused_stays_refused_when_its_group_is_tried_again(
    store: EventStore, lose_answers: Callable[[int], None], first: Expected
) -> None:
    if first == 1:
        await store.append("s", events(0))
    lose_answers(1)
    outcomes = await asyncio.gather(
        store.append("s", events(1), expected=first), store.append("s", events(2)), return_exceptions=True
    )
    last = 1 if first == 1 else 0
    assert list(map(told, outcomes)) == [WrongExpectedVersion, (last, await store.head())]
    assert (await read(store, "s"))[-1] == (last, 2)


async def test_a_tombstone_of_long_before_is_not_taken_for_this_one(
    store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.append("s", events(0))
    await store.tombstone("s")
    write, lost = Appender.write, False

    async def losing(self: Appender, connection: Any, group: Any) -> Any:
        nonlocal lost
        if not lost:
            lost = True
            raise ConnectionResetError("lost before it was sent")
        return await write(self, connection, group)

    monkeypatch.setattr(Appender, "write", losing)
    with pytest.raises(StreamDeleted):
        await store.tombstone("s")
    assert lost


async def test_the_callers_own_earlier_attempt_does_not_stand_for_the_neighbours_of_the_next(
    store: EventStore, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same event is there, in its place, from another transaction: the group of which the answer was lost was not
    written."""
    again, sent, left = events(0), Appender._written, True

    async with open_store(postgresql_url) as other:

        async def losing(self: Appender, connection: Any, draft: Any) -> Any:
            nonlocal left
            if left:
                left = False
                self._sent.append(draft)
                await other.append("s", again)
                raise ConnectionResetError("lost on the way there")
            return await sent(self, connection, draft)

        monkeypatch.setattr(Appender, "_written", losing)
        left = False
        await other.append("before", events(9))
        left = True
        outcomes = await asyncio.gather(store.append("s", again), store.append("t", events(1)))
        assert [version for version, _ in outcomes] == [0, 0]
        assert await read(store, "s") + await read(store, "t") == [(0, 0), (0, 1)]


async def test_a_group_that_was_lost_and_then_taken_apart_is_written_once(
    store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second attempt fails as if one of its writes were to blame, although the first one was committed."""
    await store.append("s", events(0))
    write, attempts = Appender.write, 0

    async def failing(self: Appender, connection: Any, group: Any) -> Any:
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            raise asyncpg.DiskFullError("could not extend file")
        outcomes = await write(self, connection, group)
        if attempts == 1:
            raise ConnectionResetError("lost on the way")
        return outcomes

    monkeypatch.setattr(Appender, "write", failing)
    outcomes = await asyncio.gather(
        store.append("s", events(1), expected=7),
        store.append("s", events(2)),
        store.delete("s"),
        store.append("s", events(3)),
        return_exceptions=True,
    )
    assert list(map(told, outcomes)) == [WrongExpectedVersion, (1, 3), None, (2, 5)]
    assert await read(store, "s") == [(2, 3)]
    assert await log(store, 3) == [("$$s", 0, "$metadata"), ("s", 2, "Happened"), ("$$s", 1, "$metadata")]


async def test_the_writer_goes_on_after_it_waited_in_vain_for_a_transaction_of_its_own(
    postgresql_url: str, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does where others write to the same streams all the time."""
    await store.append("s", events(0))
    look = Appender._looked

    async def in_vain(self: Appender, *arguments: Any) -> Any:
        draft, head = await look(self, *arguments)
        return (draft, head) if lost else (draft, None)

    lost = False
    monkeypatch.setattr(Appender, "_looked", in_vain)
    async with locked(postgresql_url):
        # Nothing is known of the stream, and nothing of it is written: only the transaction of its own takes the lock.
        with pytest.raises(StoreUnavailable, match=r"lock timeout: process \d+ .* holds the log"):
            await store.append("missing", [], expected=STREAM_EXISTS)
    lost = True
    assert (await store.append("s", events(1))).version == 1
    assert await read(store, "s") == [(0, 0), (1, 1)]


async def test_a_connection_that_died_silently_is_made_again_however_long_that_took(
    store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.append("s", events(0))
    monkeypatch.setattr(writer, "AGAIN_SECONDS", 0.3)
    write, lost = Appender.write, False

    async def silent(self: Appender, connection: Any, group: Any) -> Any:
        nonlocal lost
        if not lost:
            lost = True
            await asyncio.sleep(0.4)
            raise TimeoutError
        return await write(self, connection, group)

    monkeypatch.setattr(Appender, "write", silent)
    assert (await store.append("s", events(1))).version == 1
