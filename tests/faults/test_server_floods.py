"""Floods against `tidings server`: memory and CPU stay bounded, and an honest client is answered meanwhile.

Each flood is bounded in count, and goes to a process of its own on this machine. `PATIENCE` is generous: without the
server's budgets an answer takes minutes, or never comes.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

pytest.importorskip("esdbclient", reason="pip install 'tidings[eventstoredb]'")

from esdbclient import EventStoreDBClient, NewEvent, StreamState
from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame, PingFrame, RstStreamFrame, SettingsFrame

from tests.faults.attacker import HEALTH, KEPT, PATIENCE, Attacker, Honest, cpu_seconds, read_request, resident_mb
from tests.integration.server import STREAMS, ServerProcess, message, named
from tidings.server.protocol import shared, streams

pytestmark = pytest.mark.faults

MEMORY_MB = 250
"""MiB by which a flood may make the server grow: its budget of bytes, and what Python makes of it."""
CPU_SECONDS = 60
"""Seconds of CPU that a flood may cost."""
PASSWORD = "Xx1-long-password"


# ---- the floods ----------------------------------------------------------------------


def echoes(port: int) -> None:
    attacker = Attacker(port)
    for n in range(100):
        attacker.send(attacker.head(2 * n + 1, b"/" + b"\xff" * 12_000))
        attacker.drain()
    attacker.send(attacker.head(201, b"/" + b"\xff" * 40_000))


def resets(port: int) -> None:
    attacker = Attacker(port)
    for n in range(100_000):
        reset = RstStreamFrame(2 * n + 1, error_code=8)
        attacker.send(attacker.head(2 * n + 1, f"{STREAMS}/Read".encode(), ends=False) + reset.serialize())


def opened(port: int) -> None:
    attacker = Attacker(port)
    for n in range(9000):
        attacker.send(attacker.head(2 * n + 1, f"{STREAMS}/Read".encode(), ends=False))


def parts_of_messages(port: int) -> None:
    for _ in range(6):
        attacker = Attacker(port)
        with suppress(OSError):
            for n in range(60):
                path = f"{STREAMS}/Append".encode()
                attacker.send(attacker.request(2 * n + 1, path, b"x" * 240_000, size=16 * 2**20, ends=False))
                attacker.drain()


def unfinished_appends(port: int) -> None:
    attacker = Attacker(port)
    attacker.send(attacker.head(1, f"{STREAMS}/BatchAppend".encode(), ends=False))
    for n in range(300):
        id_ = shared.UUID(string=f"00000000-0000-0000-0000-{n + 1:012}")
        options = streams.BatchAppendReq.Options(stream_identifier=named(f"s-{n}"))
        options.any.SetInParent()
        proposed = message(streams.BatchAppendReq.ProposedMessage, b"x" * 200_000)
        part = streams.BatchAppendReq(correlation_id=id_, options=options, proposed_messages=[proposed])
        body = part.SerializeToString()
        data = b"\0" + len(body).to_bytes(4, "big") + body
        for at in range(0, len(data), 16_000):
            attacker.send(DataFrame(1, data=data[at : at + 16_000]).serialize())
        attacker.drain()


def pings(port: int) -> None:
    attacker = Attacker(port)
    for _ in range(3000):
        attacker.send(PingFrame(0, opaque_data=b"12345678").serialize() * 500)


def settings(port: int) -> None:
    attacker = Attacker(port)
    for _ in range(2000):
        attacker.send(SettingsFrame(0).serialize() * 500)


def headers_without_end(port: int) -> None:
    attacker = Attacker(port)
    attacker.send(HeadersFrame(1, data=b"\x00\x01a\x01b" * 1000).serialize())
    for _ in range(10_000):
        attacker.send(ContinuationFrame(1, data=b"\x00\x01a\x01b" * 3000).serialize())


def nothing_in_frames(port: int) -> None:
    attacker = Attacker(port)
    attacker.send(attacker.head(1, f"{STREAMS}/BatchAppend".encode(), ends=False))
    for _ in range(2000):
        attacker.send(DataFrame(1, data=b"").serialize() * 500)


def stalled_readers(port: int) -> None:
    for window in (0, 2**31 - 1):  # one that gives no window, and one that never reads from its socket
        attacker = Attacker(port, window=window)
        for n in range(75):
            attacker.send(attacker.request(2 * n + 1, f"{STREAMS}/Read".encode(), read_request()))


def idle_connections(port: int) -> None:
    for _ in range(400):
        with suppress(OSError):
            Attacker(port)


def expressions(port: int) -> None:
    kind = streams.ReadReq.Options.FilterOptions
    attacker = Attacker(port)
    for n, pattern in enumerate([r"(a+)+$", r"(a|aa)+$", r"(.*)*x$", "(a?){30}a{30}$"] * 5):
        wanted = kind(stream_identifier=kind.Expression(regex=pattern), max=32, checkpointIntervalMultiplier=1)
        request = attacker.request(2 * n + 1, f"{STREAMS}/Read".encode(), read_request(filter=wanted))
        attacker.send(request)
    attacker.drain()


def wrong_passwords(port: int) -> None:
    for connection in range(20):
        attacker = Attacker(port, tls=True)
        with suppress(OSError):
            for n in range(100):
                guess = base64.b64encode(f"admin:guess-{connection}-{n}".encode())
                attacker.send(attacker.head(2 * n + 1, HEALTH.encode(), (b"authorization", b"Basic " + guess)))


FLOODS: list[Callable[[int], None]] = [
    echoes,
    resets,
    opened,
    parts_of_messages,
    unfinished_appends,
    pings,
    settings,
    headers_without_end,
    nothing_in_frames,
    stalled_readers,
    idle_connections,
    expressions,
]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while KEPT:
        KEPT.pop().socket.close()


def under(flood: Callable[[int], None], server: ServerProcess, uri: str, certificate: str | None = None) -> None:
    memory, cpu = resident_mb(server), cpu_seconds(server)
    with Honest(uri, certificate) as honest:
        with suppress(OSError):  # the server has ended the connection: that is its right
            flood(server.port)
        before = honest.answered
        while honest.error is None and honest.answered < before + 2:
            honest._stop.wait(0.05)
    assert honest.error is None
    assert resident_mb(server) - memory < MEMORY_MB
    assert cpu_seconds(server) - cpu < CPU_SECONDS


@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood.__name__)
def test_a_flood_leaves_the_server_to_its_honest_client(tmp_path: Path, flood: Callable[[int], None]) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(tmp_path / "log.db", "--limit", "connections=200"))
        client = stack.enter_context(EventStoreDBClient(server.uri))
        big = [NewEvent("T", b"x" * 100_000, content_type="application/octet-stream") for _ in range(8)]
        for n in range(30):
            client.append_to_stream(
                f"{'a' * 60}!{n}", current_version=StreamState.NO_STREAM, events=big, timeout=PATIENCE
            )
        under(flood, server, server.uri)


def test_wrong_passwords_leave_the_server_to_who_knows_the_right_one(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log.db", "--tls", users=f"admin:{PASSWORD}") as server:
        uri = f"esdb://admin:{PASSWORD}@localhost:{server.port}"
        certificate = (tmp_path / "log.db-tls" / "server.crt").read_text()
        with EventStoreDBClient(uri, root_certificates=certificate) as client:
            client.append_to_stream(
                "honest", current_version=StreamState.ANY, events=NewEvent("T", b"{}"), timeout=PATIENCE
            )
        under(wrong_passwords, server, uri, certificate)


def test_an_expression_that_backtracks_does_not_come_back_after_a_restart(tmp_path: Path) -> None:
    """As another server, or an older one, may have stored it in the register of groups."""
    with ServerProcess(tmp_path / "log.db") as server, EventStoreDBClient(server.uri) as client:
        client.append_to_stream(
            "a" * 60 + "!", current_version=StreamState.ANY, events=NewEvent("T", b"{}"), timeout=PATIENCE
        )
        client.create_subscription_to_all("g", filter_include=["^a"], filter_by_stream_name=True, timeout=PATIENCE)
        (stored,) = client.get_stream("$persistentSubscriptionConfig", timeout=PATIENCE)
        evil = NewEvent(stored.type, stored.data.replace(b'"^^a$"', b'"(a+)+$"'), content_type="application/json")
        assert evil.data != stored.data
        client.append_to_stream(
            "$persistentSubscriptionConfig", current_version=StreamState.ANY, events=evil, timeout=PATIENCE
        )
    with ServerProcess(tmp_path / "log.db") as server, EventStoreDBClient(server.uri) as client:
        client.append_to_stream(
            "a" * 60 + "!", current_version=StreamState.ANY, events=NewEvent("T", b"{}"), timeout=PATIENCE
        )
        client.delete_subscription("g", timeout=PATIENCE)
        assert cpu_seconds(server) < CPU_SECONDS
