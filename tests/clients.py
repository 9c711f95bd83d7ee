"""Both AMQP clients of the RabbitMQ adapter, for tests that hold for each: a test takes `bus_url` or `harmed_bus`."""

from __future__ import annotations

from typing import Final

import pytest

__all__ = ["CLIENTS", "adding", "not_on_aio_pika", "through"]

CLIENTS: Final = ("pamqp", "aio-pika")


def adding(url: str, option: str) -> str:
    """The URL with one more option."""
    return f"{url}{'&' if '?' in url else '?'}{option}"


def through(url: str, client: str) -> str:
    """The URL as one that uses this client; the default needs no option."""
    return url if client == CLIENTS[0] else adding(url, f"client={client}")


def not_on_aio_pika(reason: str) -> pytest.MarkDecorator:
    """The test holds for Tidings' own client, and is known to fail on aio-pika, for this reason."""
    fails = pytest.param("aio-pika", marks=pytest.mark.xfail(strict=True, reason=reason))
    return pytest.mark.parametrize("client", [CLIENTS[0], fails])
