"""The EventStoreDB adapter with TLS and users: what it needs, and what it says when something of that is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.integration.eventstoredb import PATIENCE, many
from tidings.adapters import open_store
from tidings.errors import ConfigurationError, StoreUnavailable, StreamDeleted, StreamForbidden
from tidings.server import EventStoreServer
from tidings.stores import EventStore
from tidings.testing.store_conformance import closing, events, numbers, read, take

SECRET = "p@ss/w%rd:é"


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[EventStore]:
    async with asyncio.timeout(PATIENCE), open_store(url) as store:
        yield store


@pytest.fixture
async def server() -> AsyncIterator[EventStoreServer]:
    async with EventStoreServer(tls=True, users={"admin": SECRET, "clerk": "12345678"}) as server:
        yield server


def url(server: EventStoreServer, user: str = "admin", password: str = SECRET, **options: object) -> str:
    chosen = {"TlsCaFile": server.certificate, "DefaultDeadline": 5} | options
    query = "&".join(f"{name}={value}" for name, value in chosen.items() if value is not None)
    return f"esdb://{user}:{quote(password, safe='')}@localhost:{server.port}?{query}"


async def test_everything_works_over_tls(server: EventStoreServer) -> None:
    async with opened(url(server)) as store:
        assert (await store.append("s", events(0, 1))).version == 1
        assert await read(store, "s") == [(0, 0), (1, 1)]
        async with closing(store.subscribe_stream("s")) as source:
            assert numbers(await take(source, many(2))) == [0, 1]
        await store.tombstone("s")
        with pytest.raises(StreamDeleted):
            await read(store, "s")


@pytest.mark.parametrize("scheme", ["kurrentdb", "kdb", "KurrentDB", "kurrentdb+discover", "kdb+discover"])
async def test_the_schemes_of_kurrentdb_lead_to_the_same_store(server: EventStoreServer, scheme: str) -> None:
    async with opened(url(server)) as store, opened(url(server).replace("esdb", scheme, 1)) as same:
        await store.append("s", events(0, 1))
        assert await read(same, "s") == [(0, 0), (1, 1)]
        assert await same.log_id() == await store.log_id()


async def test_a_forbidden_stream_is_named_and_other_streams_are_not_concerned(server: EventStoreServer) -> None:
    """This is not an outage of the store: waiting would not help."""
    async with opened(url(server)) as admin, opened(url(server, user="clerk", password="12345678")) as store:
        for name in ("locked", "free"):
            await admin.append(name, events(0))
        await admin.set_metadata("locked", {"$acl": {"$w": ["admin"], "$d": ["admin"], "$r": ["admin"]}})
        uses = (
            lambda name: store.append(name, events(1)),
            lambda name: store.append(name, events(1), expected=0),
            lambda name: read(store, name),
        )
        for use in uses:
            with pytest.raises(StreamForbidden, match=r"stream 'locked'.*\$acl") as caught:
                await use("locked")
            assert caught.value.stream == "locked"
            assert not caught.value.waiting_helps
        assert (await store.append("free", events(1))).version == 1
        assert len(await read(store, "free")) == 2


async def test_who_may_not_read_the_whole_log_is_told_so_and_may_append(server: EventStoreServer) -> None:
    async with opened(url(server, user="clerk", password="12345678")) as store:
        assert (await store.append("s", events(0))).version == 0
        assert await read(store, "s") == [(0, 0)]
        for use in (store.head(), take(store.read_all(), many(1)), take(store.subscribe_all(), many(1))):
            with pytest.raises(StoreUnavailable, match=r"denies user 'clerk'.*only administrators read"):
                await use


async def refused(store_url: str, says: str) -> None:
    """Assert that reading and appending raise this at once, without the password."""
    began = asyncio.get_running_loop().time()
    async with opened(store_url) as store:
        for use in (store.head(), store.append("s", events(0)), read(store, "s"), store.delete("s"), store.log_id()):
            with pytest.raises(StoreUnavailable, match=says) as unavailable:
                await use
            assert SECRET not in str(unavailable.value)
            assert "wrong-one" not in str(unavailable.value)
    assert asyncio.get_running_loop().time() - began < PATIENCE / 2


async def test_a_wrong_password_or_user_is_named(server: EventStoreServer) -> None:
    await refused(url(server, password="wrong-one"), "rejects user 'admin': check user and password")
    await refused(url(server, user="nobody", password="wrong-one"), "rejects user 'nobody'")


async def test_a_certificate_that_is_not_trusted_is_named(server: EventStoreServer) -> None:
    await refused(url(server, TlsCaFile=None), "certificate is refused.*tlsCaFile")


async def test_another_host_than_the_certificate_is_for_is_named(server: EventStoreServer) -> None:
    async with EventStoreServer(tls=True, users={"admin": SECRET}) as other:
        await refused(url(server, TlsCaFile=other.certificate), "certificate is refused")


async def test_a_host_that_the_certificate_does_not_name_is_named(server: EventStoreServer) -> None:
    """The certificate is for localhost and 127.0.0.1; 127.0.0.2 is the same machine."""
    async with EventStoreServer(host="0.0.0.0", tls=True, users={"admin": SECRET}) as everywhere:
        elsewhere = url(everywhere).replace("@localhost", "@127.0.0.2")
        await refused(elsewhere, "certificate is refused.*its host must be one that the certificate is for")


async def test_tls_on_one_side_only_is_named(server: EventStoreServer) -> None:
    async with opened(f"esdb://localhost:{server.port}?Tls=false&DefaultDeadline=60") as store, asyncio.timeout(20):
        with pytest.raises(StoreUnavailable, match=r"wants TLS .* leave tls=false out of TIDINGS_STORE"):
            await store.head()
    async with EventStoreServer() as plain, opened(f"esdb://a:b@localhost:{plain.port}?DefaultDeadline=1") as store:
        with pytest.raises(StoreUnavailable, match=f"localhost:{plain.port}"):
            await store.head()


@pytest.mark.parametrize("answers", [True, False], ids=["it hangs up", "it says nothing"])
async def test_a_server_that_says_nothing_of_tls_is_asked_whether_it_wants_it(
    server: EventStoreServer, answers: bool
) -> None:
    handshake = b"\x16"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(1)
        if first == handshake:
            inner, outer = await asyncio.open_connection("localhost", server.port)
            outer.write(first + await reader.read(1 << 16))
            writer.write(await inner.read(1 << 16))
            outer.close()
        elif not answers:
            await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as front:
        port = front.sockets[0].getsockname()[1]
        async with opened(f"esdb://127.0.0.1:{port}?Tls=false&DefaultDeadline=3") as store, asyncio.timeout(20):
            with pytest.raises(StoreUnavailable, match="wants TLS"):
                await store.head()


@pytest.mark.parametrize(
    ("store_url", "says"),
    [
        ("esdb://host:2113", "Username and password are required"),
        ("esdb://host:2113?Tls=maybe", "maybe"),
        ("esdb://a:b@host:2113?TlsVerifyCert=false", "always verified"),
        ("esdb://a:b@host:2113?tls=true&tlsverifycert=False&TlsVerifyCert=true", "always verified"),
        ("esdb+discover://a:b@host?tlsVerifyCert=", "always verified"),
        ("esdb://host:2113?Tls=false&Unknown=1", "UNKNOWN"),
        ("esdb://?Tls=false", "No targets"),
        ("esdb+discover://a,b?Tls=false", "More than one target"),
        ("esdb://host?Tls=false&NodePreference=follower", "NodePreference"),
        (f"esdb://admin:{quote(SECRET, safe='')}@host?TlsCaFile=/nowhere/ca.pem", "/nowhere/ca.pem"),
        (f"esdb://admin:{quote(SECRET, safe='')}@host?Tls=maybe", "maybe"),
        ("kurrentdb://host:2113", "Username and password are required"),
        ("kdb+discover://a,b?Tls=false", "More than one target"),
        (f"kdb://admin:{quote(SECRET, safe='')}@host?Tls=maybe", "maybe"),
        (f"kurrentdb://admin:{SECRET}@host", "in user and password write"),
    ],
)
async def test_a_url_that_cannot_be_meant_is_refused_when_it_is_opened(store_url: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as refusal:
        async with open_store(store_url):
            raise AssertionError("it was opened")
    assert quote(SECRET, safe="") not in str(refusal.value)
    assert SECRET not in str(refusal.value)


async def test_an_authority_file_that_holds_no_certificate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(ConfigurationError, match="certificate files cannot be used"):
        async with open_store(f"esdb://a:b@host?TlsCaFile={tmp_path}/ca.pem"):
            raise AssertionError("it was opened")
