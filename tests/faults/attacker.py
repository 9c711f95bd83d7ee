"""Who attacks `tidings server`, frame by frame, and the honest client beside him; what a server costs."""

from __future__ import annotations

import os
import re
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from esdbclient import EventStoreDBClient, NewEvent, StreamState
from hpack import Encoder
from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame, SettingsFrame

from tests.integration.server import ServerProcess
from tidings.server.protocol import shared, streams

__all__ = ["HEALTH", "KEPT", "PATIENCE", "PREFACE", "Attacker", "Honest", "cpu_seconds", "read_request", "resident_mb"]

PATIENCE = 30
"""Seconds within which an honest client is answered."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEALTH = "/grpc.health.v1.Health/Check"


KEPT: list[Attacker] = []
"""Connections that last as long as the test."""


class Attacker:
    """One connection without a client library, which sends what it is told to, and reads nothing unless asked."""

    def __init__(self, port: int, *, tls: bool = False, window: int = 2**31 - 1) -> None:
        self.socket: socket.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.set_alpn_protocols(["h2"])
            self.socket = context.wrap_socket(self.socket)
        KEPT.append(self)
        self._encoder = Encoder()
        self.send(PREFACE + SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: window}).serialize())

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def head(self, number: int, path: bytes = HEALTH.encode(), *more: tuple[bytes, bytes], ends: bool = True) -> bytes:
        fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"x"), (b":path", path)]
        block = self._encoder.encode([*fields, (b"content-type", b"application/grpc"), *more], huffman=False)
        frame = HeadersFrame(number, data=block[:16_000], flags=["END_STREAM"] if ends else [])
        frames = [
            frame,
            *(ContinuationFrame(number, data=block[at : at + 16_000]) for at in range(16_000, len(block), 16_000)),
        ]
        frames[-1].flags.add("END_HEADERS")
        return b"".join(each.serialize() for each in frames)

    def request(self, number: int, path: bytes, body: bytes, *, size: int = -1, ends: bool = True) -> bytes:
        """One message, or the beginning of one of `size` bytes."""
        data = b"\0" + (len(body) if size < 0 else size).to_bytes(4, "big") + body
        frames = [
            DataFrame(
                number, data=data[at : at + 16_000], flags=["END_STREAM"] if ends and at + 16_000 >= len(data) else []
            )
            for at in range(0, len(data), 16_000)
        ]
        return self.head(number, path, ends=False) + b"".join(frame.serialize() for frame in frames)

    def drain(self) -> None:
        self.socket.setblocking(False)
        with suppress(BlockingIOError, ssl.SSLWantReadError):
            while self.socket.recv(1 << 20):
                pass
        self.socket.settimeout(PATIENCE)


def read_request(**more: Any) -> bytes:
    options = streams.ReadReq.Options(
        all=streams.ReadReq.Options.AllOptions(start=shared.Empty()),
        count=2**63 - 1,
        uuid_option=streams.ReadReq.Options.UUIDOption(string=shared.Empty()),
        **(more or {"no_filter": shared.Empty()}),
    )
    data: bytes = streams.ReadReq(options=options).SerializeToString()
    return data


# ---- the server and its honest client ------------------------------------------------


def resident_mb(server: ServerProcess) -> float:
    assert server.process is not None
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def cpu_seconds(server: ServerProcess) -> float:
    assert server.process is not None
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Honest:
    """A client that appends and reads, again and again, on a new connection each time."""

    def __init__(self, uri: str, certificate: str | None) -> None:
        self._uri, self._certificate = uri, certificate
        self.answered = 0
        self.slowest = 0.0
        """Seconds that the slowest of its rounds took."""
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._stop.is_set() or not self.answered:
                began = monotonic()
                with EventStoreDBClient(self._uri, root_certificates=self._certificate) as client:
                    client.append_to_stream(
                        "honest", current_version=StreamState.ANY, events=NewEvent("T", b"{}"), timeout=PATIENCE
                    )
                    assert client.get_stream("honest", backwards=True, limit=1, timeout=PATIENCE)
                self.answered += 1
                self.slowest = max(self.slowest, monotonic() - began)
        except Exception as error:
            self.error = error

    def __enter__(self) -> Honest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(3 * PATIENCE)
