"""`deploy/local/nats` and `deploy/local/kafka` as a person uses them. Nothing in Tidings speaks to them yet."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import pytest

from tidings.testing.local import LocalServer

SCRIPTS: Final = Path(__file__).parents[2] / "deploy" / "local"
PRODUCTS: Final = ("nats", "kafka")
INSTALLING: Final = 1200
"""Seconds for a download and a build on a busy machine."""


class Nats(LocalServer):
    product = "nats"


class Kafka(LocalServer):
    product = "kafka"


def script(product: str, folder: Path | str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / product), *arguments],
        env=os.environ | {"TIDINGS_LOCAL": str(folder)} | more,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=INSTALLING if arguments[0] == "install" else 150,
    )


def pid_of(folder: Path | str) -> int:
    return int(json.loads((Path(folder) / "state.json").read_text())["process"]["pid"])


# ---- with a server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[Nats, Kafka], ids=PRODUCTS)
def server(request: pytest.FixtureRequest) -> Iterator[LocalServer]:
    kind = request.param
    assert issubclass(kind, LocalServer)
    with tempfile.TemporaryDirectory() as nowhere:
        installed = script(kind.product, nowhere, "install")
    if installed.returncode != 0:
        # In CI, too, as long as no adapter speaks to it: whether it can be fetched is not ours to prove.
        pytest.skip(f"no {kind.__name__} for tests: {installed.stderr.strip()}")
    with kind() as found:
        yield found


installs = [
    pytest.mark.slow("fetches and builds the server, which may take minutes; the tests below it need none"),
    pytest.mark.timeout(INSTALLING),
]


class TestServer:
    """Every command, with each of the servers."""

    pytestmark = installs

    def test_up_when_it_runs_prints_the_same_url_and_changes_nothing(self, server: LocalServer) -> None:
        before = pid_of(server.folder)
        again = script(server.product, server.folder, "up")
        assert (again.returncode, again.stdout.strip()) == (0, server.url)
        assert pid_of(server.folder) == before
        status = script(server.product, server.folder, "status")
        assert (status.returncode, status.stdout.strip()) == (0, f"runs on {server.url}")
        assert script(server.product, server.folder, "url").stdout.strip() == server.url

    def test_it_outlives_a_kill_and_the_url_stays(self, server: LocalServer) -> None:
        before = server.url
        server.kill()
        gone = script(server.product, server.folder, "status")
        assert (gone.returncode, gone.stderr.strip()) == (1, f"does not run: deploy/local/{server.product} up")
        server.start()
        assert server.url == before
        server.restart()
        assert script(server.product, server.folder, "status").returncode == 0

    def test_paused_is_told_from_gone(self, server: LocalServer) -> None:
        server.pause()
        try:
            status = script(server.product, server.folder, "status")
            remedy = f"deploy/local/{server.product} resume"
            assert (status.returncode, status.stdout.strip()) == (1, f"is paused: {remedy}")
            assert "resume" in script(server.product, server.folder, "up").stderr
        finally:
            server.resume()
        assert script(server.product, server.folder, "status").returncode == 0

    def test_it_listens_on_this_machine_alone(self, server: LocalServer) -> None:
        pid = pid_of(server.folder)
        owned = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()}
        heard = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                local, _, state = line.split()[1:4]
                if state == "0A" and f"socket:[{line.split()[9]}]" in owned:
                    heard.add(local.rpartition(":")[0])
        assert heard <= {"0100007F", "0000000000000000FFFF00000100007F"}
        assert heard

    def test_nobody_else_may_read_the_password(self, server: LocalServer) -> None:
        word = urlsplit(server.url).password or "none"
        for file in Path(server.folder).rglob("*"):
            if file.is_file() and word.encode() in file.read_bytes():
                assert file.stat().st_mode & 0o077 == 0, file
        assert Path(server.folder).stat().st_mode & 0o077 == 0

    def test_the_end_of_whoever_holds_the_guard_ends_the_server(self, server: LocalServer) -> None:
        with tempfile.TemporaryDirectory() as folder:
            env = os.environ | {"TIDINGS_LOCAL": folder}
            command = [sys.executable, str(SCRIPTS / server.product), "guard"]
            with subprocess.Popen(command, env=env, stdin=subprocess.PIPE) as guard:
                up = script(server.product, folder, "up", "--port=0")
                assert (up.returncode, up.stderr) == (0, "")
                guard.communicate()
            assert guard.returncode == 0
            gone = script(server.product, folder, "status")
            assert (gone.returncode, gone.stderr.strip()) == (1, f"does not run: deploy/local/{server.product} up")
        assert script(server.product, server.folder, "status").returncode == 0, "it ended no other"


class Said(NamedTuple):
    first: bytes
    then: bytes


@pytest.mark.parametrize("server", [Nats], indirect=True, ids=["nats"])
class TestNats:
    pytestmark = installs

    def test_it_is_new_enough_and_lets_in_who_has_the_password(self, server: LocalServer) -> None:
        right = self.said(server, urlsplit(server.url).password or "")
        version = json.loads(right.first[5:])["version"]
        assert tuple(map(int, version.split(".")[:2])) >= (2, 12)
        assert right.then == b"PONG\r\n"
        assert b"Authorization Violation" in self.said(server, "guess").then

    def said(self, server: LocalServer, password: str) -> Said:
        port = urlsplit(server.url).port
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            lines = connection.makefile("rb")
            first = lines.readline()
            login = json.dumps({"user": "tidings", "pass": password, "verbose": False})
            connection.sendall(f"CONNECT {login}\r\nPING\r\n".encode())
            return Said(first, lines.readline())


# ---- without one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("command", ["status", "url", "logs", "pause", "resume"])
def test_what_needs_a_server_says_how_to_start_one(tmp_path: Path, product: str, command: str) -> None:
    done = script(product, tmp_path, command)
    assert (done.returncode, done.stderr.strip()) == (1, f"does not run: deploy/local/{product} up")


@pytest.mark.parametrize("product", PRODUCTS)
def test_what_the_script_did_not_start_is_never_ended(tmp_path: Path, product: str) -> None:
    """The id of a server that has ended now belongs to another process."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        process = {"pid": other.pid, "started": "some other time"}
        (tmp_path / "state.json").write_text(json.dumps({"password": "x", "port": 1, "process": process}))
        assert script(product, tmp_path, "pause").returncode == 1
        assert script(product, tmp_path, "down", "--kill").returncode == 0
        assert other.poll() is None
        other.communicate(b"\n")
    assert other.returncode == 0


