"""Tells the server's log when its disk takes nothing more, also while nobody appends. It serves nothing."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from tidings._support.telling import Telling
from tidings.stores.sqlite.store import SqliteStore

__all__ = ["watch_disk"]

LOOK_SECONDS: Final = 1.0
"""Seconds between two looks."""
REFUSED_SECONDS: Final = 15.0
"""Seconds for which a write that failed counts."""

log = structlog.get_logger("tidings.server")


async def watch_disk(store: SqliteStore) -> None:
    """Until cancelled."""
    telling = Telling(log)
    while True:
        error = store.refused_within(REFUSED_SECONDS) or store.unwritable()
        if error is not None:
            telling.failed(
                "log.takes_no_appends",
                error,
                kind="",
                advice="free its disk (df -h), or make it writable: until then clients can only read. It goes on by "
                "itself",
            )
        else:
            telling.over("log.takes_appends")
        await asyncio.sleep(LOOK_SECONDS)
