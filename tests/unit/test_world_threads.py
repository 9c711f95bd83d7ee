"""What is outside a world's event loop: threads of plain handlers, connections of lifespans. None hangs a test."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from textwrap import dedent
from typing import Any

import pytest
from fastapi import FastAPI

from tidings import Event, Service
from tidings.errors import HandlerTimeout
from tidings.testing import World
from tidings.testing.world import threads
from tidings.testing.world.blocking import Blocked

DAY = 86_400


class Ordered(Event, key="order"):
    order: str


ONE = Ordered(order="1")


def one(handler: Any, timeout: float = 30.0) -> Service:
    service = Service("one")
    service.on(Ordered, timeout=timeout)(handler)
    return service


def of_worlds() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("tidings-world")}


# ---- plain handlers --------------------------------------------------------------------


async def test_a_plain_handler_that_never_returns_is_named_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "OVER", 0.3)
    release, tasks = threading.Event(), asyncio.all_tasks()

    def stuck(event: Ordered) -> None:
        release.wait()

    says = (
        r"handler 'stuck' of service one is a plain function, (?s:.*) stands in .*stuck \(.*, line \d+\), in .*wait \("
    )
    with pytest.raises(Blocked, match=says):
        async with World(one(stuck, timeout=0.2)) as world:
            world.tolerate(stuck)
            await world.append("order-1", ONE)
            await world.settled()
    assert asyncio.all_tasks() == tasks
    assert all(thread.daemon for thread in of_worlds()), "none of them keeps the process from ending"
    release.set()
    for thread in of_worlds():
        thread.join(30)
    assert not of_worlds()


async def test_a_plain_handler_that_runs_in_circles_is_named_and_ends_with_its_world(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "OVER", 0.3)

    def spins(event: Ordered) -> None:
        while True:
            pass

    with pytest.raises(Blocked, match=r"handler 'spins' of service one is a plain function"):
        async with World(one(spins, timeout=0.2)) as world:
            await world.append("order-1", ONE)
            await world.settled()
    for thread in of_worlds():
        thread.join(30)
    assert not of_worlds()


async def test_a_plain_handler_that_returns_late_is_over_its_time() -> None:
    def late(event: Ordered) -> None:
        time.sleep(30 * DAY)

    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(DAY)

    async with World(one(late, timeout=2)) as world:
        counting = asyncio.create_task(count())
        await world.append("order-1", ONE)
        with pytest.raises(HandlerTimeout, match="'late' did not finish within 2 s"):
            await world.settled()
        assert turns >= 30, "it slept in virtual time"
        world.tolerate(late)
        counting.cancel()
    assert not of_worlds(), "a thread that sleeps ends with its world"


async def test_a_thread_that_sleeps_ends_with_its_process() -> None:
    came = list[str]()

    def rest(event: Ordered) -> None:
        came.append("began")
        time.sleep(10)
        came.append("ended")

    service = one(rest)
    async with World(service) as world:
        await world.append("order-1", ONE)
        await asyncio.sleep(5)
        world.crash(service)
        await world.settled()
        assert came == ["began", "began", "ended"]


async def test_threads_of_the_users_own_executor_stay_his() -> None:
    names = list[str]()
    with ThreadPoolExecutor(1, thread_name_prefix="mine") as mine:

        async def handle(event: Ordered) -> None:
            await asyncio.get_running_loop().run_in_executor(
                mine, lambda: names.append(threading.current_thread().name)
            )

        async with World(one(handle)) as world:
            await world.append("order-1", ONE)
            await world.append("order-2", ONE)
            await world.settled()
    assert names == ["mine_0", "mine_0"]


PROGRAM = """
    import asyncio, threading
    from tidings import Event, Service
    from tidings.testing import World
    from tidings.testing.world import threads

    threads.OVER = 0.3

    class Ordered(Event, key="order"):
        order: str

    def plain(event: Ordered) -> None:
        threading.Event().wait()

    async def other(event: Ordered) -> None:
        await asyncio.to_thread(threading.Event().wait)

    async def run(handler):
        service = Service("one")
        service.on(Ordered, timeout=0.2)(handler)
        async with World(service) as world:
            await world.append("order-1", Ordered(order="1"))
            await world.settled()

    for handler in plain, other:
        try:
            asyncio.run(run(handler))
        except Exception as error:
            print(type(error).__name__, handler.__name__)
"""


def test_a_thread_that_is_stuck_does_not_keep_the_process_from_ending() -> None:
    done = subprocess.run(
        [sys.executable, "-c", dedent(PROGRAM)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout.splitlines()) == (0, ["Blocked plain", "HandlerTimeout other"]), done.stderr


# ---- lifespans and applications --------------------------------------------------------


async def _settles(service: Service) -> None:
    service.on(Ordered)(_nothing)
    async with World(service) as world:
        await world.append("order-1", ONE)
        assert (await world.settled()).ok
        before = time.time()
        await world.advance(days=1)
        assert time.time() - before >= DAY


async def _nothing(event: Ordered) -> None: ...


async def test_a_connection_that_a_lifespan_keeps_open_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        @asynccontextmanager
        async def connected(service: Service) -> AsyncIterator[None]:
            _, writer = await asyncio.open_connection(*server.getsockname())
            yield
            writer.close()

        await _settles(Service("one", lifespan=connected))


async def test_a_thread_of_a_lifespan_that_waits_for_work_is_not_waited_for() -> None:
    stop = threading.Event()

    @asynccontextmanager
    async def polling(service: Service) -> AsyncIterator[None]:
        task = asyncio.create_task(asyncio.to_thread(stop.wait))
        yield
        stop.set()
        await task

    await _settles(Service("one", lifespan=polling))


async def test_what_a_handler_waits_for_outside_the_loop_takes_real_time() -> None:
    """And the time of the world does not run ahead of it."""
    took = list[float]()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                while connection.recv(1):
                    threading.Event().wait(0.6)
                    connection.sendall(b"x")

        @asynccontextmanager
        async def connected(service: Service) -> AsyncIterator[asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection(*server.getsockname())
            streams.append(reader)
            yield writer
            writer.close()

        streams = list[asyncio.StreamReader]()
        service = Service("one", lifespan=connected)

        @service.on(Ordered)
        async def ask(event: Ordered, writer: asyncio.StreamWriter) -> None:
            began = asyncio.get_running_loop().time()
            writer.write(b"x")
            assert await streams[0].readexactly(1) == b"x"
            took.append(asyncio.get_running_loop().time() - began)

        answering = threading.Thread(target=answer, daemon=True)
        answering.start()
        async with World(service) as world:
            await asyncio.sleep(1)
            await world.append("order-1", ONE)
            await world.settled()
    assert took[0] < 30
    answering.join(30)


async def test_a_plain_function_of_an_application_takes_real_time() -> None:
    service = Service("one")
    api = FastAPI(lifespan=service.lifespan)

    @api.get("/")
    def look() -> float:
        before = time.time()
        threading.Event().wait(0.5)
        return time.time() - before

    async with World(service) as world, world.client(api) as http:
        assert float((await http.get("/")).text) < 30
