"""Order's HTTP API in real processes, killed where it hurts most."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.integration.processes import until
from tests.services.counter import ORDER, problem
from tidings import open_store

ROOT = Path(__file__).parents[2]
WHOLE = ("-m", "uvicorn", "services.order.api:api", "--host", "127.0.0.1", "--port", "0")
KILLED = ("-m", "tests.services.order_process")
KEY = {"Idempotency-Key": "8e03978e-40d5-43e8-bc93-6894a57f9324"}


class Server:
    """A process that serves the API on the files in a folder."""

    def __init__(self, folder: Path, *command: str) -> None:
        env = os.environ | {
            "TIDINGS_STORE": f"sqlite:///{folder}/events.db",
            "TIDINGS_DATABASE": f"sqlite:///{folder}/{{service}}.db",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        self._log = folder / f"{command[1]}.log"
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    @property
    def url(self) -> str:
        """The URL; empty until it serves."""
        log = self._log.read_text()
        assert self.process.poll() is None, log
        found = re.search(r"running on (http://127\.0\.0\.1:\d+)", log)
        return found[1] if found else ""


@asynccontextmanager
async def serving(folder: Path, *command: str) -> AsyncIterator[tuple[httpx.AsyncClient, subprocess.Popen[bytes]]]:
    """A client of a server process."""
    server = Server(folder, *command)
    try:
        await until(lambda: bool(server.url), f"{command} serves")
        async with httpx.AsyncClient(base_url=server.url) as http:
            yield http, server.process
    finally:
        server.process.kill()
        server.process.wait()


async def test_a_process_killed_between_log_and_answer_places_the_order_once(tmp_path: Path) -> None:
    async with serving(tmp_path, *KILLED) as (http, process):
        with pytest.raises(httpx.TransportError):
            await http.post("/orders", json=ORDER, headers=KEY)
        assert process.wait(10) == -signal.SIGKILL
    async with serving(tmp_path, *WHOLE) as (http, process):
        again = await http.post("/orders", json=ORDER, headers=KEY)
        assert again.status_code == 201, again.text
        assert again.headers["ETag"] == '"0"'
        assert (await http.post("/orders", json=ORDER, headers=KEY)).content == again.content
        assert [order["id"] for order in (await http.get("/orders")).json()["orders"]] == [again.json()["id"]]
        problem(
            await http.post("/orders", json=ORDER | {"country": "Eire"}, headers=KEY), 422, "idempotency-key-reused"
        )
        problem(await http.get("/orders/%2F"), 404)
        process.terminate()
        assert process.wait(15) == -signal.SIGTERM, "uvicorn drains, and then ends as it was told to"
    async with open_store(f"sqlite:///{tmp_path}/events.db") as store:
        created = [event.stream async for event in store.read_all() if event.type == "OrderCreated"]
    assert created == [f"order-{again.json()['id']}"]
