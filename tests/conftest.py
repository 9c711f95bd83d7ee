"""Servers for tests, beside those of the plugin `tidings`. A test of RabbitMQ takes `amqp_url`, one of PostgreSQL
`postgresql_url`; one that harms its broker takes `rabbitmq_node`, one that harms its database `postgresql_server`."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import Final

import pytest
import structlog
from hypothesis import HealthCheck, settings

import tidings.testing.plugin
from tests.clients import CLIENTS, through
from tidings.testing.brokers import RabbitMQ, RabbitMQNode, node_for_tests, rabbitmq_for_tests
from tidings.testing.databases import PostgreSQLServer, server_for_tests

# A busy machine takes its time over an example, and over thinking of one: that is nobody's failure.
settings.register_profile("tidings", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tidings")

WITHOUT_DEPRECATED: Final = (
    {f"deprecated_features.permit.{name}": "false" for name in ("global_qos", "transient_nonexcl_queues")}
    if os.environ.get("TIDINGS_TEST_RABBITMQ_RELEASE")
    else {}
)
"""Settings with which RabbitMQ 4 refuses what it means to remove. Tidings uses none of it."""


def pytest_configure(config: pytest.Config) -> None:
    """Have the plugin also where Tidings was installed before it had one."""
    if not config.pluginmanager.has_plugin("tidings"):
        config.pluginmanager.register(tidings.testing.plugin, "tidings")


@pytest.fixture(autouse=True)
def _log_of_the_process() -> Iterator[None]:
    """Restore the configuration of structlog, which a runtime sets if nothing else did."""
    configured = structlog.is_configured()
    yield
    if not configured:
        structlog.reset_defaults()


@pytest.fixture(scope="session")
def tidings_rabbitmq() -> Iterator[RabbitMQ]:
    """As the plugin's, but RabbitMQ 4 refuses what it means to remove."""
    with rabbitmq_for_tests(WITHOUT_DEPRECATED) as broker:
        yield broker


@pytest.fixture
def amqp_url(rabbitmq_url: str) -> str:
    """The URL of a vhost without queues, for one test, on the shared broker."""
    return rabbitmq_url


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> str:
    """The AMQP client that a test's services use: the test runs once with each."""
    return str(request.param)


@pytest.fixture
def bus_url(amqp_url: str, client: str) -> str:
    """As `amqp_url`, once for each client."""
    return through(amqp_url, client)


@pytest.fixture(scope="module")
def rabbitmq_node() -> Iterator[RabbitMQNode]:
    """A node for one test module, to stop, kill, pause and starve. Leave it running and without alarms."""
    with node_for_tests({"max_message_size": "1048576"} | WITHOUT_DEPRECATED) as node:
        yield node


@pytest.fixture
async def harmed_url(rabbitmq_node: RabbitMQNode) -> AsyncIterator[str]:
    """The URL of a vhost for one test on `rabbitmq_node`."""
    async with rabbitmq_node.isolated() as url:
        yield url


@pytest.fixture
def harmed_bus(harmed_url: str, client: str) -> str:
    """As `harmed_url`, once for each client."""
    return through(harmed_url, client)


@pytest.fixture(scope="module")
def postgresql_server() -> Iterator[PostgreSQLServer]:
    """A server for one test module, to stop, kill, pause and starve."""
    with server_for_tests() as server:
        yield server
