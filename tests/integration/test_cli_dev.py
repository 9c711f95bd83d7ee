"""`tidings dev` with web applications and services together: one log, one bus, one loop of restarts."""

from __future__ import annotations

import asyncio
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.commands import SHOP, Command, Commands
from tests.integration.processes import until
from tests.integration.test_cli_serving import free_port

DESK = """
from fastapi import FastAPI
from tidings import Service
from shop import Placed

VERSION = 1
desk = Service("desk")
api = FastAPI(lifespan=desk.lifespan)

@api.post("/place/{number}")
async def place(number: int) -> int:
    await desk.append(f"order-{number}", Placed(number=number))
    return VERSION

async def plain(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})
"""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with Commands(tmp_path, {"TIDINGS_DATABASE__DESK": "postgresql+asyncpg://nowhere/x"}) as opened:
        (tmp_path / "desk.py").write_text(DESK)
        yield opened


def two_free_ports() -> int:
    """Return the first of two consecutive free ports."""
    while True:
        port = free_port()
        try:
            with socket.create_server(("127.0.0.1", port + 1)):
                return port
        except OSError:
            continue


async def asked(port: int, path: str = "", method: str = "GET") -> str:
    def ask() -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return f"{answer.status} {answer.read().decode()}"

    return await asyncio.to_thread(ask)


async def started(command: Command, count: int) -> None:
    await until(lambda: command.err.count("application.started") >= count, f"{count} applications have started")


async def test_applications_and_services_run_together_and_start_again_together(commands: Commands) -> None:
    port = two_free_ports()
    command = commands.start("dev", "shop:shop", "desk:api", "desk:plain", "--port", str(port))
    await started(command, 2)
    assert await asked(port, "place/1", "POST") == "200 1"
    assert await asked(port + 1) == "204 "
    await until(lambda: commands.handled == ["placed 1 by version 1"], "the service handles what a request appended")

    (commands.folder / "desk.py").write_text(DESK.replace("VERSION = 1", "VERSION = 2"))
    (commands.folder / "shop.py").write_text(SHOP.replace("VERSION = 1", "VERSION = 2"))
    await until(lambda: "VERSION = 2" in (commands.folder / "shop.py").read_text(), "both files are written")
    await started(command, 4)
    assert await asked(port, "place/2", "POST") == "200 2"
    await until(lambda: len(commands.handled) == 2, "it is handled")
    assert commands.handled == ["placed 1 by version 1", "placed 2 by version 2"]
    command.signal(signal.SIGTERM)
    assert await command.ended() == 0
    assert {path.name for path in commands.folder.glob("*.db")} == {"tidings.db", "shop.db", "desk.db"}


async def test_an_application_alone(commands: Commands) -> None:
    port = free_port()
    command = commands.start("dev", "desk:api", "--no-reload", "--port", str(port))
    await started(command, 1)
    assert await asked(port, "place/1", "POST") == "200 1"
    command.signal(signal.SIGINT)
    assert await command.ended() == 0


async def test_what_cannot_run_together_is_said(commands: Commands) -> None:
    port = free_port()
    twice = await commands.run("dev", "desk:desk", "desk:api", "--no-reload", "--port", str(port))
    assert twice.process.returncode == 2
    assert "lifespan" in twice.err
    with socket.create_server(("127.0.0.1", port)):
        taken = await commands.run("dev", "desk:api", "--no-reload", "--port", str(port))
    assert taken.process.returncode == 3
    assert str(port) in taken.err
    neither = await commands.run("dev", "desk:VERSION", "--no-reload")
    assert neither.process.returncode == 2
