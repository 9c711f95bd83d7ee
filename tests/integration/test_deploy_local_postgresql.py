"""`deploy/local/postgresql` as a person uses it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from tidings.testing.databases import PostgreSQLServer, server_for_tests

SCRIPT = Path(__file__).parents[2] / "deploy" / "local" / "postgresql"


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQLServer]:
    with server_for_tests() as found:
        yield found


def script(folder: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"TIDINGS_LOCAL": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )


def pid_of(folder: Path | str) -> int:
    return int(json.loads((Path(folder) / "state.json").read_text())["process"]["pid"])


async def answer(url: str, statement: str) -> object:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def test_up_when_it_runs_prints_the_same_url_and_changes_nothing(server: PostgreSQLServer) -> None:
    before = pid_of(server.folder)
    again = script(server.folder, "up")
    assert (again.returncode, again.stdout.strip()) == (0, server.url)
    assert pid_of(server.folder) == before
    status = script(server.folder, "status")
    assert (status.returncode, status.stdout.strip()) == (0, f"runs on {server.url}")
    assert await answer(server.url, "SELECT current_database()") == "tidings"


async def test_what_was_committed_outlives_a_kill_and_the_url_stays(server: PostgreSQLServer) -> None:
    await answer(server.url, "CREATE TABLE kept AS SELECT 7 AS n")
    before = server.url
    server.kill()
    assert script(server.folder, "status").returncode == 1
    server.start()
    assert server.url == before
    assert await answer(server.url, "SELECT n FROM kept") == 7


def test_paused_is_told_from_gone(server: PostgreSQLServer) -> None:
    server.pause()
    try:
        status = script(server.folder, "status")
        assert (status.returncode, status.stdout.strip()) == (1, "is paused: deploy/local/postgresql resume")
        assert "resume" in script(server.folder, "up").stderr
    finally:
        server.resume()
    assert script(server.folder, "status").returncode == 0


def test_nobody_else_may_read_the_password_and_the_server_is_not_root(server: PostgreSQLServer) -> None:
    folder = Path(server.folder)
    assert (folder / "state.json").stat().st_mode & 0o077 == 0
    assert not (folder / "password").exists()
    assert Path(f"/proc/{pid_of(folder)}").stat().st_uid == (folder / "data").stat().st_uid != 0


async def test_another_password_is_refused(server: PostgreSQLServer) -> None:
    place = urlsplit(server.url)
    with pytest.raises(asyncpg.InvalidPasswordError):
        await answer(place._replace(netloc=f"tidings:guess@{place.hostname}:{place.port}").geturl(), "SELECT 1")


def test_the_end_of_whoever_holds_the_guard_ends_the_server(server: PostgreSQLServer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"TIDINGS_LOCAL": folder}
        with subprocess.Popen([sys.executable, str(SCRIPT), "guard"], env=env, stdin=subprocess.PIPE) as guard:
            up = script(folder, "up", "--port=0")
            assert (up.returncode, up.stderr) == (0, "")
            guard.communicate()
        assert guard.returncode == 0
        gone = script(folder, "status")
        assert (gone.returncode, gone.stderr.strip()) == (1, "does not run: deploy/local/postgresql up")
    assert script(server.folder, "status").returncode == 0, "it ended no other"


def test_a_port_that_is_asked_for_and_taken_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused = script(tmp_path, "up", f"--port={port}")
    assert refused.returncode == 1
    assert f"port {port} of 127.0.0.1 is taken" in refused.stderr
    assert "give another" in refused.stderr


def test_what_the_script_did_not_start_is_never_ended(tmp_path: Path) -> None:
    """The id of a server that has ended now belongs to another process."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        process = {"pid": other.pid, "started": "some other time"}
        state = {"password": "x", "port": 1, "process": process, "made": True}
        (tmp_path / "state.json").write_text(json.dumps(state))
        assert script(tmp_path, "pause").returncode == 1
        assert script(tmp_path, "down", "--kill").returncode == 0
        assert other.poll() is None
        other.communicate(b"\n")
    assert other.returncode == 0


@pytest.mark.parametrize("command", ["status", "url", "logs", "pause", "resume"])
def test_what_needs_a_server_says_how_to_start_one(tmp_path: Path, command: str) -> None:
    done = script(tmp_path, command)
    assert (done.returncode, done.stderr.strip()) == (1, "does not run: deploy/local/postgresql up")
