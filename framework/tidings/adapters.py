"""Stores and buses by URL: the installed package that has the scheme, opened and closed around a block.

Packages announce adapters as entry points of the groups `tidings.stores` and `tidings.buses`: the name is the scheme,
the object an `async` function that takes the URL and returns an `EventStore` or `EventBus`. Tidings' own are announced
in the same way. A group is read when its first URL is looked at, an adapter is imported when it is first opened.

Internal: `tidings.open_store` and `tidings.open_bus` are its public names.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from tidings.buses import EventBus
from tidings.errors import ConfigurationError
from tidings.stores import EventStore
from tidings.urls import redact

__all__ = ["check_bus", "check_store", "open_bus", "open_store"]

_OURS: Final = "tidings"
_GROUPS: Final = {"store": "tidings.stores", "bus": "tidings.buses"}


def check_store(url: str) -> None:
    """Raise `ConfigurationError` when no installed package has a store adapter for the URL's scheme, or two have."""
    _adapter("store", url)


def check_bus(url: str) -> None:
    """Raise `ConfigurationError` when no installed package has a bus adapter for the URL's scheme, or two have."""
    _adapter("bus", url)


@asynccontextmanager
async def open_store(url: str) -> AsyncIterator[EventStore]:
    """Open the event store at `url`, and close it after the block.

    Raises `ConfigurationError` for a URL that no installed adapter takes, and `StoreUnavailable`.
    """
    async with _opened("store", url) as store:
        yield store


@asynccontextmanager
async def open_bus(url: str) -> AsyncIterator[EventBus]:
    """Open the event bus at `url`, and close it after the block; it connects when it is used.

    Raises `ConfigurationError` for a URL that no installed adapter takes.
    """
    async with _opened("bus", url) as bus:
        yield bus


@asynccontextmanager
async def _opened(what: str, url: str) -> AsyncIterator[Any]:
    adapter = await _open(what, url)
    try:
        yield adapter
    finally:
        await adapter.close()


@cache
def _installed(what: str) -> Mapping[str, Sequence[EntryPoint]]:
    """Schemes to the entry points that announce them: more than one where packages contradict each other.

    Reading all installed packages takes some 10 ms, so it is done once per process.
    """
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=_GROUPS[what]):
        found.setdefault(entry.name.lower(), []).append(entry)
    if not any(_package(entry) == _OURS for entries in found.values() for entry in entries):
        raise ConfigurationError(
            f"the installed package {_OURS!r} announces no {what} adapters ({_GROUPS[what]}): it was installed by an "
            "older pyproject.toml, or without its metadata. Install it again; in a checkout:  pip install -e ."
        )
    return found


def _adapter(what: str, url: str) -> EntryPoint:
    """The one entry point for the URL's scheme."""
    installed = _installed(what)
    scheme, separator, _ = url.partition("://")
    found = installed.get(scheme.lower(), ())
    if not separator or not found:
        choices = ", ".join(f"{name}://{_needs(entries)}" for name, entries in sorted(installed.items()))
        raise ConfigurationError(
            f"TIDINGS_{what.upper()}: no {what} adapter for {redact(url)!r}: the URL must begin with one of {choices}. "
            f"Other packages add theirs as an entry point of {_GROUPS[what]!r}"
        )
    if len(found) > 1:
        packages = " and ".join(f"{_package(entry)!r} ({entry.value})" for entry in found)
        raise ConfigurationError(
            f"TIDINGS_{what.upper()}: two installed packages have a {what} adapter for {scheme.lower()}://: "
            f"{packages}. Uninstall one of them, for example:  pip uninstall {_package(found[-1])}"
        )
    return found[0]


async def _open(what: str, url: str) -> Any:
    """Import the adapter, and have it open the URL."""
    entry = _adapter(what, url)
    package = _package(entry)
    try:
        return await _function(what, entry)(url)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing == entry.module.partition(".")[0]:
            raise  # a module of the adapter itself: no package would help
        needed = f"{package}[{','.join(entry.extras)}]" if entry.extras else missing
        raise ConfigurationError(
            f"{redact(url)} needs the package {error.name!r}: install it with  pip install '{needed}'"
        ) from error


def _function(what: str, entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except AttributeError as error:
        raise ConfigurationError(
            f"package {_package(entry)!r} announces {entry.value!r} as its {what} adapter for {entry.name}://, but "
            "there is no such function: install a version of it that fits"
        ) from error


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "unknown"


def _needs(entries: Sequence[EntryPoint]) -> str:
    """How to install what an adapter needs beyond its package, for a list of schemes."""
    return "".join(f" (pip install '{_package(entry)}[{','.join(entry.extras)}]')" for entry in entries if entry.extras)
