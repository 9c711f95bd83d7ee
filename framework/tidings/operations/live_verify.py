"""Verify while services are at work: whether all that there was when it was asked becomes settled within seconds.

Under traffic something is always on its way. It is no failure, but nor is it proof: so a baseline is taken first, and
only what was there then must be settled. It only reads.
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
"""Seconds that services at work have to settle what there was when they were asked."""
LOOK_SECONDS: Final = 0.1
"""Seconds between two looks, or three times what one takes."""


async def verify_live(
    store: EventStore,
    services: Sequence[tuple[Declaration, Database | None]],
    *,
    relay: str | None = None,
    seconds: float = PATIENCE,
) -> Report:
    """Look until all that there was at first is settled, but no longer than `seconds` seconds.

    Where no process of an unsettled service was seen within a minute, nothing is on its way, and the first look is the
    answer. Raises `StoreUnavailable`, `DatabaseUnavailable`.
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
    """Every service that is not settled has processes, and waits for nothing but them."""
    from tidings.database.presence import present

    for part, (service, database) in zip(report.services, services, strict=True):
        if part.ok:
            continue
        if database is None or not part.healable or not await present(database, service.name, time.time()):
            return False
    return report.relay is None or report.relay.ok
