"""How the handlers of a service stand beside its watermarks: behind, not begun yet, gone, or not given the past.

It only reads, and costs a few rows for each handler that was added late or has left, none for any other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import spans
from tidings.enrolment import wanted
from tidings.partitions import Range, ranges_of
from tidings.report import HandlerReport
from tidings.roster import SKIPPED, Span, under_one_name

if TYPE_CHECKING:
    from tidings.handlers import Handler
    from tidings.service import Service

__all__ = ["read_handlers", "read_spans"]


async def read_spans(connection: AsyncConnection, service: Service, log: UUID) -> list[Span]:
    """What handlers are behind, or were not given; what is noted under a former name counts as the present one's."""
    columns = [spans.c[column] for column in Span._fields]
    found = await connection.execute(
        sa.select(*columns).where(spans.c.service == service.name, spans.c.log == str(log)).order_by(spans.c.bucket)
    )
    rows = [Span(*row) for row in found]
    renamed = [handler for handler in service.named.values() if handler.was] if rows else []
    if renamed:
        ranges = await ranges_of(connection, service.name, log)
        noted = {name for part in ranges if part.handlers is not None for name in json.loads(part.handlers)}
        for handler in renamed:
            others = [row for row in rows if row.handler not in handler.names]
            joined = handler.name in noted
            rows = [*others, *under_one_name(rows, handler.name, handler.was, joined=joined)]
    return rows


def read_handlers(
    service: Service, ranges: Sequence[Range], highest: int, found: Sequence[Span]
) -> list[HandlerReport]:
    """Only those of which there is something to say; `highest` is what the service has settled at most."""
    of: dict[str, list[Span]] = {}
    for span in found:
        of.setdefault(span.handler, []).append(span)
    noted = [json.loads(part.handlers) for part in ranges if part.handlers is not None]
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
    noted: Sequence[dict[str, list[int | None]]],
    highest: int,
    mine: Sequence[Span],
) -> None:
    after = wanted(handler)
    for begun in noted:
        known = next((begun[name] for name in (handler.name, *handler.was) if name in begun), None)
        if known is None:
            report.state = "to begin"
            report.needs_past |= highest >= 0 and (any(s.open for s in mine) or (after is not None and highest > after))
        elif after is not None and (known[0] is None or after < known[0]) and report.skipped_upto > after:
            report.state, report.needs_past = "to begin", True
    if report.state == "at work" and (behind := [span.done for span in mine if span.open]):
        report.state, report.done_upto = "catching up", min(behind)
