"""What clients can make `tidings server` keep: its memory stays bounded whatever their number, and an honest client is
answered.

Each attack is bounded in count, and goes to a process of its own on this machine.
"""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import pytest

pytest.importorskip("esdbclient", reason="pip install 'tidings[eventstoredb]'")

from esdbclient import EventStoreDBClient, NewEvent, StreamState
from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame, WindowUpdateFrame

from tests.faults.attacker import KEPT, PATIENCE, Attacker, Honest, read_request, resident_mb
from tests.integration.server import STREAMS, ServerProcess

pytestmark = pytest.mark.faults

MEMORY_MB = 230
"""MiB by which the server may grow: its budget of 128 MiB, and what Python makes of it."""
PASSWORD = "Xx1-long-password"
READ = f"{STREAMS}/Read".encode()
APPEND = f"{STREAMS}/Append".encode()


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while KEPT:
        KEPT.pop().socket.close()


def readers(port: int, *windows: int) -> list[Attacker]:
    """Ninety readers of everything on each of these connections, whose calls have such a window."""
    attackers = []
    for window in windows:
        attackers.append(Attacker(port, window=window))
        for n in range(90):
            attackers[-1].send(attackers[-1].request(2 * n + 1, READ, read_request()))
    return attackers


def stalled_readers(port: int) -> None:
    readers(port, 0, 2**31 - 1, 0, 2**31 - 1, 0, 2**31 - 1)


def readers_of_a_byte(port: int) -> None:
    """Readers that take a byte from time to time."""
    attackers = readers(port, 1, 1, 1, 1, 1, 1)
    for _ in range(20):
        with suppress(OSError):
            for attacker in attackers:
                for n in range(90):
                    attacker.send(WindowUpdateFrame(2 * n + 1, window_increment=1).serialize())
                attacker.drain()
        sleep(0.2)


def readers_that_said_something_else(port: int) -> None:
    """Readers whose second request never becomes whole."""
    for attacker in readers(port, 0, 0, 0):
        with suppress(OSError):
            for n in range(90):
                attacker.send(DataFrame(2 * n + 1, data=b"\0").serialize())


def header_blocks(port: int) -> None:
    """Header blocks of nearly 8 MiB, which h2 alone would take, without their end."""
    for _ in range(100):
        attacker = Attacker(port)
        with suppress(OSError):
            attacker.send(HeadersFrame(1, data=b"\0\1a\1b" * 3000).serialize())
            for _ in range(62):
                attacker.send(ContinuationFrame(1, data=b"\0\1a\1b" * 26_000).serialize())


def beginnings_of_frames(port: int) -> None:
    for _ in range(190):
        attacker = Attacker(port)
        with suppress(OSError):
            attacker.send(attacker.head(1, APPEND, ends=False))
            attacker.send(DataFrame(1, data=b"x" * 130_000).serialize()[:-1])
            for n in range(1, 40):  # and answers that are not read
                attacker.send(attacker.head(2 * n + 1, b"/nonsense"))


def calls_with_much_metadata(port: int) -> None:
    for _ in range(100):
        attacker = Attacker(port)
        with suppress(OSError):
            for n in range(90):
                attacker.send(attacker.head(2 * n + 1, APPEND, (b"x", b"y" * 15_000), ends=False))
            attacker.drain()


