"""Several processes of one service on the embedded bus: one works, the others stand by and take over."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from tests.faults.proxy import Proxy
from tests.integration.commands import Command, Commands
from tests.integration.processes import until
from tests.integration.test_cli_serving import free_port
from tidings.database.engine import connected
from tidings.errors import DatabaseUnavailable
from tidings.hosting.standby import Post, Taken, post_of

WORKERS = """
import os
from fastapi import FastAPI
from tidings import Event, Service, health_routes

class Asked(Event, key="key"):
    key: str

workers = Service("workers")

@workers.on(Asked)
async def work(event: Asked) -> None:
    with open("effects", "a") as file:
        file.write(f"{event.key} {os.getpid()}" + chr(10))

api = FastAPI(lifespan=workers.lifespan)
api.router.routes.extend(health_routes(workers))

@api.post("/ask/{key}")
async def ask(key: str) -> int:
    await workers.append(f"asked-{key}", Asked(key=key))
    return os.getpid()
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def commands(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Commands]:
    """The services' databases in a new folder, once for each kind of database."""
    settings = {}
    if request.param == "postgresql":
        settings["TIDINGS_DATABASE"] = request.getfixturevalue("postgresql_url")
    with Commands(tmp_path, settings) as opened:
        (tmp_path / "app.py").write_text(WORKERS)
        yield opened


def effects(commands: Commands) -> Counter[str]:
    """Return how often each key had its effect."""
    file = commands.folder / "effects"
    return Counter(line.split()[0] for line in file.read_text().splitlines()) if file.exists() else Counter()


async def ask(commands: Commands, *keys: str) -> None:
    for key in keys:
        await commands.append("Asked", json.dumps({"key": key}), f"asked-{key}")
    await until(lambda: set(keys) <= set(effects(commands)), f"{keys} have their effects")


async def settled(commands: Commands) -> None:
    """Wait until every effect is committed, too. Until then, an effect outside the session may happen again."""

    async def ok() -> bool:
        return (await commands.run("verify", "app:workers")).process.returncode == 0

    await eventually(ok, "everything is settled")


async def says(command: Command, text: str, count: int = 1) -> None:
    await until(lambda: command.err.count(text) >= count, f"it says {text}")


async def ready(port: int) -> tuple[int, dict[str, dict[str, object]]]:
    """Return the status of /ready, and its checks by name."""

    def get() -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
                return answer.status, answer.read()
        except HTTPError as error:
            return error.code, error.read()

    status, body = await asyncio.to_thread(get)
    return status, {check["name"]: check for check in json.loads(body)["checks"]}


async def test_the_second_process_stands_by_is_ready_and_takes_over_when_the_first_is_killed(
    commands: Commands,
) -> None:
    first = commands.start("run", "app:workers")
    await says(first, "service.connected")
    port = free_port()
    second = commands.start("run", "app:workers", "--health", str(port))
    await says(second, "service.standing_by")
    assert f"process {first.process.pid}" in second.err
    await ask(commands, "a", "b", "c")
    status, checks = await ready(port)
    assert status == 200, checks
    assert f"process {first.process.pid}" in str(checks["workers.running"]["detail"])

    await settled(commands)
    first.signal(signal.SIGKILL)
    await ask(commands, "d", "e")
    assert effects(commands) == Counter("abcde")
    for command in (first, second):
        assert "service.rejoining" not in command.err
    assert "relay.waiting_for_services" not in second.err, "the relay of a standby publishes nothing"
    status, checks = await ready(port)
    assert status == 200, checks
    assert "standby" not in str(checks)
    second.signal(signal.SIGTERM)
    assert await second.ended() == 0


async def test_a_standby_takes_over_what_was_appended_while_nobody_worked_and_after_a_clean_end(
    commands: Commands,
) -> None:
    first = commands.start("run", "app:workers")
    await says(first, "service.connected")
    others = [commands.start("run", "app:workers") for _ in range(2)]
    for other in others:
        await says(other, "service.standing_by")
    first.signal(signal.SIGTERM)
    assert await first.ended() == 0
    await ask(commands, "a", "b")
    await until(lambda: sum("service.takes_over" in other.err for other in others) == 1, "one of them has taken over")
    assert effects(commands) == Counter("ab")
    for other in others:  # the one that still stands by ends as quickly
        other.signal(signal.SIGINT)
    assert [await other.ended() for other in others] == [0, 0]


