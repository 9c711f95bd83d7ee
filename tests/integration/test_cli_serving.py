"""`tidings run` and `dev` as people and process managers use them: signals, exit codes, restarts, terminals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.demo.fleet.processes import free_ports
from tests.integration.commands import SHOP, Command, Commands
from tests.integration.processes import until

API = """
from fastapi import FastAPI

from shop import shop

api = FastAPI(lifespan=shop.lifespan)

@api.get("/hello")
async def hello() -> str:
    return "world"

async def plain(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})
"""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with Commands(tmp_path) as opened:
        yield opened


async def serving(command: Command, count: int = 1) -> None:
    """Wait until a service consumes for the `count`-th time."""
    await until(lambda: command.err.count("service.connected") >= count, "the service consumes")


def free_port() -> int:
    """Find a port that no client of another test is given meanwhile."""
    (port,) = free_ports(1)
    return port


# ---- run -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_lets_the_handler_finish_and_ends_with_0(commands: Commands, number: signal.Signals) -> None:
    command = commands.start("run", "shop:shop")
    await serving(command)
    await commands.append("Slow")
    await until(lambda: "slow begun" in commands.handled, "the handler began")
    command.signal(number)
    assert await command.ended() == 0
    assert commands.handled == ["slow begun", "slow done"]
    assert (await commands.run("verify", "shop")).process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", [("run", "shop:shop"), ("dev", "shop:shop"), ("server", "--db", "x.db")])
async def test_a_signal_while_it_starts_ends_it_with_0(
    commands: Commands, command: tuple[str, ...], number: signal.Signals
) -> None:
    """A signal ends the command at any moment, from the first one that Python allows until it serves."""
    for seconds in (0.0, 0.05, 0.15, 0.3, 0.6):
        started = commands.start(*command)
        await until(lambda: _catches_sigterm(started.process.pid), "it hears signals", 30)  # noqa: B023
        await asyncio.sleep(seconds)
        started.signal(number)
        assert await started.ended() == 0, (seconds, started.err)


def _catches_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("event", ["Stuck", "Blocking"])
async def test_a_handler_that_cannot_be_ended_is_named_and_left_behind(commands: Commands, event: str) -> None:
    command = commands.start("run", "shop")
    await serving(command)
    await commands.append(event)
    await until(lambda: "stuck" in commands.handled, "the handler hangs")
    command.signal(signal.SIGTERM)
    assert await command.ended() == 0
    assert "service.drain_incomplete" in command.err
    pending = await commands.run("verify", "shop")
    assert pending.process.returncode == 1
    assert f"pending {event}" in pending.out


async def test_a_second_ctrl_c_ends_at_once_with_130(commands: Commands) -> None:
    command = commands.start("run", "shop")
    await serving(command)
    await commands.append("Stuck")
    await until(lambda: "stuck" in commands.handled, "the handler hangs")
    command.signal(signal.SIGINT)
    await until(lambda: "process.stopping" in command.err, "it drains")
    command.signal(signal.SIGINT)
    assert await command.ended() == 130
    assert "Traceback" not in command.err


async def test_logs_into_a_pipe_are_json_and_standard_output_is_the_users(commands: Commands) -> None:
    command = commands.start("run", "shop")
    await serving(command)
    command.signal(signal.SIGTERM)
    await command.ended()
    assert all(line.startswith("{") for line in command.err.splitlines())
    assert command.out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "absent:shop"], 2, "no module 'absent' can be found"),
        (["run", "shop:stock"], 2, "Its services: shop:shop."),
        (["run", "shop:VERSION"], 2, "is a int, not a tidings.Service"),
        (["run", "shop", "--log-level", "loud"], 2, "is not a log level"),
        (["dev", "--no-reload"], 2, "TIDINGS_SERVICES"),
    ],
)
async def test_what_cannot_be_served_is_one_line(
    commands: Commands, arguments: list[str], code: int, said: str
) -> None:
    command = await commands.run(*arguments)
    assert (command.process.returncode, command.out) == (code, "")
    assert said in command.err
    assert command.err.count("\n") == 1


async def test_a_database_that_cannot_be_used_ends_with_3(tmp_path: Path) -> None:
    (tmp_path / "taken.db").write_bytes(b"no database at all, not in the least" * 40)
    with Commands(tmp_path, {"TIDINGS_DATABASE": "sqlite:///taken.db"}) as commands:
        command = await commands.run("run", "shop")
    assert command.process.returncode == 3
    assert "Traceback" not in command.err
    assert "taken.db" in command.err.splitlines()[-1]


# ---- web applications ----------------------------------------------------------------


async def test_a_web_application_answers_drains_its_service_and_ends_with_0(commands: Commands) -> None:
    (commands.folder / "web.py").write_text(API)
    port = free_port()
    command = commands.start("run", "web:api", f"--port={port}")
    await serving(command)
    assert f'"url": "http://127.0.0.1:{port}"' in command.err, "a newcomer sees where to look"

    def answer() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/hello", timeout=5) as response:
                return bool(response.read() == b'"world"')
        except OSError:
            return False

    await until(answer, "it answers")
    await commands.append("Slow")
    await until(lambda: "slow begun" in commands.handled, "the handler began")
    command.signal(signal.SIGTERM)
    assert await command.ended() == 0
    assert commands.handled == ["slow begun", "slow done"]


async def test_a_port_in_use_is_3_and_named_before_anything_starts(commands: Commands) -> None:
    (commands.folder / "web.py").write_text(API)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = await commands.run("run", "web:api", f"--port={port}")
    assert command.process.returncode == 3
    assert command.err.startswith(f"tidings: the application cannot listen at 127.0.0.1:{port}: Address already in use")
    assert command.err.count("\n") == 1
    assert not (commands.folder / "tidings.db").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--host=192.0.2.1", "cannot listen at 192.0.2.1:8000: Cannot assign requested address; is it an address of"),
        ("--health=8080", "--health is for services"),
    ],
)
async def test_what_an_application_cannot_have_is_2_and_one_line(commands: Commands, option: str, said: str) -> None:
    (commands.folder / "web.py").write_text(API)
    command = await commands.run("run", "web:plain", option)
    assert command.process.returncode == 2
    assert said in command.err
    assert command.err.count("\n") == 1


async def test_health_answers_where_it_is_asked_to_and_its_port_in_use_is_3(commands: Commands) -> None:
    port = free_port()
    command = commands.start("run", "shop", f"--health={port}")
    await serving(command)
    with await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{port}/live", timeout=5) as response:
        assert response.status == 200
    second = await commands.run("run", "shop", f"--health={port}")
    assert second.process.returncode == 3
    assert f"127.0.0.1:{port}" in second.err.splitlines()[-1]
    command.signal(signal.SIGTERM)
    assert await command.ended() == 0


async def test_an_application_without_a_lifespan_is_served_too(commands: Commands) -> None:
    (commands.folder / "web.py").write_text(API)
    port = free_port()
    command = commands.start("run", "web:plain", f"--port={port}")

    def answer() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as response:
                return bool(response.status == 204)
        except OSError:
            return False

    await until(answer, "it answers")
    command.signal(signal.SIGINT)
    assert await command.ended() == 0


async def test_what_fails_in_the_lifespan_is_one_line_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "web.py").write_text(API)
    (tmp_path / "taken.db").write_bytes(b"no database at all, not in the least" * 40)
    with Commands(tmp_path, {"TIDINGS_DATABASE": "sqlite:///taken.db"}) as commands:
        command = await commands.run("run", "web:api", f"--port={free_port()}")
    assert command.process.returncode == 3
    assert "Traceback" not in command.err
    last = json.loads(command.err.splitlines()[-1])
    assert (last["event"], last["exit_code"]) == ("process.failed", 3)
    assert last["error"].startswith("DatabaseUnavailable: database sqlite:///taken.db")


DYING = """
import asyncio
from contextlib import asynccontextmanager
from shop import Placed, Service

