"""The URL of a log in PostgreSQL: each host on its own, with the options that its driver knows."""

from __future__ import annotations

import pytest

from tidings.errors import ConfigurationError
from tidings.stores.postgresql.addresses import addresses_of

NAME = "application_name=tidings"


@pytest.mark.parametrize(
    ("url", "dsns"),
    [
        ("postgres://me:x@one/db", [f"postgresql://me:x@one/db?{NAME}"]),
        ("postgresql:///db", [f"postgresql:///db?{NAME}"]),
        (
            "postgresql+asyncpg://me:x@one:1,[::1]:2,three/db?connect_timeout=3&ssl=require",
            [f"postgresql://me:x@{host}/db?{NAME}&sslmode=require" for host in ("one:1", "[::1]:2", "three")],
        ),
        ("postgresql://me:x@one,/db", [f"postgresql://me:x@one/db?{NAME}"]),
        (
            "postgresql://me:x@/db?host=one,two&port=1,2",
            [f"postgresql://me:x@/db?{NAME}&host={host}&port={port}" for host, port in (("one", 1), ("two", 2))],
        ),
        (
            "postgresql://me:x@/db?host=one:1&host=two:2",
            [f"postgresql://me:x@/db?{NAME}&host={host}" for host in ("one%3A1", "two%3A2")],
        ),
        (
            "postgresql://me:x@/db?host=one,two&port=9",
            [f"postgresql://me:x@/db?{NAME}&host={host}&port=9" for host in ("one", "two")],
        ),
    ],
)
def test_each_host_of_a_url_has_a_url_of_its_own(url: str, dsns: list[str]) -> None:
    found = addresses_of(url)
    assert [host.dsn for host in found.hosts] == dsns
    assert not [host.shown for host in found.hosts if ":x@" in host.shown]


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("mysql://host/db", "names no PostgreSQL"),
        ("postgresql://me:x@/db?host=one,two&port=1,2,3", "one port for each host"),
        ("postgresql://me:x@/db?host=,", "names 0 hosts"),
        ("postgresql://me:x@host/db?channel_binding=require", "channel_binding=prefer"),
        ("postgresql://me:x@host/db?gssencmode=require", "gssencmode=prefer"),
    ],
)
def test_a_url_that_demands_what_cannot_be_done_is_refused(url: str, remedy: str) -> None:
    with pytest.raises(ConfigurationError, match=remedy) as refusal:
        addresses_of(url)
    assert ":x@" not in str(refusal.value)
