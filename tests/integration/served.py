"""Where the log of an integration test is: in an SQLite file, or behind `tidings server` on such a file.

`TIDINGS_TEST_STORE=server` asks for the second; `make served` runs the tests of the path so.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from tidings import EventStore, open_store

__all__ = ["SERVED", "open_log"]

SERVED: Final = os.environ.get("TIDINGS_TEST_STORE", "sqlite") == "server"


@asynccontextmanager
async def open_log(folder: Path) -> AsyncIterator[EventStore]:
    """Open the store on `log.db` of a folder. If there is a server, it runs in this process."""
    if not SERVED:
        async with open_store(f"sqlite:///{folder}/log.db") as store:
            yield store
        return
    from tidings.server import EventStoreServer

    async with EventStoreServer(str(folder / "log.db")) as server, open_store(server.uri) as store:
        yield store
