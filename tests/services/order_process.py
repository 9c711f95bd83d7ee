"""Order's HTTP API as a process that is killed between the log's acknowledgement and its own answer.

`python -m tests.services.order_process` serves on a free port of the loopback interface and says which.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import cast
from unittest.mock import patch

import uvicorn

from services.order.events import OrderCreated
from tests.integration.embedded import StoreAround
from tidings import ANY, EventData, EventStore, open_store, wire_name
from tidings.stores import Appended, Expected


class Killing(StoreAround):
    """A store that kills its process when an order is in the log."""

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        done = await super().append(stream, events, expected=expected)
        if any(event.type == wire_name(OrderCreated) for event in events):
            os.kill(os.getpid(), signal.SIGKILL)
        return done


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[EventStore]:
    async with open_store(url) as store:
        yield cast("EventStore", Killing(store))


if __name__ == "__main__":
    with patch("tidings.hosting.running.open_store", opened):
        uvicorn.run("services.order.api:api", host="127.0.0.1", port=0)
