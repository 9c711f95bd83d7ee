"""What the EventStoreDB adapter makes of answers that were lost, and of another log behind its address."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import tidings.stores.eventstoredb.wire as wire
from tests.integration.eventstoredb import behind_a_proxy, many, opened, serving, stored
from tidings.errors import StoreUnavailable, WrongExpectedVersion
from tidings.server import EventStoreServer
from tidings.stores import (
    ANY,
    NO_STREAM,
    STREAM_EXISTS,
    Appended,
    CaughtUp,
    Checkpoint,
    EventData,
    EventStore,
    Expected,
    Filter,
    RecordedEvent,
)
from tidings.stores.eventstoredb.appends import Write
from tidings.stores.eventstoredb.grpc_call import Call
from tidings.testing.store_conformance import event, events, numbers, read, take

PATIENCE = 30.0


@pytest.mark.parametrize("expected", [ANY, STREAM_EXISTS, 0], ids=["any", "stream_exists", "version"])
async def test_an_append_whose_answer_was_lost_and_whose_id_was_forgotten_is_not_repeated(
    tmp_path: Path, expected: Expected
) -> None:
    database = tmp_path / "log.db"
    async with behind_a_proxy() as (store, proxy):
        async with serving(proxy, database):
            await store.append("s", events(0))
            proxy.mute = True
            appending = [
                asyncio.ensure_future(store.append("s", events(n), expected=n - 1 if expected == 0 else expected))
                for n in range(1, 6)
            ]
            await stored(proxy.target, "s", 6)
            assert not any(answer.done() for answer in appending)
        # The next one has forgotten the ids of what was asked with ANY and STREAM_EXISTS.
        async with serving(proxy, database):
            assert [(await answer).version for answer in appending] == [1, 2, 3, 4, 5]
            assert await read(store, "s") == [(n, n) for n in range(6)]


async def test_appends_that_never_arrived_are_made_in_their_order_behind_what_others_wrote(tmp_path: Path) -> None:
    database = tmp_path / "log.db"
    async with behind_a_proxy() as (store, proxy):
        async with serving(proxy, database):
            await store.append("s", events(0))
        appending = [asyncio.ensure_future(store.append("s", events(n))) for n in range(1, 6)]
        async with serving(proxy, database), opened(proxy.target) as other:
            await other.append("s", events(77))
            assert len(await asyncio.gather(*appending)) == 5
            found = [number for _, number in await read(store, "s")]
            assert [number for number in found if number != 77] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("hidden", ["truncated", "deleted"])
async def test_an_append_that_happened_and_was_hidden_since_is_not_repeated(tmp_path: Path, hidden: str) -> None:
    database = tmp_path / "log.db"
    async with behind_a_proxy() as (store, proxy):
        async with serving(proxy, database):
            await store.append("s", events(0))
            proxy.mute = True
            appending = asyncio.ensure_future(store.append("s", events(1)))
            await stored(proxy.target, "s", 2)
        async with EventStoreServer(str(database)) as between, opened(between.port) as other:
            if hidden == "deleted":
                await other.delete("s")
            else:
                await other.append("s", events(2, 3))
                await other.set_metadata("s", {"$maxCount": 1})
        async with serving(proxy, database):
            assert (await appending).version == 1
            log = [item async for item in store.read_all(filter=Filter(stream_prefixes=("s",)))]
            assert numbers(list(log)) == ([0, 1] if hidden == "deleted" else [0, 1, 2, 3])


async def test_an_append_that_never_arrived_is_made_behind_what_cannot_be_read(tmp_path: Path) -> None:
    """A stream that shows nothing has a version none the less, which only a refusal tells."""
    async with behind_a_proxy() as (store, proxy), AsyncExitStack() as stack:
        await stack.enter_async_context(serving(proxy, tmp_path / "log.db"))
        await store.append("s", events(0, 1))
        await store.set_metadata("s", {"$tb": 100})
        found = store._appends._find
        looks: list[str] = []

        async def finding(write: Write) -> Appended | Expected:
            looks.append(write.stream)
            return await found(write)

        store._appends._find = finding
        proxy.deaf = True
        appending = asyncio.ensure_future(store.append("s", events(2)))
        for _ in range(100):  # turns of the loop, in which the request goes out
            await asyncio.sleep(0)
        proxy.deaf = False
        proxy.cut()
        assert (await appending).version == 2
        assert looks == ["s", "s"]


async def test_an_append_to_a_deleted_stream_whose_answer_was_lost_is_known_by_its_id(tmp_path: Path) -> None:
    """A repeated `NO_STREAM` finds that the stream exists. Only the log shows that the append itself created it."""
    database = tmp_path / "log.db"
    async with behind_a_proxy() as (store, proxy):
        async with serving(proxy, database):
            await store.append("s", events(0, 1))
            await store.delete("s")
            proxy.mute = True
            appending = asyncio.ensure_future(store.append("s", events(2), expected=NO_STREAM))
            await stored(proxy.target, "s", 1)
        async with serving(proxy, database):
            assert (await appending).version == 2
            assert await read(store, "s") == [(2, 2)]


async def test_what_is_appended_after_the_loss_stays_behind_what_was_before(tmp_path: Path) -> None:
    database = tmp_path / "log.db"
    async with behind_a_proxy() as (store, proxy):
        async with serving(proxy, database):
            await store.append("s", events(0))
            proxy.mute = True
            appending = [asyncio.ensure_future(store.append("s", events(n))) for n in range(1, 4)]
            await stored(proxy.target, "s", 4)
            proxy.target = 0
            lost = next(iter(store.connections))
            appending += [asyncio.ensure_future(store.append("s", events(n))) for n in range(4, 40)]
            await asyncio.sleep(0)
            lost.cut()
        while lost.lost is None:
            await asyncio.sleep(0)
        appending += [asyncio.ensure_future(store.append("s", events(n))) for n in range(40, 60)]
        async with serving(proxy, database):
            assert [(await answer).version for answer in appending] == list(range(1, 60))
            assert await read(store, "s") == [(n, n) for n in range(60)]


async def test_a_server_that_ends_in_order_answers_what_it_took_and_the_next_takes_the_rest(tmp_path: Path) -> None:
    database = tmp_path / "log.db"
    async with behind_a_proxy() as (store, proxy):
        async with EventStoreServer(str(database)) as server:
            proxy.target = server.port
            appending = [asyncio.ensure_future(store.append(f"s-{n % 5}", events(n))) for n in range(300)]
            await appending[0]
            source = store.subscribe_all(filter=Filter(stream_prefixes=("s-",)))
            seen = numbers(await take(source, many(1)))
        appending += [asyncio.ensure_future(store.append(f"s-{n % 5}", events(n))) for n in range(300, 400)]
        async with serving(proxy, database):
            await asyncio.gather(*appending)
            for stream in range(5):
                assert [n for _, n in await read(store, f"s-{stream}")] == list(range(stream, 400, 5))
            seen += numbers(await take(source, many(399)))
            assert sorted(seen) == list(range(400))


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_is_lost_on_the_way_every_append_happens_once_and_in_order(tmp_path: Path, seed: int) -> None:
    """Tasks append with all kinds of expected versions while connections break, answers vanish, and servers that forget
    ids come and go at random."""
    dice, each, tasks = random.Random(seed), 60, 6
    done = 0

    async def write(store: EventStore, task: int) -> None:
        """Half of the tasks share a stream; the others have their own and expect its versions."""
        nonlocal done
        stream, own = (f"own-{task}", True) if task % 2 else ("shared", False)
        flights: deque[asyncio.Future[Appended]] = deque()
        for n in range(each):
            expected: Expected = (n - 1 if n else NO_STREAM) if own else ANY
            flights.append(asyncio.ensure_future(store.append(stream, [event(task * each + n)], expected=expected)))
            if len(flights) >= dice.choice((1, 5, 20)):
                await flights.popleft()
                done += 1
        versions = [(await answer).version for answer in flights]
        done += len(versions)
        assert versions == sorted(versions)

    async with behind_a_proxy() as (store, proxy), AsyncExitStack() as server:
        await server.enter_async_context(serving(proxy, tmp_path / "log.db"))
        writing = [asyncio.ensure_future(write(store, task)) for task in range(tasks)]
        while not all(task.done() for task in writing):
            enough = done + dice.randrange(1, 50)
            while done < enough and not all(task.done() for task in writing):
                await asyncio.sleep(0.001)
            proxy.mute = dice.random() < 0.6
            for _ in range(dice.randrange(20)):
                await asyncio.sleep(0.001)
            if dice.random() < 0.3:
                await server.aclose()
                await server.enter_async_context(serving(proxy, tmp_path / "log.db"))
            proxy.cut()
            proxy.mute = False
        await asyncio.gather(*writing)
        found = [item async for item in store.read_all() if item.stream.startswith(("own-", "shared"))]
        assert sorted(numbers(list(found))) == list(range(each * tasks))
        for task in range(tasks):
            of_task = [n for n in numbers(list(found)) if n // each == task]
            assert of_task == sorted(of_task)


async def test_a_version_that_others_took_meanwhile_is_refused(tmp_path: Path) -> None:
    database = tmp_path / "log.db"
    async with behind_a_proxy() as (store, proxy):
        async with serving(proxy, database):
            await store.append("s", events(0))
        appending = asyncio.ensure_future(store.append("s", events(1), expected=0))
        creating = asyncio.ensure_future(store.append("s", events(1), expected=NO_STREAM))
        await asyncio.sleep(0)
        async with EventStoreServer(str(database)) as between, opened(between.port) as other:
            await other.append("s", events(2))
        async with serving(proxy, database):
            for refused in (appending, creating):
                with pytest.raises(WrongExpectedVersion) as wrong:
                    await refused
                assert wrong.value.actual == 1


async def test_an_append_that_the_server_cannot_decide_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During an election, EventStoreDB 24.2 answers with a meaningless error to appends that it may or may not have
    done."""
    decide, answers = wire.outcome_of, 0

    def cannot_tell(*answer: Any) -> Any:
        nonlocal answers
        answers += 1
        return wire.Undecided("Empty") if answers in (2, 3) else decide(*answer)

    monkeypatch.setattr("tidings.stores.eventstoredb.appends.outcome_of", cannot_tell)
    async with behind_a_proxy() as (store, proxy), serving(proxy, tmp_path / "log.db"):
        appending = [asyncio.ensure_future(store.append("s", events(n))) for n in range(20)]
        assert [(await answer).version for answer in appending] == list(range(20))
        assert await read(store, "s") == [(n, n) for n in range(20)]