ATTACKS: list[Callable[[int], None]] = [
    stalled_readers,
    readers_of_a_byte,
    readers_that_said_something_else,
    header_blocks,
    beginnings_of_frames,
    calls_with_much_metadata,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_the_servers_memory_is_bounded(tmp_path: Path, attack: Callable[[int], None]) -> None:
    limits = ("--limit", "connections=200", "--limit", "request_seconds=5")
    with ServerProcess(tmp_path / "log.db", *limits) as server, EventStoreDBClient(server.uri) as client:
        big = [NewEvent("T", b"x" * 100_000, content_type="application/octet-stream") for _ in range(8)]
        for n in range(30):
            client.append_to_stream(f"big-{n}", current_version=StreamState.NO_STREAM, events=big, timeout=PATIENCE)
        before = resident_mb(server)
        with Honest(server.uri, None) as honest:
            with suppress(OSError):
                attack(server.port)
            answered, began = honest.answered, monotonic()
            while honest.error is None and (honest.answered < answered + 2 or monotonic() - began < 3):
                sleep(0.05)
        assert honest.error is None
        print(f"{attack.__name__}: {resident_mb(server) - before:.0f} MiB, slowest {honest.slowest:.2f} s")
        assert resident_mb(server) - before < MEMORY_MB


def test_links_to_large_events_are_read_in_pieces_of_what_they_lead_to(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log.db") as server, EventStoreDBClient(server.uri) as client:
        large = NewEvent("T", b"x" * 1_000_000, content_type="application/octet-stream")
        client.append_to_stream("large", current_version=StreamState.NO_STREAM, events=large, timeout=PATIENCE)
        links = [NewEvent("$>", b"0@large", content_type="application/octet-stream") for _ in range(400)]
        client.append_to_stream("links", current_version=StreamState.NO_STREAM, events=links, timeout=PATIENCE)
        before = resident_mb(server)
        read = client.read_stream("links", resolve_links=True, timeout=4 * PATIENCE)
        assert sum(len(event.data) for event in read) == 400_000_000
        print(f"{resident_mb(server) - before:.0f} MiB")
        assert resident_mb(server) - before < MEMORY_MB


# ---- with users ----------------------------------------------------------------------


def test_unfinished_handshakes_leave_room_for_who_finishes_his(tmp_path: Path) -> None:
    options = ("--tls", "--limit", "connections=40")
    with ServerProcess(tmp_path / "log.db", *options, users=f"admin:{PASSWORD}") as server:
        certificate = (tmp_path / "log.db-tls" / "server.crt").read_text()
        uri = f"esdb://admin:{PASSWORD}@localhost:{server.port}"
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(300)]
        with Honest(uri, certificate) as honest:
            pass
        assert honest.error is None
        ended = 0
        for each in silent:
            each.settimeout(0.05)
            with suppress(TimeoutError):
                ended += not each.recv(1)
            each.close()
        assert ended >= 250


def test_names_that_do_not_exist_keep_nobody_from_logging_in(tmp_path: Path) -> None:
    db = tmp_path / "log.db"
    with ServerProcess(db, "--tls", users=f"admin:{PASSWORD},clerk:{PASSWORD}") as server:
        assert server.port
    # Started again, the server has not seen the clerk's password yet.
    with ServerProcess(db, "--tls", users=f"admin:{PASSWORD}") as server:
        certificate = (tmp_path / "log.db-tls" / "server.crt").read_text()
        stop = threading.Event()

        def guess(number: int) -> None:
            while not stop.is_set():
                with suppress(OSError):
                    attacker = Attacker(server.port, tls=True)
                    attacker.socket.settimeout(1)
                    for n in range(90):
                        guess = base64.b64encode(f"nobody-{number}-{n}:x".encode())
                        attacker.send(attacker.head(2 * n + 1, READ, (b"authorization", b"Basic " + guess)))
                    while attacker.socket.recv(1 << 16) and not stop.is_set():
                        pass

        guessing = [threading.Thread(target=guess, args=(number,)) for number in range(12)]
        for thread in guessing:
            thread.start()
        try:
            sleep(1)
            with Honest(f"esdb://clerk:{PASSWORD}@localhost:{server.port}", certificate) as honest:
                pass
            print(f"logged in within {honest.slowest:.2f} s")
            assert honest.error is None
        finally:
            stop.set()
            while KEPT:
                KEPT.pop().socket.close()
            for thread in guessing:
                thread.join(PATIENCE)


def test_who_has_no_credentials_keeps_no_memory_from_who_has(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log.db", "--tls", users=f"admin:{PASSWORD}") as server:
        certificate = (tmp_path / "log.db-tls" / "server.crt").read_text()
        before = resident_mb(server)
        for _ in range(60):
            attacker = Attacker(server.port, tls=True)
            with suppress(OSError):
                for n in range(4):
                    attacker.send(attacker.request(2 * n + 1, APPEND, b"x" * 15_000, size=2**20, ends=False))
        with Honest(f"esdb://admin:{PASSWORD}@localhost:{server.port}", certificate) as honest:
            pass
        assert honest.error is None
        assert resident_mb(server) - before < MEMORY_MB
