"""Whatever a URL in the environment says, it leads somewhere or is a `ConfigurationError` that keeps its secret."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pamqp import commands, frame

from tidings.adapters import open_bus, open_store
from tidings.buses.rabbitmq.address import address_of
from tidings.database.engine import connected
from tidings.errors import ConfigurationError, StoreUnavailable
from tidings.settings import Settings

T = TypeVar("T")

SECRET = "s3CReT"
pieces = st.sampled_from(
    [
        "@",
        ":",
        "/",
        "//",
        "?",
        "&",
        "=",
        "#",
        "%",
        "%2F",
        "%00",
        "%zz",
        "[",
        "]",
        "::1",
        ",",
        ".",
        "..",
        " ",
        "\x00",
        "\n",
    ]
) | st.text(max_size=4)
texts = st.lists(pieces, max_size=5).map("".join)
odd = texts | st.characters(categories=["Cs"]) | st.sampled_from(["a" * 64, "a" * 300, "é" * 200, "host"])


def urls(schemes: list[str], options: list[str]) -> st.SearchStrategy[str]:
    option = st.tuples(st.sampled_from(options) | texts, odd).map("=".join)
    query = st.lists(option, max_size=3).map("&".join)
    whole = st.tuples(st.sampled_from(schemes), odd, odd, odd, odd, query)
    return (
        # Not begun with '/': of an embedded store all of it would be a path, which is no secret.
        whole.map(lambda p: f"{p[0]}://{p[1].lstrip('/')}:{SECRET}{p[2]}@{p[3]}/{p[4]}?{p[5]}")
        | texts
        | st.tuples(st.sampled_from(schemes), texts).map("://".join)
    )


def refused_safely(attempt: Callable[[], T]) -> T | None:
    """Return the result, or None if it was refused. Asserts that the error does not contain the password."""
    refusal = None
    try:
        return attempt()
    except ConfigurationError as error:
        refusal = f"{error} {error.__cause__}"
    assert SECRET.lower() not in refusal.lower()
    return None


def opens(opening: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
    async def work() -> None:
        async with opening():
            pass

    asyncio.run(work())


@given(urls(["amqp", "amqps", "AMQP"], ["heartbeat", "cafile", "certfile", "keyfile", "verify", "insecure"]))
@example("amqp://a..b/")
@example("amqp://.host/")
@example("amqp://host/" + "v" * 256)
@example("amqp://host/\udcff")
@example("amqp://ho\x00st/")
@example("amqp://" + "a" * 64)
@example("amqp://%00:%00@host/%00")
@settings(deadline=None)
def test_an_amqp_url_is_an_address_that_can_be_connected_to_or_refused(url: str) -> None:
    address = refused_safely(lambda: address_of(url))
    if address is None:
        return
    for node in address.each():
        assert node.host.encode("idna"), "the resolver can take it"
        assert 0 < node.port < 65536
        assert SECRET not in f"{node} {node!r}" or SECRET in node.host + node.vhost + node.user
    assert 1 <= address.heartbeat <= 60
    assert frame.marshal(commands.Connection.Open(virtual_host=address.vhost), 0)
    login = commands.Connection.StartOk({}, mechanism="PLAIN", response=f"\0{address.user}\0{address.password}")
    assert frame.marshal(login, 0)


@given(
    urls(
        ["esdb", "esdb+discover", "ESDB", "kurrentdb", "kdb+discover", "KDB"],
        ["Tls", "tlsCaFile", "TlsVerifyCert", "DefaultDeadline", "KeepAliveInterval", "UserCertFile", "NodePreference"],
    )
)
@example("esdb://[::1/?tls=false")
@example("esdb://a,b:x?tls=false")
@example("esdb://host?tls=false&DefaultDeadline=99999999999999999999")
@example("esdb://host?tls=false&DefaultDeadline=-1")
@example("esdb://host?tls=false&KeepAliveInterval=0")
@example("esdb://ho\x00st?tls=false")
@example("esdb://host:99999?tls=false")
@example("kurrentdb+discover://[::1/?tls=false")
@settings(deadline=None, max_examples=60)
def test_an_esdb_url_opens_or_is_refused(url: str) -> None:
    refused_safely(lambda: opens(lambda: open_store(url)))


@given(
    urls(["postgresql+asyncpg", "mysql", "nothing"], ["mode"])
    | st.tuples(st.sampled_from(["sqlite", "sqlite+tidings", "sqlite+aiosqlite"]), odd).map("://".join)
)
@example(f"postgresql+asyncpg://me:x@:{SECRET}@host/db")
@example("sqlite+tidings:///file.db")
@settings(deadline=None, max_examples=60)
def test_a_database_url_makes_an_engine_or_is_refused(url: str) -> None:
    """Prevent connections."""
    refused_safely(lambda: opens(lambda: connected(url)))


@given(urls(["sqlite", "memory", "amqp", "esdb", "http", ""], ["a"]), st.sampled_from(["store", "bus", "database"]))
@settings(deadline=None)
def test_settings_take_or_refuse_any_text(url: str, name: str) -> None:
    assert SECRET not in repr(refused_safely(lambda: Settings.model_validate({name: url})))


@given(name=texts)
@settings(deadline=None, max_examples=50)
def test_a_name_in_memory_opens_or_is_refused(name: str) -> None:
    refused_safely(lambda: opens(lambda: open_bus(f"memory://{name}")))
    refused_safely(lambda: opens(lambda: open_store(f"memory://{name}")))


@pytest.mark.parametrize("path", ["\x00", "a\x00b", "/" + "x" * 300, "no/such/folder/x.db", "."])
def test_a_file_that_cannot_be_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigurationError, StoreUnavailable)):
        opens(lambda: open_store(f"sqlite:///{path}"))
    assert list(tmp_path.iterdir()) == []