async def test_a_refused_append_does_not_disturb_its_neighbours(tmp_path: Path) -> None:
    async with behind_a_proxy() as (store, proxy), serving(proxy, tmp_path / "log.db"):
        outcomes = await asyncio.gather(
            store.append("a", events(0)),
            store.append("a", events(1), expected=7),
            store.append("b", [EventData("Big", b"x" * 1_500_000)]),
            store.append("a", events(2), expected=0),
            return_exceptions=True,
        )
        assert [type(outcome).__name__ for outcome in outcomes] == [
            "Appended",
            "WrongExpectedVersion",
            "EventTooLarge",
            "Appended",
        ]


async def test_an_append_may_be_cancelled_and_the_next_goes_on(tmp_path: Path) -> None:
    async with behind_a_proxy() as (store, proxy), serving(proxy, tmp_path / "log.db"):
        await store.append("s", events(0))
        proxy.mute = True
        cancelled = asyncio.ensure_future(store.append("s", events(1)))
        await stored(proxy.target, "s", 2)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        proxy.mute = False
        proxy.cut()
        assert (await store.append("s", events(2))).version == 2


async def test_reads_go_on_where_a_cut_stopped_them(tmp_path: Path) -> None:
    total = 10_000
    async with behind_a_proxy() as (store, proxy), serving(proxy, tmp_path / "log.db"):
        for begin in range(0, total, 1000):
            await store.append("s", events(*range(begin, begin + 1000)))
        own = Filter(stream_prefixes=("s",))

        async def cutting(source: AsyncIterator[RecordedEvent]) -> list[int]:
            got = []
            async for item in source:
                got.append(item.version)
                if len(got) in (1, 500, 3_000):
                    proxy.cut()
            return got

        up, down = list(range(total)), list(reversed(range(total)))
        assert await cutting(store.read_stream("s")) == up
        assert await cutting(store.read_stream("s", backwards=True)) == down
        assert await cutting(store.read_all(filter=own)) == up
        assert await cutting(store.read_all(filter=own, backwards=True)) == down
        assert await cutting(store.read_stream("s", limit=4_500)) == up[:4_500]
        assert await cutting(store.read_all(filter=own, limit=4_500)) == up[:4_500]
        assert await cutting(store.read_all(filter=own, limit=4_500, backwards=True)) == down[:4_500]