def three_workers(commands: Commands, port: int) -> subprocess.Popen[bytes]:
    with (commands.folder / "uvicorn.err").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "app:api", "--workers", "3", "--port", str(port)],
            cwd=commands.folder,
            env=commands.env | {"PYTHONPATH": str(commands.folder)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


async def test_of_three_workers_of_a_web_server_all_append_and_one_handles(commands: Commands) -> None:
    port = free_port()
    server = three_workers(commands, port)
    try:

        def said(text: str) -> int:
            return (commands.folder / "uvicorn.err").read_text().count(text)

        await until(lambda: said("Application startup complete") == 3, "three workers are up")
        keys = [f"k{number}" for number in range(30)]

        def post(key: str) -> int:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/ask/{key}", method="POST")
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.read())

        answered = {await asyncio.to_thread(post, key) for key in keys}
        await until(lambda: len(effects(commands)) == len(keys), "each has its effect")
        assert effects(commands) == Counter(keys)
        assert said("service.standing_by") == 2
        assert said("service.rejoining") == 0
        handled_by = {int(line.split()[1]) for line in (commands.folder / "effects").read_text().splitlines()}
        assert len(handled_by) == 1
        assert answered
        await settled(commands)
        # The one at work is killed; uvicorn replaces it, and one of the others has its work.
        os.kill(handled_by.pop(), signal.SIGKILL)
        await asyncio.to_thread(_until_answers, lambda: post("after"))
        await until(lambda: "after" in effects(commands), "another has taken over")
        assert effects(commands) == Counter([*keys, "after"])
    finally:
        server.terminate()
        server.wait(20)


def _until_answers(call: Callable[[], object]) -> None:
    """Send a request again if it met the worker that has just died."""
    for _ in range(100):
        try:
            call()
            return
        except OSError:
            continue
    raise AssertionError("no worker answers")


async def test_a_process_that_is_paused_keeps_its_place_and_the_standby_says_for_whom_it_waits(
    tmp_path: Path,
) -> None:
    with Commands(tmp_path) as commands:
        (tmp_path / "app.py").write_text(WORKERS)
        first = commands.start("run", "app:workers")
        await says(first, "service.connected")
        port = free_port()
        second = commands.start("run", "app:workers", "--health", str(port))
        await says(second, "service.standing_by")
        first.signal(signal.SIGSTOP)
        await commands.append("Asked", '{"key": "a"}', "asked-a")

        async def waits() -> bool:
            _, checks = await ready(port)
            return "nothing waits" not in str(checks["workers.progress"]["detail"])

        await eventually(waits, "the standby sees that an event waits")
        assert effects(commands) == Counter()
        first.signal(signal.SIGCONT)
        await ask(commands, "b")
        assert effects(commands) == Counter("ab")
        assert "service.takes_over" not in second.err


# ---- the lock ------------------------------------------------------------------------

HOLDER = """
import asyncio, os, sys
from tidings.database.engine import connected
from tidings.hosting.standby import post_of

async def main():
    async with connected(sys.argv[1]) as database:
        async with post_of(database, "audit").held():
            child = os.fork() if "fork" in sys.argv else 1
            if child:
                print("held", flush=True)
            await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgresql_url"))
    return f"sqlite:///{tmp_path}/audit.db"


def holder(url: str, *options: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLDER, url, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


async def taken(post: Post) -> str | None:
    """Return the holder, or None when the lock was free."""
    try:
        async with post.held():
            return None
    except Taken as error:
        return error.by


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("fork", [False, True], ids=["alone", "with a forked child that lives on"])
async def test_the_lock_is_free_as_soon_as_its_process_is_killed(url: str, fork: bool) -> None:
    if fork and url.startswith("postgresql"):
        pytest.skip("a forked child shares its parent's connection, as it does everybody's: spawn instead")
    process = holder(url, *(["fork"] if fork else []))
    try:
        async with connected(url) as database:
            post = post_of(database, "audit")
            assert post is not None
            by = await taken(post)
            assert by is not None
            assert f"process {process.pid}" in by
            other = post_of(database, "another")
            assert other is not None
            assert await taken(other) is None, "each service has a lock of its own"
            process.send_signal(signal.SIGSTOP)
            assert await taken(post) is not None, "who is paused will go on"
            process.kill()
            process.wait()

            async def free() -> bool:
                return await taken(post) is None

            await eventually(free, "it is free")
    finally:
        process.kill()
        process.communicate()


async def test_within_a_process_it_is_shared_and_the_last_gives_it_back(url: str) -> None:
    async with connected(url) as database, connected(url) as same:
        one, two = post_of(database, "audit"), post_of(same, "audit")
        assert one is not None
        assert two is not None
        async with two.held():
            async with one.held():
                await one.check()
            assert await asyncio.to_thread(_taken_elsewhere, url), "the other has it still"
            await two.check()

        async def free() -> bool:
            return not await asyncio.to_thread(_taken_elsewhere, url)

        await eventually(free, "it is free")


PROBE = """
import asyncio, sys
from tidings.database.engine import connected
from tidings.hosting.standby import Taken, post_of