@pytest.mark.parametrize(
    ("product", "says"),
    [("nats", "Install Go 1.21 or newer"), ("kafka", "Java 17 or newer is missing")],
)
def test_without_what_installs_it_a_person_is_told_what_to_install(tmp_path: Path, product: str, says: str) -> None:
    more = {"PATH": str(tmp_path), "TIDINGS_LOCAL_PROGRAMS": str(tmp_path / "programs")}
    for command in ("install", "up"):
        refused = script(product, tmp_path / "kept", command, **more)
        assert refused.returncode == 1
        assert says in refused.stderr
        assert not (tmp_path / "programs").exists()


@pytest.mark.parametrize(
    ("product", "tool", "fakes", "says"),
    [
        ("nats", "go", {"go": 'test "$1" = env || { echo "dial tcp: no route to host"; exit 1; }'}, "no route to host"),
        (
            "kafka",
            "mvn",
            {"java": "echo 'openjdk version \"17.0.1\"' >&2", "mvn": 'echo "Could not transfer artifact"; exit 1'},
            "Could not transfer artifact",
        ),
    ],
)
def test_what_the_download_says_is_shown_and_nothing_half_made_is_taken(
    tmp_path: Path, product: str, tool: str, fakes: dict[str, str], says: str
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, shell in fakes.items():
        (tools / name).write_text(f"#!/bin/sh\n{shell}\n")
        (tools / name).chmod(0o755)
    programs = tmp_path / "programs"
    more = {"PATH": f"{tools}:/usr/bin:/bin", "TIDINGS_LOCAL_PROGRAMS": str(programs)}
    refused = script(product, tmp_path / "kept", "install", **more)
    assert refused.returncode == 1
    assert f"{tool} " in refused.stderr
    assert says in refused.stderr
    assert [place.name for place in programs.iterdir()] == ["lock"]


def test_a_nats_server_that_is_too_old_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "nats-server").write_text("#!/bin/sh\necho 'nats-server: v2.9.10'\n")
    (tmp_path / "nats-server").chmod(0o755)
    more = {"PATH": f"{tmp_path}:/bin", "TIDINGS_LOCAL_PROGRAMS": str(tmp_path / "programs")}
    assert "nats-server 2.12 or newer is missing" in script("nats", tmp_path / "kept", "install", **more).stderr
    (tmp_path / "nats-server").write_text("#!/bin/sh\necho 'nats-server: v2.14.0'\n")
    assert script("nats", tmp_path / "kept", "install", **more).returncode == 0


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_port_that_is_asked_for_and_taken_is_refused(tmp_path: Path, product: str) -> None:
    (tmp_path / "programs" / "kafka-4.1.0").mkdir(parents=True)
    (tmp_path / "nats-server").write_text("#!/bin/sh\necho 'nats-server: v2.14.0'\n")
    (tmp_path / "java").write_text("#!/bin/sh\necho 'openjdk version \"17.0.1\"' >&2\n")
    for name in ("nats-server", "java"):
        (tmp_path / name).chmod(0o755)
    more = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TIDINGS_LOCAL_PROGRAMS": str(tmp_path / "programs")}
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused = script(product, tmp_path / "kept", "up", f"--port={port}", **more)
    assert refused.returncode == 1
    assert f"port {port} of 127.0.0.1 is taken" in refused.stderr
    assert "give another" in refused.stderr