@asynccontextmanager
async def lifespan(service):
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(poll())
        yield

async def poll():
    await asyncio.sleep(0.2)
    raise RuntimeError("poller died")

dying = Service("dying", lifespan=lifespan)

@dying.on(Placed)
async def take(event: Placed) -> None: ...
"""


@pytest.mark.parametrize("command", [("run", "dying"), ("dev", "dying", "--no-reload")])
async def test_what_nobody_expected_ends_the_process_with_its_traceback_as_json(
    commands: Commands, command: tuple[str, ...]
) -> None:
    (commands.folder / "dying.py").write_text(DYING)
    ended = await commands.run(*command)
    assert ended.process.returncode == 70
    lines = [json.loads(line) for line in ended.err.splitlines()]
    assert (lines[-1]["event"], lines[-1]["error"]) == ("process.failed", "RuntimeError: poller died")
    assert "dying.py" in lines[-1]["exception"]
    assert "in poll" in lines[-1]["exception"]


# ---- dev -----------------------------------------------------------------------------


async def test_dev_runs_everything_embedded_and_starts_again_when_a_file_changes(commands: Commands) -> None:
    command = commands.start("dev", "shop")
    await serving(command)
    await commands.append("Placed", '{"number": 1}')
    await until(lambda: commands.handled == ["placed 1 by version 1"], "it is handled")
    (commands.folder / "shop.py").write_text(SHOP.replace("VERSION = 1", "VERSION = 2"))
    await serving(command, 2)
    assert "shop.py changed, starting again" in command.err
    await commands.append("Placed", '{"number": 2}')
    await until(lambda: len(commands.handled) == 2, "it is handled by the new code")
    command.signal(signal.SIGTERM)
    assert await command.ended() == 0
    assert commands.handled == ["placed 1 by version 1", "placed 2 by version 2"]


async def test_code_that_cannot_be_imported_is_said_once_and_waited_for(commands: Commands) -> None:
    command = commands.start("run", "shop", "--reload")
    await serving(command)
    (commands.folder / "shop.py").write_text("def (:\n")
    await until(lambda: "waiting for a change" in command.err, "it waits")
    assert "module 'shop' cannot be imported: SyntaxError" in command.err
    assert "shop.py:1" in command.err
    assert "Traceback" not in command.err
    (commands.folder / "shop.py").write_text(SHOP)
    await serving(command, 2)
    command.signal(signal.SIGINT)
    assert await command.ended() == 0
    assert command.err.count("SyntaxError") == 1


async def test_waiting_for_a_change_ends_with_0_too(commands: Commands) -> None:
    (commands.folder / "shop.py").write_text("def (:\n")
    command = commands.start("dev", "shop")
    await until(lambda: "waiting for a change" in command.err, "it waits")
    command.signal(signal.SIGINT)
    assert await command.ended() == 0


async def test_dev_keeps_its_files_in_a_folder_whatever_the_settings_say(tmp_path: Path) -> None:
    with Commands(tmp_path, {"TIDINGS_BUS": "amqp://nowhere", "TIDINGS_SERVICES": "shop:shop"}) as commands:
        command = commands.start("dev", "--folder", "var/deep")
        await serving(command)
        command.signal(signal.SIGTERM)
        assert await command.ended() == 0
    assert {path.name for path in (tmp_path / "var" / "deep").glob("*.db")} == {"tidings.db", "shop.db"}


async def test_a_child_ends_with_its_parent_even_if_that_is_killed(commands: Commands) -> None:
    command = commands.start("dev", "shop")
    await serving(command)
    command.process.kill()
    await until(lambda: "service.stopped" in command.err, "the child drains")


async def test_a_second_ctrl_c_ends_parent_and_child_at_once(commands: Commands) -> None:
    command = commands.start("dev", "shop")
    await serving(command)
    await commands.append("Stuck")
    await until(lambda: "stuck" in commands.handled, "the handler hangs")
    command.signal(signal.SIGINT)
    await until(lambda: "process.stopping" in command.err, "it drains")
    command.signal(signal.SIGINT)
    assert await command.ended() == 130
    assert "process.ended_at_once" in command.err, "the child says what it leaves"


# ---- terminals -----------------------------------------------------------------------


async def test_ctrl_c_typed_at_a_terminal_drains_dev_once(commands: Commands) -> None:
    command = commands.at_terminal("dev", "shop")
    await until(lambda: "service.connected" in command.out, "it consumes")
    await commands.append("Slow")
    await until(lambda: "slow begun" in commands.handled, "the handler began")
    command.type("\x03")
    assert await command.ended() == 0
    assert commands.handled == ["slow begun", "slow done"]
    assert command.out.count("process.stopping") == 1


async def test_a_question_is_asked_where_somebody_can_answer(commands: Commands) -> None:
    running = commands.start("run", "shop")
    await serving(running)
    await commands.append("Poisoned")
    await until(lambda: "event.dead" in running.err, "it is dead")
    running.signal(signal.SIGTERM)
    assert await running.ended() == 0
    for answer, code, said in (("n\n", 1, "Nothing was changed."), ("\x03", 130, ""), ("y\n", 0, "1 dropped.")):
        command = commands.at_terminal("dead", "drop", "--all", "--service", "shop")
        await until(lambda asked=command: "[y/N]" in asked.out, "it asks")  # type: ignore[misc]
        command.type(answer)
        assert await command.ended() == code
        assert said in command.out


async def test_colours_are_for_terminals_and_not_for_those_who_want_none(commands: Commands) -> None:
    await commands.append("Placed", '{"number": 1}')
    plain = await commands.run("streams", "list")
    assert "\x1b" not in plain.out
    coloured = commands.at_terminal("streams", "list")
    assert await coloured.ended() == 0
    assert "\x1b[1m" in coloured.out
    none = commands.at_terminal("streams", "list", env={"NO_COLOR": "1"})
    assert await none.ended() == 0
    assert "\x1b" not in none.out
    assert [line.rstrip() for line in none.out.splitlines()] == plain.out.splitlines()


# ---- following -----------------------------------------------------------------------


async def test_tail_follows_until_ctrl_c(commands: Commands) -> None:
    await commands.append("Placed", '{"number": 1}')
    command = commands.start("streams", "tail", "--follow", "--lines=1")
    await until(lambda: command.out.count("\n") == 1, "it shows what is there")
    one = commands.start("streams", "tail", "parcel-1", "--follow")
    await commands.append("Placed", '{"number": 2}', "parcel-1")
    await until(lambda: command.out.count("\n") == 2, "it shows what comes")
    await until(lambda: one.out.count("\n") == 1, "the stream that was waited for is shown")
    assert "parcel-1@0  Placed" in command.out.splitlines()[1]
    for follower in (command, one):
        follower.signal(signal.SIGINT)
        assert await follower.ended() == 130
        assert follower.err == ""


async def test_status_watches_with_a_line_per_change(commands: Commands) -> None:
    await commands.append("Ignored")
    command = commands.start("status", "--watch")
    await until(lambda: command.out.count("\n") == 1, "it looks")
    await commands.append("Ignored")
    await until(lambda: command.out.count("\n") == 2, "it notices")
    command.signal(signal.SIGINT)
    assert await command.ended() == 130
    assert command.err == ""
    screen = commands.at_terminal("status", "--watch")
    await until(lambda: "NO SERVICE" in screen.out, "it draws")
    screen.type("\x03")
    assert await screen.ended() == 130


async def test_a_reader_that_has_seen_enough_is_no_error(commands: Commands) -> None:
    await commands.append("Placed", '{"text": "%s"}' % ("x" * 100_000))
    for command in ("list", "tail"):
        reading, writing = os.pipe()
        os.close(reading)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tidings", "streams", command),
            cwd=commands.folder,
            env=commands.env,
            stdout=writing,
            stderr=PIPE,
        )
        os.close(writing)
        _, complaints = await process.communicate()
        assert (process.returncode, complaints) == (0, b"")


def test_the_shell_completes_commands() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}
    env |= {"_TIDINGS_COMPLETE": "complete_bash", "COMP_WORDS": "tidings st", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "tidings"], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["status", "streams"]
