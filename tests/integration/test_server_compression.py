"""Requests that are compressed, as clients of other languages send them, and those that would unpack to too much."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integration.server import STREAMS, appends
from tidings.server import EventStoreServer
from tidings.server.budgets import Allowance, Charge, Limits, Treasury
from tidings.server.calls import FRAME_LIMIT
from tidings.server.compression import STEP, Compressed, unpacked
from tidings.server.protocol import streams
from tidings.server.refusals import Refusal, Status
from tidings.stores.eventstoredb.records_messages import MESSAGES, PACKAGE

grpc: Any = pytest.importorskip("grpc", reason="pip install 'tidings[eventstoredb]'")

MIB = 1024 * 1024


def charge() -> Charge:
    return Charge(Allowance(Treasury(Limits())))


def unpack(data: bytes, encoding: str, longest: int = FRAME_LIMIT) -> bytes:
    return asyncio.run(unpacked(Compressed(data), encoding, longest, charge()))


@settings(deadline=None)
@given(st.binary(max_size=50), st.sampled_from([0, 1, STEP - 1, STEP, STEP + 1, 300_000]), st.booleans())
def test_what_was_packed_is_unpacked(beginning: bytes, more: int, zeros: bool) -> None:
    data = beginning + (bytes(more) if zeros else (b"a%d" * more)[:more])
    assert unpack(gzip.compress(data), "gzip") == data
    assert unpack(zlib.compress(data), "deflate") == data


def test_much_that_hardly_shrinks_is_unpacked() -> None:
    data = bytes(number * 7919 % 251 for number in range(500_000)) + zlib.compress(bytes(range(256)) * 999)
    assert unpack(gzip.compress(data, 0), "gzip") == data


@given(st.binary(max_size=200), st.sampled_from(["gzip", "deflate"]))
def test_what_is_not_packed_is_refused(data: bytes, encoding: str) -> None:
    with pytest.raises(Refusal) as refused:
        unpack(data, encoding)
    assert refused.value.code is Status.INTERNAL


@pytest.mark.parametrize("cut", [1, 8, 9, 20])
def test_what_ends_too_early_or_goes_on_is_refused(cut: int) -> None:
    packed = gzip.compress(bytes(range(200)) * 9)
    for wrong in (packed[:-cut], packed + b"x" * cut, packed + b"x" * 2 * STEP):
        with pytest.raises(Refusal) as refused:
            unpack(wrong, "gzip")
        assert refused.value.code is Status.INTERNAL


@pytest.mark.parametrize(("encoding", "code"), [("", "INTERNAL"), ("identity", "INTERNAL"), ("br", "UNIMPLEMENTED")])
def test_an_encoding_that_is_none_is_refused(encoding: str, code: str) -> None:
    with pytest.raises(Refusal) as refused:
        unpack(gzip.compress(b"{}"), encoding)
    assert refused.value.code is Status[code]


async def test_a_small_request_that_unpacks_to_much_is_refused_before_it_is_unpacked_whole() -> None:
    bomb = Compressed(gzip.compress(bytes(64 * MIB)))
    asked = charge()
    with pytest.raises(Refusal, match="larger than max") as refused:
        await unpacked(bomb, "gzip", MIB, asked)
    assert refused.value.code is Status.RESOURCE_EXHAUSTED
    assert asked.bytes <= MIB


async def test_what_is_unpacked_counts_against_the_budgets() -> None:
    asked = charge()
    asked.hold(asked.allowance.limits.connection_bytes - 4 * MIB)
    before = asked.bytes
    assert len(await unpacked(Compressed(gzip.compress(bytes(3 * MIB))), "gzip", FRAME_LIMIT, asked)) == 3 * MIB
    assert asked.bytes == before + 3 * MIB
    with pytest.raises(Refusal, match="connection_bytes") as refused:
        await unpacked(Compressed(gzip.compress(bytes(3 * MIB))), "gzip", FRAME_LIMIT, asked)
    assert refused.value.code is Status.RESOURCE_EXHAUSTED


@asynccontextmanager
async def server_call(port: int, kind: Any) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", compression=kind) as channel:
        yield channel.stream_unary(f"{STREAMS}/Append")


@pytest.mark.parametrize("kind", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_grpcs_own_client_may_compress(kind: Any) -> None:
    async with EventStoreServer() as server, server_call(server.port, kind) as append:
        for size in (10, 100_000, 900_000):
            answer = await append(iter(appends("s", b"x" * size, b"{}")))
            assert streams.AppendResp.FromString(answer).HasField("success")
        assert server.treasury.bytes < MIB, "what was unpacked is no longer counted"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await append(iter([bytes(FRAME_LIMIT + 1)]))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# ---- what a request becomes when it is parsed

RECORDS = f"/{PACKAGE}.StreamsService/AppendRecords"


def field(number: int, content: bytes) -> bytes:
    """A field of a message that is bytes, a text or another message."""
    size, length = len(content), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


EMPTY = 3_000_000
NULLS = field(6, field(1, b"\x08\0") * 1_000_000)


@pytest.mark.parametrize(
    ("release", "path", "bomb"),
    [
        ("eventstoredb-24.2", f"{STREAMS}/BatchAppend", field(3, b"") * EMPTY),
        ("eventstoredb-24.2", f"{STREAMS}/Append", field(2, field(2, b"") * EMPTY)),
        ("kurrentdb-26.1", RECORDS, field(1, b"") * EMPTY),
        ("kurrentdb-26.1", RECORDS, field(1, field(2, b"") * EMPTY)),
        ("kurrentdb-26.1", RECORDS, field(1, field(2, field(2, NULLS)))),
    ],
    ids=["events", "metadata", "records", "properties", "a list of nulls"],
)
async def test_a_request_that_would_become_much_is_refused_before_it_is_parsed(
    release: str, path: str, bomb: bytes
) -> None:
    async with (
        EventStoreServer(release=release) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", compression=grpc.Compression.Gzip) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="connection_bytes") as refused:
            await channel.stream_unary(path)(iter([bomb]))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert server.treasury.refused["connection_bytes"] == 1
        async with asyncio.timeout(30):
            while server.treasury.bytes:
                await asyncio.sleep(0.01)


async def test_many_small_records_are_refused_when_as_many_were_built_as_an_append_may_have() -> None:
    """Their sum is looked at while they are built: it takes their bytes, and no more time for those that follow."""
    record = MESSAGES["AppendRecord"](stream="s", schema={"name": "T", "format": 1})
    request = MESSAGES["AppendRecordsRequest"](records=[record] * 60_000).SerializeToString()
    async with (
        EventStoreServer(release="kurrentdb-26.1") as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", compression=grpc.Compression.Gzip) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="and 20971520 is the most") as refused:
            await channel.unary_unary(RECORDS)(request)
    size = int(str(refused.value.details()).split()[3])
    assert size < 20971520 + 1000, "not all of them were built"


async def test_a_large_append_of_many_records_is_taken() -> None:
    schema = {"name": "OrderCreated", "format": 1}
    records = [MESSAGES["AppendRecord"](stream="s", data=bytes(2000), schema=schema) for _ in range(7_500)]
    for record in records:
        for key in ("$correlation-id", "$causation-id", "tenant"):
            record.properties.add(key=key).value.string_value = "x" * 36
    request = MESSAGES["AppendRecordsRequest"](records=records).SerializeToString()
    async with (
        EventStoreServer(release="kurrentdb-26.1") as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        answer = await channel.unary_unary(RECORDS)(request)
        assert MESSAGES["AppendRecordsResponse"].FromString(answer).revisions[0].revision == 7_499
