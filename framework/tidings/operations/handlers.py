"""Which handlers of a service differ from its watermarks: behind, not begun yet, gone, or not given the past.

It only reads: a few rows for each handler that was added late or was removed, none for the others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.enrolment import Begun, by_present_name, names_of, wanted
from tidings.database.layout import Range, ranges_of
from tidings.database.tables import spans
from tidings.modelling.roster import SKIPPED, Span, under_one_name
from tidings.operations.report import HandlerReport

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration
    from tidings.modelling.handlers import Handler

__all__ = ["read_handlers", "read_spans"]


async def read_spans(connection: AsyncConnection, service: Declaration, log: UUID) -> list[Span]:
    """Read what handlers are behind with, or were not given.

    What is noted under a handler's former name counts for its present name.
    """
    columns = [spans.c[column] for column in Span._fields]
    found = await connection.execute(
        sa.select(*columns).where(spans.c.service == service.name, spans.c.log == str(log)).order_by(spans.c.bucket)
    )
    rows = [Span(*row) for row in found]
    if not rows:
        return []
    handlers = service.named.values()
    for part in await ranges_of(connection, service.name, log):
        noted = _noted(part)
        for handler in handlers:
            names = names_of(handler, noted, handlers)
            if len(names) > 1:
                mine = [row for row in rows if row.handler in names and part.first <= row.bucket <= part.last]
                united = under_one_name(mine, handler.name, [name for name in noted if name in names])
                rows = [*(row for row in rows if row not in mine), *united]
    return rows


def _noted(part: Range) -> dict[str, Begun]:
    """Return the handlers that are given the events of a range of buckets, by name."""
    return {name: Begun(*begun) for name, begun in json.loads(part.handlers or "{}").items()}


def read_handlers(
    service: Declaration, ranges: Sequence[Range], highest: int, found: Sequence[Span]
) -> list[HandlerReport]:
    """Report on each handler that is not simply at work; `highest` is the highest position settled by the service."""
    of: dict[str, list[Span]] = {}
    for span in found:
        of.setdefault(span.handler, []).append(span)
    handlers = service.named.values()
    noted = [by_present_name(_noted(part), handlers) for part in ranges if part.handlers is not None]
    reports = []
    for name, handler in service.named.items():
        mine = of.pop(name, [])
        report = HandlerReport(name, "at work", max((s.upto for s in mine if s.kind == SKIPPED), default=-1))
        _judge(report, handler, noted, highest, mine)
        if report.state != "at work" or report.skipped_upto >= 0:
            reports.append(report)
    for name, left in of.items():
        behind = [span.done for span in left if span.open]
        if behind:
            reports.append(HandlerReport(name, "gone", done_upto=min(behind)))
    return reports


def _judge(
    report: HandlerReport,
    handler: Handler,
    noted: Sequence[dict[str, Begun]],
    highest: int,
    mine: Sequence[Span],
) -> None:
    after = wanted(handler)
    for begun in noted:
        known = begun.get(handler.name)
        if known is None:
            report.state = "to begin"
            report.needs_past |= highest >= 0 and (any(s.open for s in mine) or (after is not None and highest > after))
        elif after is not None and (known.since is None or after < known.since) and report.skipped_upto > after:
            report.state, report.needs_past = "to begin", True
    if report.state == "at work" and (behind := [span.done for span in mine if span.open]):
        report.state, report.done_upto = "catching up", min(behind)
