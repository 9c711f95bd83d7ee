"""The pytest plugin `tidings`, found by its entry point. pytest loads it in every run, so it imports nothing heavy.

Its fixtures give servers: `rabbitmq_url`, `postgresql_url`, `eventstoredb_url`. They need no other plugin, and work in
tests of any kind. A test that asks for a server that cannot be had is skipped, and the end of the run says so. A test
that states something with `given` and compares nothing fails.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import pytest

from tidings.testing.plugin.worlds import pytest_addoption, pytest_configure, pytest_unconfigure

if TYPE_CHECKING:
    from tidings.testing.brokers import RabbitMQ
    from tidings.testing.databases import PostgreSQL
    from tidings.testing.event_stores import EventStoreDB

__all__ = [
    "pytest_addoption",
    "pytest_configure",
    "pytest_unconfigure",
    "eventstoredb_url",
    "postgresql_url",
    "pytest_runtest_call",
    "pytest_terminal_summary",
    "rabbitmq_url",
    "tidings_eventstoredb",
    "tidings_postgresql",
    "tidings_rabbitmq",
]

_UNCHECKED = "tidings.testing.scenario.unchecked"
_MISSING = " for tests: "
"""Part of each reason for which `tidings.testing` skips a test: "no RabbitMQ for tests: install one"."""


def _entered(manager: AbstractAsyncContextManager[str]) -> Iterator[str]:
    """Enter it for a test in a loop of its own: so a fixture needs no plugin for async ones."""
    from tidings._support.holding import held

    with held(manager, "tidings-fixture") as (value, _):
        yield value


@pytest.fixture(scope="session")
def tidings_rabbitmq() -> Iterator[RabbitMQ]:
    """The broker that the tests of this process share, started by the first test that asks for it. Do not harm it."""
    from tidings.testing.brokers import rabbitmq_for_tests

    with rabbitmq_for_tests() as broker:
        yield broker


@pytest.fixture
def rabbitmq_url(tidings_rabbitmq: RabbitMQ) -> Iterator[str]:
    """The URL, for `TIDINGS_BUS`, of a vhost without queues, for one test."""
    yield from _entered(tidings_rabbitmq.isolated())


@pytest.fixture(scope="session")
def tidings_postgresql() -> Iterator[PostgreSQL]:
    """The server that the tests of this process share, started by the first test that asks for it. Do not harm it."""
    from tidings.testing.databases import postgresql_for_tests

    with postgresql_for_tests() as server:
        yield server


@pytest.fixture
def postgresql_url(tidings_postgresql: PostgreSQL) -> Iterator[str]:
    """The URL, for `TIDINGS_DATABASE`, of a database without tables, for one test."""
    yield from _entered(tidings_postgresql.isolated())


@pytest.fixture(scope="session")
def tidings_eventstoredb() -> Iterator[EventStoreDB]:
    """The event store that the tests of this process share, or `tidings server`, of which each test has its own."""
    from tidings.testing.event_stores import eventstoredb_for_tests

    with eventstoredb_for_tests() as store:
        yield store


@pytest.fixture
def eventstoredb_url(tidings_eventstoredb: EventStoreDB) -> Iterator[str]:
    """The URL, for `TIDINGS_STORE`, of an event store for one test. On a real one tests share the log."""
    yield from _entered(tidings_eventstoredb.isolated())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Fail a test that has passed without comparing what came of a decision, or without running a handler."""
    module = sys.modules.get(_UNCHECKED)
    if module is not None:
        module.left()
    result = yield
    module = sys.modules.get(_UNCHECKED)
    if module is not None and (left := module.left()):
        pytest.fail("\n".join(left), pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which servers were missing, and how many tests were skipped for that."""
    reasons = Counter[str]()
    for report in terminalreporter.stats.get("skipped", ()):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if reason.startswith("Skipped: no ") and _MISSING in reason:
            reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section("tidings: servers that tests asked for", yellow=True)
        for reason, number in sorted(reasons.items()):
            terminalreporter.write_line(f"{number} skipped: {reason}", yellow=True)