async def main():
    async with connected(sys.argv[1]) as database:
        try:
            async with post_of(database, "audit").held():
                print("free")
        except Taken:
            print("taken")

asyncio.run(main())
"""


def _taken_elsewhere(url: str) -> bool:
    said = subprocess.run([sys.executable, "-c", PROBE, url], capture_output=True, text=True, check=True).stdout
    assert said in ("free\n", "taken\n")
    return said == "taken\n"


async def test_a_lock_file_that_was_deleted_is_noticed_and_taken_anew(tmp_path: Path) -> None:
    async with connected(f"sqlite:///{tmp_path}/audit.db") as database:
        post = post_of(database, "audit")
        assert post is not None
        async with post.held():
            (tmp_path / "audit.db-audit.lock").unlink()
            with pytest.raises(DatabaseUnavailable, match="deleted or replaced"):
                await post.check()
        async with post.held():
            await post.check()


async def test_two_paths_to_one_database_are_one_place(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    process = holder(f"sqlite:///{tmp_path}/there/audit.db")
    try:
        async with connected(f"sqlite:///{tmp_path}/link/audit.db") as database:
            post = post_of(database, "audit")
            assert post is not None
            assert await taken(post) == f"process {process.pid}"
    finally:
        process.kill()
        process.communicate()


async def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    async with connected(f"sqlite:///{tmp_path}/missing/audit.db") as database:
        post = post_of(database, "audit")
        assert post is not None
        with pytest.raises(DatabaseUnavailable, match=r"missing/audit\.db-audit\.lock.*No such file"):
            async with post.held():
                pass


async def test_a_session_that_the_server_ends_is_noticed_by_all_who_share_it_and_its_place_is_free(
    postgresql_url: str,
) -> None:
    plain = make_url(postgresql_url).set(drivername="postgresql").render_as_string(hide_password=False)
    async with connected(postgresql_url) as database, connected(postgresql_url) as same:
        post, other = post_of(database, "audit"), post_of(same, "audit")
        assert post is not None
        assert other is not None
        async with post.held(), other.held():
            connection = await asyncpg.connect(plain)
            ended = await connection.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE $1",
                f"tidings audit on %process {os.getpid()}",
            )
            await connection.close()
            assert ended == 1
            for each in (post, other, post):
                with pytest.raises(DatabaseUnavailable):
                    await each.check()

        async def free() -> bool:
            return await taken(post) is None

        await eventually(free, "it is free")


async def test_a_session_that_ends_while_it_is_asked_is_noticed(postgresql_url: str) -> None:
    async with Proxy(postgresql_url) as proxy, connected(proxy.url) as database, connected(postgresql_url) as direct:
        post = post_of(database, "audit")
        assert post is not None
        async with post.held():
            proxy.black_hole()
            async with direct.engine.connect() as connection:
                ended = await connection.scalar(
                    sa.text(
                        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                        "WHERE application_name LIKE :name"
                    ),
                    {"name": f"tidings audit on %process {os.getpid()}"},
                )
            assert ended == 1
            asked = asyncio.create_task(post.check())
            await asyncio.sleep(0.2)  # the question is on its way when the session's end arrives
            proxy.heal()
            with pytest.raises(DatabaseUnavailable):
                await asked


async def test_who_leaves_while_the_session_is_asked_leaves_it_to_those_who_share_it(postgresql_url: str) -> None:
    async with Proxy(postgresql_url) as proxy, connected(proxy.url) as database, connected(proxy.url) as same:
        post, other = post_of(database, "audit"), post_of(same, "audit")
        assert post is not None
        assert other is not None
        async with other.held():
            async with post.held():
                proxy.black_hole()
                leaving = asyncio.create_task(post.check())
                await asyncio.wait([leaving], timeout=0.1)  # it is sent, and no answer can come
                leaving.cancel()
                proxy.heal()
                with pytest.raises(asyncio.CancelledError):
                    await leaving
            await other.check()


async def test_a_lock_in_a_database_that_is_not_there_says_how_to_make_it(postgresql_url: str) -> None:
    nowhere = make_url(postgresql_url).set(database="nowhere").render_as_string(hide_password=False)
    async with connected(nowhere) as database:
        post = post_of(database, "audit")
        assert post is not None
        with pytest.raises(DatabaseUnavailable, match="createdb"):
            async with post.held():
                pass


async def test_a_database_in_memory_needs_no_lock() -> None:
    async with connected("sqlite://") as database:
        assert post_of(database, "audit") is None
