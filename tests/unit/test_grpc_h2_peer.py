"""The client's side of gRPC against gRPC's own server, in this process and in one that is stopped."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tidings.stores.eventstoredb.grpc import Address, Connection
from tidings.stores.eventstoredb.grpc_call import CallFailed, ConnectionLost, Status

grpc = pytest.importorskip("grpc", reason="gRPC's own server is the peer: pip install 'tidings[eventstoredb]'")
aio: Any = pytest.importorskip("grpc.aio")

PATIENCE = 20.0
ROOT = Path(__file__).parents[2]


class Peer(grpc.GenericRpcHandler):  # type: ignore[misc, name-defined, unused-ignore] # gRPC has no types
    """gRPC methods on bytes; their names say what they do."""

    def __init__(self) -> None:
        self.release = asyncio.Event()

    def service(self, details: Any) -> Any:
        return {
            "/peer/count": grpc.unary_stream_rpc_method_handler(self.count),
            "/peer/echo": grpc.stream_stream_rpc_method_handler(self.echo),
            "/peer/refuse": grpc.unary_unary_rpc_method_handler(self.refuse),
            "/peer/wait": grpc.unary_stream_rpc_method_handler(self.wait),
        }.get(details.method)

    async def count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for number in range(int(request)):
            yield b"%d" % number

    async def echo(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    async def refuse(self, request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("exception", "not-leader"), ("leader-endpoint-port", "2113")))
        await context.abort(grpc.StatusCode.NOT_FOUND, "Leader info available ✓")
        return b""

    async def wait(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"begun"
        await self.release.wait()
        yield b"done"


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Any, Peer, int]]:
    server = aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 17 << 20)])
    peer = Peer()
    server.add_generic_rpc_handlers((peer,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with asyncio.timeout(PATIENCE):
            yield server, peer, port
    finally:
        await server.stop(None)


@asynccontextmanager
async def met() -> AsyncIterator[tuple[Connection, Any, Peer]]:
    async with served() as (server, peer, port):
        connection = await Connection.open(Address("127.0.0.1", port))
        try:
            yield connection, server, peer
        finally:
            await connection.close()


async def everything(connection: Connection, path: str, request: bytes) -> list[bytes]:
    got: list[bytes] = []
    with await connection.call(path) as call:
        call.send(request, end=True)
        while messages := await call.receive():
            got += messages
    return got


async def test_a_long_answer_comes_whole_and_in_order() -> None:
    async with met() as (connection, _, _):
        assert await everything(connection, "/peer/count", b"3000") == [b"%d" % number for number in range(3000)]
        assert await everything(connection, "/peer/count", b"0") == []


async def test_requests_and_answers_flow_at_the_same_time() -> None:
    sent = [b"%d" % number * 50 for number in range(2000)]
    async with met() as (connection, _, _):
        got: list[bytes] = []
        with await connection.call("/peer/echo") as call:
            for begin in range(0, len(sent), 100):
                call.send(*sent[begin : begin + 100])
                got += await call.receive()
            call.send(end=True)
            while messages := await call.receive():
                got += messages
        assert got == sent


async def test_a_large_message_goes_there_and_back() -> None:
    message = bytes(range(256)) * 20_000
    async with met() as (connection, _, _):
        assert await everything(connection, "/peer/echo", message) == [message]


async def test_calls_side_by_side_do_not_mix() -> None:
    async with met() as (connection, _, _):
        answers = await asyncio.gather(*(everything(connection, "/peer/count", b"%d" % n) for n in range(60)))
        assert [len(answer) for answer in answers] == list(range(60))


async def test_a_refusal_has_status_text_and_trailers() -> None:
    async with met() as (connection, _, _):
        with pytest.raises(CallFailed) as failed:
            await everything(connection, "/peer/refuse", b"")
        assert (failed.value.status, failed.value.details) == (Status.NOT_FOUND, "Leader info available ✓")
        assert failed.value.trailers["exception"] == "not-leader"
        assert failed.value.trailers["leader-endpoint-port"] == "2113"
        with pytest.raises(CallFailed) as unknown:
            await everything(connection, "/peer/unheard-of", b"")
        assert unknown.value.status is Status.UNIMPLEMENTED


async def test_a_server_that_stops_lets_the_call_finish_and_takes_no_new_one() -> None:
    async with met() as (connection, server, peer):
        with await connection.call("/peer/wait") as call:
            call.send(b"", end=True)
            assert await call.receive() == [b"begun"]
            stopping = asyncio.ensure_future(server.stop(PATIENCE))
            while not connection.leaving:
                await asyncio.sleep(0.01)
            with pytest.raises(ConnectionLost):
                await connection.call("/peer/count")
            peer.release.set()
            assert await call.receive() == [b"done"]
            assert await call.receive() == []
        await stopping


async def test_a_server_that_stops_at_once_fails_the_call() -> None:
    async with met() as (connection, server, _):
        with await connection.call("/peer/wait") as call:
            call.send(b"", end=True)
            assert await call.receive() == [b"begun"]
            await server.stop(None)
            with pytest.raises((CallFailed, ConnectionLost)):
                await call.receive()


# ---- a process that is stopped


async def serve() -> None:
    """The program of the other process."""
    async with served() as (_, _, port):
        print(port, flush=True)
        await asyncio.sleep(3600)


@pytest.fixture
def other() -> Any:
    """Yield the process and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.test_grpc_h2_peer"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    with process.stdout:
        yield process, int(process.stdout.readline())
    process.kill()
    process.wait()


async def test_a_stopped_process_is_noticed_and_a_new_connection_to_it_fails(
    other: tuple[subprocess.Popen[bytes], int],
) -> None:
    process, port = other
    connection = await Connection.open(Address("127.0.0.1", port), interval=0.2, patience=0.2)
    async with asyncio.timeout(PATIENCE):
        with await connection.call("/peer/wait") as call:
            call.send(b"", end=True)
            assert await call.receive() == [b"begun"]
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(ConnectionLost, match="nothing was heard"):
                await call.receive()
        # The kernel accepts for it.
        with pytest.raises(ConnectionLost, match="did not answer"):
            await Connection.open(Address("127.0.0.1", port), timeout=0.2)
        process.send_signal(signal.SIGCONT)
        again = await Connection.open(Address("127.0.0.1", port), timeout=PATIENCE)
        assert await everything(again, "/peer/count", b"2") == [b"0", b"1"]
        await again.close()
    await connection.close()


async def test_a_killed_process_is_noticed_at_once(other: tuple[subprocess.Popen[bytes], int]) -> None:
    process, port = other
    connection = await Connection.open(Address("127.0.0.1", port))
    async with asyncio.timeout(PATIENCE):
        with await connection.call("/peer/wait") as call:
            call.send(b"", end=True)
            assert await call.receive() == [b"begun"]
            process.kill()
            with pytest.raises(ConnectionLost, match="broke"):
                await call.receive()
    await connection.close()


if __name__ == "__main__":
    asyncio.run(serve())
