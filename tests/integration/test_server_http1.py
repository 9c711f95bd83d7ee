"""What containers, scripts and test tools poll: HTTP/1.1 on the port that speaks gRPC."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from http.client import HTTPConnection, HTTPSConnection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.integration.eventstoredb import opened
from tests.integration.server import connected
from tidings.server import EventStoreServer
from tidings.server.budgets import Limits
from tidings.server.http1 import HEAD, Site, spoken
from tidings.server.releases import EVENTSTOREDB, KURRENTDB

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.fixture
async def server() -> AsyncIterator[EventStoreServer]:
    async with EventStoreServer() as server:
        yield server


async def said(port: int, *pieces: bytes) -> bytes:
    """Send the pieces one by one. Return all that the server says until it ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(30):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            return await reader.read()
    finally:
        writer.close()


async def test_an_ordinary_client_is_told_that_the_server_lives(server: EventStoreServer) -> None:
    def ask(method: str, path: str) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
        try:
            connection.request(method, path, headers={"Accept": "*/*"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    asked = {
        path: await asyncio.to_thread(ask, "GET", path) for path in ("/health/live", "/ping", "/info", "/streams/a")
    }
    assert asked["/health/live"] == (204, b"")
    assert asked["/ping"][0] == 200
    assert json.loads(asked["/info"][1])["esVersion"] == EVENTSTOREDB.version
    assert asked["/streams/a"][0] == 404
    assert await asyncio.to_thread(ask, "HEAD", "/health/live") == (204, b"")
    assert await asyncio.to_thread(ask, "GET", "/health/live?liveCode=200") == (200, b"")
    assert (await asyncio.to_thread(ask, "POST", "/health/live"))[0] == 405
    assert (await asyncio.to_thread(ask, "HEAD", "/info"))[1] == b""


async def test_grpc_goes_on_beside_it(server: EventStoreServer) -> None:
    for _ in range(3):
        assert (await said(server.port, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")).startswith(b"HTTP/1.1 204")
        async with opened(server.port) as store:
            assert await store.head() >= 0
    async with asyncio.timeout(30):
        while server.treasury.bytes:  # the server hears a little later that a connection has ended
            await asyncio.sleep(0.01)


async def test_with_tls_nobody_needs_credentials_for_it() -> None:
    async with EventStoreServer(tls=True) as server:
        context = ssl.create_default_context(cafile=server.certificate)

        def ask(protocols: list[str]) -> int:
            context.set_alpn_protocols(protocols)
            connection = HTTPSConnection("localhost", server.port, context=context, timeout=30)
            try:
                connection.request("GET", "/health/live")
                return connection.getresponse().status
            finally:
                connection.close()

        for protocols in ([], ["http/1.1"]):
            assert await asyncio.to_thread(ask, protocols) == 204


async def test_a_request_may_come_in_pieces(server: EventStoreServer) -> None:
    request = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
    pieces = [request[at : at + 1] for at in range(len(request))]
    assert (await said(server.port, *pieces)).endswith(b'{"text": "Ping request successfully handled"}')


async def test_the_same_is_answered_over_http2(server: EventStoreServer) -> None:
    async with connected(server.port) as connection:
        number = connection._h2.get_next_available_stream_id()
        got: list[bytes] = []
        done = asyncio.Event()
        receive = connection.data_received

        def heard(data: bytes) -> None:
            got.append(data)
            receive(data)
            if b"Ping request" in b"".join(got):
                done.set()

        assert connection._transport is not None
        connection.data_received = heard  # type: ignore[method-assign]
        headers = [(":method", "GET"), (":scheme", "http"), (":path", "/ping"), (":authority", "x")]
        connection._h2.send_headers(number, headers, end_stream=True)
        connection._schedule()
        async with asyncio.timeout(30):
            await done.wait()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /" + b"x" * 2 * HEAD, b"431"),
        (b"GET /ping HTTP/3\r\n\r\n", b"400"),
        (b"GET  /ping HTTP/1.1\r\n\r\n", b"400"),
        (b"POST /ping HTTP/1.1\r\nContent-Length: 9\r\n\r\n123456789", b"405"),
        (b"GET /../../etc/passwd HTTP/1.0\r\n\r\n", b"404"),
    ],
)
async def test_a_request_that_is_none_is_refused(server: EventStoreServer, request_: bytes, status: bytes) -> None:
    assert (await said(server.port, request_)).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("beginning", [b"", b"G", b"GET /ping HT"])
async def test_who_does_not_finish_a_request_is_sent_away(beginning: bytes) -> None:
    async with EventStoreServer(limits=Limits(handshake_seconds=0.5)) as server:
        assert b"no request came in time" in await said(server.port, beginning)


def test_a_few_bytes_tell_what_a_client_speaks() -> None:
    assert [spoken(PREFACE[:count]) for count in (0, 1, 2, 4, 24)] == [None, None, False, False, False]
    assert [spoken(b"GET / HTTP/1.1"[:count]) for count in (1, 3, 4, 9)] == [None, None, True, True]
    assert spoken(b"\x16\x03\x01") is False


@given(st.binary(max_size=300))
def test_whatever_comes_is_answered_or_waited_for(data: bytes) -> None:
    site = Site(KURRENTDB, users=True)
    for request in (data, b"GET " + data, b"GET /info HTTP/1.1\r\n" + data + b"\r\n\r\n"):
        answer = site.respond(request)
        assert answer is None or answer.startswith(b"HTTP/1.1 ")
    assert b'"dbVersion": "26.1.0"' in (site.respond(b"GET /info HTTP/1.1\r\n\r\n") or b"")