async def test_subscriptions_go_on_where_a_cut_stopped_them(tmp_path: Path) -> None:
    async with behind_a_proxy() as (store, proxy), serving(proxy, tmp_path / "log.db"):
        await store.append("s", events(*range(1000)))
        log, stream = store.subscribe_all(filter=Filter(stream_prefixes=("s",))), store.subscribe_stream("s")
        seen: list[list[int]] = [[], []]
        for turn in range(4):
            for got, source in zip(seen, (log, stream), strict=True):
                got += numbers(await take(source, many(200)))
            await store.append("s", events(1000 + turn))
            proxy.cut()
        for got, source in zip(seen, (log, stream), strict=True):
            got += numbers(await take(source, many(204)))
            assert got == list(range(1004))


# ---- what is behind the address --------------------------------------------------------


async def test_another_log_behind_the_address_is_not_followed_as_if_it_were_the_same(tmp_path: Path) -> None:
    async with behind_a_proxy() as (store, proxy):
        async with serving(proxy, tmp_path / "one.db"):
            identity = await store.log_id()
            await store.append("s", events(0, 1))
            source = store.subscribe_all(filter=Filter(stream_prefixes=("s",)))
            await take(source, many(2))
            proxy.mute = True
            appending = asyncio.ensure_future(store.append("s", events(2)))
            await stored(proxy.target, "s", 3)
        async with serving(proxy, tmp_path / "two.db"):
            with pytest.raises(StoreUnavailable, match="another log"):
                await take(source, many(1))
            with pytest.raises(StoreUnavailable, match="another log"):
                await appending
            assert await store.log_id() != identity
            assert (await store.append("s", events(9))).version == 0  # nothing of the old one came here


