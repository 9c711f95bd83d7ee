"""Verifies while services are at work: does everything that was there at the beginning become settled within seconds?

Under traffic some events are always on the way. They are no failure, but also no proof. So a baseline is taken first,
and only what was there then must become settled. It only reads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from tidings.operations.report import Report
from tidings.operations.verify import baseline_of, verify
from tidings.stores import EventStore

if TYPE_CHECKING:
    from tidings.database.engine import Database
    from tidings.modelling.declaration import Declaration

__all__ = ["verify_live"]

PATIENCE: Final = 5.0
"""Seconds that services at work have to settle what was there when `verify_live` began."""
LOOK_SECONDS: Final = 0.1
"""Seconds between two looks, at least; three times as long as a look takes, if that is more."""


async def verify_live(
    store: EventStore,
    services: Sequence[tuple[Declaration, Database | None]],
    *,
    relay: str | None = None,
    seconds: float = PATIENCE,
) -> Report:
    """Verify again and again until everything that was there at first is settled, for at most `seconds` seconds.

    If no process of an unsettled service was seen within a minute, waiting is no use: the report of the first look is
    returned. Raises `StoreUnavailable`, `DatabaseUnavailable`.
    """
    clock = asyncio.get_running_loop().time
    deadline, baseline = clock() + seconds, await baseline_of(store, services)
    while True:
        began = clock()
        report = await verify(store, services, relay=relay, baseline=baseline)
        if report.ok or clock() >= deadline or not await _may_move(report, services):
            return report
        await asyncio.sleep(min(max(LOOK_SECONDS, 3 * (clock() - began)), max(deadline - clock(), 0.0)))


async def _may_move(report: Report, services: Sequence[tuple[Declaration, Database | None]]) -> bool:
    """Return whether every unsettled service has processes, and nothing but those can be waited for."""
    from tidings.database.presence import present

    for part, (service, database) in zip(report.services, services, strict=True):
        if part.ok:
            continue
        if database is None or not part.healable or not await present(database, service.name, time.time()):
            return False
    return report.relay is None or report.relay.ok
