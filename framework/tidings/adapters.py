"""Stores and buses by URL: which adapter a scheme names, opened and closed around a block. None is imported before.

Internal: `tidings.open_store` and `tidings.open_bus` are its public names.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, cast

from tidings.buses import EventBus
from tidings.errors import ConfigurationError
from tidings.stores import EventStore
from tidings.urls import redact

__all__ = ["check_bus", "check_store", "open_bus", "open_store"]

# scheme -> (module, function, what to install when an import of it fails)
_STORES: Final = {
    "sqlite": ("tidings.stores.sqlite.store", "open_sqlite", ""),
    "memory": ("tidings.stores.sqlite.store", "open_sqlite", ""),
    "esdb": ("tidings.stores.eventstoredb.store", "open_eventstoredb", "eventstoredb"),
    "esdb+discover": ("tidings.stores.eventstoredb.store", "open_eventstoredb", "eventstoredb"),
}
_BUSES: Final = {
    "memory": ("tidings.buses.memory", "open_memory", ""),
    "amqp": ("tidings.buses.rabbitmq.bus", "open_rabbitmq", "rabbitmq"),
    "amqps": ("tidings.buses.rabbitmq.bus", "open_rabbitmq", "rabbitmq"),
}


def check_store(url: str) -> None:
    """Raises `ConfigurationError` where no store adapter is named by the URL."""
    _adapter(_STORES, "store", url)


def check_bus(url: str) -> None:
    """Raises `ConfigurationError` where no bus adapter is named by the URL."""
    _adapter(_BUSES, "bus", url)


def _adapter(known: dict[str, tuple[str, str, str]], what: str, url: str) -> tuple[str, str, str]:
    scheme, separator, _ = url.partition("://")
    found = known.get(scheme.lower())
    if not separator or found is None:
        choices = ", ".join(f"{name}://" for name in known)
        raise ConfigurationError(
            f"TIDINGS_{what.upper()}: no {what} adapter for {redact(url)!r}: the URL must begin with one of {choices}"
        )
    return found


@asynccontextmanager
async def _opened(known: dict[str, tuple[str, str, str]], what: str, url: str) -> AsyncIterator[Any]:
    module, function, extra = _adapter(known, what, url)
    try:
        opener = cast("Callable[[str], Any]", getattr(importlib.import_module(module), function))
    except ImportError as error:
        if not extra or not error.name or error.name.startswith("tidings"):
            raise
        raise ConfigurationError(
            f"{redact(url)} needs the package {error.name!r}: install it with  pip install 'tidings[{extra}]'"
        ) from error
    adapter = await opener(url)
    try:
        yield adapter
    finally:
        await adapter.close()


@asynccontextmanager
async def open_store(url: str) -> AsyncIterator[EventStore]:
    """The event store behind `url`. Raises `ConfigurationError` for a URL that fits none, `StoreUnavailable`."""
    async with _opened(_STORES, "store", url) as store:
        yield store


@asynccontextmanager
async def open_bus(url: str) -> AsyncIterator[EventBus]:
    """The event bus behind `url`. Raises `ConfigurationError` for a URL that fits none. Connections open on use."""
    async with _opened(_BUSES, "bus", url) as bus:
        yield bus