async def test_a_log_that_ends_before_what_was_seen_is_not_used(tmp_path: Path) -> None:
    async with behind_a_proxy(DefaultDeadline=1) as (store, proxy):
        async with serving(proxy, tmp_path / "log.db"):
            await store.append("s", events(0))
        shutil.copy(tmp_path / "log.db", tmp_path / "old.db")
        async with serving(proxy, tmp_path / "log.db"):
            await store.append("s", events(1))
            head = await store.head()
        async with serving(proxy, tmp_path / "old.db"):
            with pytest.raises(StoreUnavailable, match=f"went up to {head} before"):
                await store.head()
            with pytest.raises(StoreUnavailable):
                await read(store, "s")
        async with serving(proxy, tmp_path / "log.db"):
            assert await store.head() == head


async def test_the_first_of_two_makes_the_identity_of_a_log(tmp_path: Path) -> None:
    async with EventStoreServer() as server, opened(server.port) as one, opened(server.port) as two:
        assert len(set(await asyncio.gather(one.log_id(), two.log_id()))) == 1


async def test_a_quiet_subscription_moves_over_what_does_not_match(tmp_path: Path) -> None:
    """The server sends a checkpoint only every 32 events, but the relay's markers must reach the head of an idle
    log."""
    async with EventStoreServer() as server, opened(server.port) as store:
        source = store.subscribe_all(filter=Filter(exclude_stream_prefixes=("$", "tidings_")))
        await take(source, lambda got: any(isinstance(item, CaughtUp) for item in got))
        await store.append("tidings_relay-main", events(0))
        head = await store.head()
        got = await take(
            source, lambda got: any(isinstance(item, Checkpoint) and item.position >= head for item in got)
        )
        assert not numbers(got)
        await store.append("s", events(1))
        assert numbers(await take(source, many(1))) == [1]


async def test_a_subscription_that_brings_nothing_while_there_is_something_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server answers other calls and pings, but this call hangs: only a look at the log shows the outcome."""
    monkeypatch.setattr("tidings.stores.eventstoredb.store.QUIET_SECONDS", 0.1)
    hanging: set[int] = set()
    split = Call._split
    monkeypatch.setattr(Call, "_split", lambda self: [] if self.number in hanging else split(self))
    async with EventStoreServer() as server, opened(server.port) as store:
        source = store.subscribe_all(filter=Filter(stream_prefixes=("s",)))
        await take(source, lambda got: any(isinstance(item, CaughtUp) for item in got))
        for connection in store.connections:
            hanging |= set(connection._calls)
        assert hanging
        await store.append("s", events(0))
        assert numbers(await take(source, many(1))) == [0]


async def test_closing_waits_for_appends_and_ends_subscriptions() -> None:
    async with EventStoreServer() as server, opened(server.port) as store, opened(server.port) as other:
        following = asyncio.ensure_future(take(store.subscribe_all(), many(1_000_000)))
        appending = [asyncio.ensure_future(store.append("s", events(n))) for n in range(500)]
        await asyncio.sleep(0)
        await store.close()
        assert [(await answer).version for answer in appending] == list(range(500))
        with pytest.raises(StoreUnavailable):
            await following
        assert len(await read(other, "s")) == 500
        with pytest.raises(StoreUnavailable, match="closed"):
            await store.append("s", events(0))


async def test_a_subscriber_that_stops_reading_holds_up_nobody_and_takes_little_memory() -> None:
    async with EventStoreServer() as server, opened(server.port) as store:
        for _ in range(20):
            await store.append("s", [EventData("Big", b"x" * 4_500) for _ in range(100)])
        idle = store.read_all()
        await anext(idle)
        assert len(await read(store, "s", limit=0)) == 0
        assert (await store.append("t", events(1))).version == 0
        rest = [item async for item in idle if item.stream == "s"]
        assert len(rest) in (1999, 2000)
