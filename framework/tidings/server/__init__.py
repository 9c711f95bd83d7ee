"""An EventStoreDB-compatible server over the embedded store, for tests, laptops and small machines. No cluster."""

from __future__ import annotations

from tidings.server.budgets import Limits
from tidings.server.running import run_server
from tidings.server.serving import DEFAULT_PORT, EventStoreServer

__all__ = ["DEFAULT_PORT", "EventStoreServer", "Limits", "run_server"]
