"""Several processes on one embedded log, and processes that are killed in the middle of writing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tidings.errors import WrongExpectedVersion
from tidings.stores import NO_STREAM, EventData, EventStore, Filter, RecordedEvent
from tidings.stores.sqlite.store import open_sqlite
from tidings.testing.store_conformance import caught_up, closing, event, events, many, number, numbers, take

# Each prints one line when it is ready, reads one from standard input to begin, and prints what was acknowledged.
PRELUDE = """
import asyncio, sys
from tidings.errors import StreamNotFound, WrongExpectedVersion
from tidings.stores import NO_STREAM, EventData
from tidings.stores.sqlite.store import open_sqlite

async def main(url, name):
    store = await open_sqlite(url)
    print("ready", await store.log_id(), flush=True)
    sys.stdin.readline()
    await work(store, name)
    await store.close()
"""
APPEND_FOR_EVER = """
async def work(store, name):
    async def appender(task):
        n = 0
        while True:
            answer = await store.append(f"{name}-{task}", [EventData("Happened", b'{"n": %d}' % n)])
            print(task, n, answer.position, flush=True)
            n += 1
    await asyncio.gather(*(appender(task) for task in range(20)))
"""
APPEND_100 = """
async def work(store, name):
    for n in range(100):
        print((await store.append(f"own-{name}", [EventData("Happened", b'{"n": %d}' % n)])).position, flush=True)
"""
COUNT_TOGETHER = """
async def work(store, name):
    won = 0
    while won < 50:
        last = NO_STREAM
        try:
            async for found in store.read_stream("shared", backwards=True, limit=1):
                last = found.version
        except StreamNotFound:
            pass
        try:
            answer = await store.append("shared", [EventData("Happened", b'{"n": 0}')], expected=last)
        except WrongExpectedVersion as refusal:
            print("refused", refusal.actual, flush=True)
        else:
            won += 1
            print("won", answer.version, answer.position, flush=True)
"""


class Children:
    """Starts Python processes that end with the test."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack

    def start(self, work: str, url: str, name: str) -> subprocess.Popen[str]:
        code = f"{PRELUDE}{work}\nasyncio.run(main(*sys.argv[1:]))"
        child = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, url, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.stack.enter_context(child)
        self.stack.callback(child.kill)
        return child


@pytest.fixture
def children() -> Iterator[Children]:
    with ExitStack() as stack:
        yield Children(stack)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'log.db'}"


async def line(child: subprocess.Popen[str]) -> list[str]:
    assert child.stdout is not None
    return (await asyncio.to_thread(child.stdout.readline)).split()


async def rest(child: subprocess.Popen[str]) -> list[list[str]]:
    assert child.stdout is not None
    return [text.split() for text in await asyncio.to_thread(child.stdout.readlines)]


def go(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()


async def whole(store: EventStore, **conditions: Any) -> list[RecordedEvent]:
    return [found async for found in store.read_all(filter=Filter(**conditions))]


@pytest.mark.parametrize("after", [1, 200, 1_500], ids=["early", "midway", "late"])
async def test_every_acknowledged_append_outlives_a_kill_in_the_middle(
    url: str, children: Children, after: int
) -> None:
    child = children.start(APPEND_FOR_EVER, url, "killed")
    await line(child)
    go(child)
    acknowledged = [await line(child) for _ in range(after)]
    child.kill()
    acknowledged += await rest(child)
    store = await open_sqlite(url)
    try:
        there = {(e.stream, number(e)): e for e in await whole(store, stream_prefixes=("killed",))}
        # The last line may have been cut in its middle.
        for task, n, position in acknowledged[:-1]:
            assert there[f"killed-{task}", int(n)].position == int(position)
        for name in {e.stream for e in there.values()}:
            versions = [(e.version, number(e)) for e in there.values() if e.stream == name]
            assert versions == [(at, at) for at in range(len(versions))]
        assert (await store.append("killed-0", [event(-1)])).position > max(e.position for e in there.values())
    finally:
        await store.close()


async def test_a_subscription_sees_what_another_process_appends(url: str, children: Children) -> None:
    store = await open_sqlite(url)
    child = children.start(APPEND_100, url, "other")
    await line(child)
    async with closing(store.subscribe_all()) as log, closing(store.subscribe_stream("own-other")) as stream:
        await take(log, caught_up)
        await take(stream, caught_up)
        go(child)
        assert numbers(await take(log, many(100))) == list(range(100))
        assert numbers(await take(stream, many(100))) == list(range(100))
    assert await store.head() == int((await rest(child))[-1][0])
    await store.close()


async def test_positions_of_several_writers_are_unique_and_ordered_as_they_committed(
    url: str, children: Children
) -> None:
    writers = [children.start(APPEND_100, url, str(n)) for n in range(3)]
    identities = {(await line(child))[1] for child in writers}
    assert len(identities) == 1  # they created the file at the same time
    store = await open_sqlite(url)
    seen: list[int] = []
    async with closing(store.subscribe_all(filter=Filter(stream_prefixes=("own",)))) as log:
        await take(log, caught_up)
        for child in writers:
            go(child)
        seen = [e.position for e in await take(log, many(300)) if isinstance(e, RecordedEvent)]
    answered = [[int(words[0]) for words in await rest(child)] for child in writers]
    assert all(positions == sorted(positions) for positions in answered)
    assert seen == sorted({position for positions in answered for position in positions})
    assert len(seen) == 300
    await store.close()


async def test_writers_that_expect_the_same_version_of_one_stream_never_both_win(url: str, children: Children) -> None:
    writers = [children.start(COUNT_TOGETHER, url, str(n)) for n in range(2)]
    for child in writers:
        await line(child)
    for child in writers:
        go(child)
    told = [words for child in writers for words in await rest(child)]
    won = sorted(int(words[1]) for words in told if words[0] == "won")
    assert won == list(range(100))
    store = await open_sqlite(url)
    assert [e.version async for e in store.read_stream("shared")] == list(range(100))
    await store.close()


async def test_a_writer_knows_what_another_process_did_to_its_stream(url: str, children: Children) -> None:
    store = await open_sqlite(url)
    await store.append("own-x", events(-1), expected=NO_STREAM)  # now it is remembered
    child = children.start(APPEND_100, url, "x")
    await line(child)
    go(child)
    await rest(child)
    with pytest.raises(WrongExpectedVersion) as refusal:
        await store.append("own-x", events(0), expected=0)
    assert refusal.value.actual == 100
    assert (await store.append("own-x", [EventData("Happened", b"{}")])).version == 101
    await store.close()
