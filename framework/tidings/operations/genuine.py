"""Held events and dead letters whose content is not the log's: forged on the bus, or changed by hand.

What an operator orders runs from the row. So before that, rows are compared with the log, and those that it contradicts
are named. Where the log has nothing any more, the row is all there is. It only reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.event_rows import recorded
from tidings.database.tables import dead, held
from tidings.errors import StreamDeleted, StreamNotFound, TidingsError
from tidings.protocol.receipts import mark
from tidings.stores import EventStore, RecordedEvent

__all__ = ["Claim", "Contradicted", "Counterfeit", "Genuine", "claims_at", "contradicted", "genuine"]

CHUNK: Final = 500
"""Rows to read at once, with their contents."""
FEW: Final = 100
"""Rows up to which each is looked for in its stream first; more are looked for in one reading of the log first."""
NAMED: Final = 10
"""Rows that a refusal names; all are counted."""

Genuine = tuple[str, int]
"""Id and mark of an event of the log."""


class Counterfeit(NamedTuple):
    """A row that the log contradicts."""

    kind: str
    """`held` or `dead`."""
    service: str
    name: str
    """How `tidings held drop` and `tidings dead drop` call it."""
    type: str
    event_id: str
    position: int

    def __str__(self) -> str:
        what = f"dead letter {self.name}" if self.kind == "dead" else "the held event"
        return (
            f"{what} of service {self.service} ({self.type} {self.event_id}, position {self.position}): tidings "
            f"{self.kind} drop {self.name} --service {self.service}"
        )


class Claim(NamedTuple):
    """What a row says that the log has."""

    row: Counterfeit
    """What it is if the log contradicts it."""
    stream: str
    version: int | None
    """None for letters of the first schema, whose marks are not known either."""
    mark: int | None

    def contradicts(self, event: Genuine) -> bool:
        return self.row.event_id != event[0] or self.mark not in (None, event[1])


class Contradicted(TidingsError):
    """Rows that are to run again are not what the log has."""

    def __init__(self, found: Collection[Counterfeit]) -> None:
        self.found = tuple(found)
        first = min(one.position for one in found)
        named = "; ".join(map(str, self.found[:NAMED]))
        more = f"; and {len(found) - NAMED} more (tidings verify --deep)" if len(found) > NAMED else ""
        super().__init__(
            f"nothing was changed, because {len(found)} of them were forged or changed by hand: the log has something "
            f"else there. They would be handled as they are. Drop them: {named}{more}. Then 'tidings replay "
            f"MODULE:{self.found[0].service} --from {first}' gives handlers what the log has"
        )


def genuine(event: RecordedEvent) -> Genuine:
    """Return what an event of the log is known by."""
    return str(event.id), mark(event)


async def claims_at(
    connection: AsyncConnection,
    service: str,
    log: UUID,
    positions: Collection[int],
    tables: Sequence[sa.Table] = (held, dead),
) -> list[Claim]:
    """Return what the held events and dead letters at these positions say, or those of one of the tables."""
    found: list[Claim] = []
    wanted = sorted(positions)
    for table in tables:
        ours = sa.select(table).where(table.c.service == service, table.c.log == str(log))
        if table is dead:
            ours = ours.where(dead.c.kind == "handler")
        for at in range(0, len(wanted), CHUNK):
            rows = await connection.execute(ours.where(table.c.position.in_(wanted[at : at + CHUNK])))
            found += [_claim(row, table, service) for row in rows]
    return found


async def contradicted(
    store: EventStore, claims: Iterable[Claim], known: Mapping[int, Genuine] | None = None
) -> list[Counterfeit]:
    """Return the rows that the log contradicts: it has another event at the position, or at the version of the stream.

    `known` is what the log was already found to have at positions. Raises `StoreUnavailable`.
    """
    verdicts: dict[Claim, bool] = {}
    for claim in (claims := list(claims)):
        if known is not None and claim.row.position in known:
            verdicts[claim] = claim.contradicts(known[claim.row.position])
    steps = [_in_streams, _in_log]
    for step in steps if len(claims) - len(verdicts) <= FEW else reversed(steps):
        if rest := [claim for claim in claims if claim not in verdicts]:
            verdicts |= await step(store, rest)
    return list(dict.fromkeys(claim.row for claim in claims if verdicts.get(claim)))


async def _in_streams(store: EventStore, claims: Collection[Claim]) -> dict[Claim, bool]:
    """Look for each in its stream. Whether the log contradicts it is left open where the stream does not have it."""
    verdicts: dict[Claim, bool] = {}
    for claim in claims:
        if claim.version is None:
            continue
        try:
            async for event in store.read_stream(claim.stream, start=claim.version, limit=1):
                if event.version == claim.version:
                    verdicts[claim] = event.position != claim.row.position or claim.contradicts(genuine(event))
        except (StreamNotFound, StreamDeleted):
            pass
    return verdicts


async def _in_log(store: EventStore, claims: Collection[Claim]) -> dict[Claim, bool]:
    """Look for all at their positions. It reads backwards: not every store can begin below an event."""
    wanted = {claim.row.position for claim in claims}
    known: dict[int, Genuine] = {}
    async for event in store.read_all(after=min(wanted) - 1, backwards=True):
        if event.position in wanted:
            known[event.position] = genuine(event)
            if len(known) == len(wanted):
                break
    return {claim: claim.contradicts(known[claim.row.position]) for claim in claims if claim.row.position in known}


def _claim(row: sa.Row[Any], table: sa.Table, service: str) -> Claim:
    name = str(row.id) if table is dead else row.event_id
    kind = table.name.removeprefix("tidings_")
    counterfeit = Counterfeit(kind, service, name, row.type, row.event_id, row.position)
    return Claim(counterfeit, row.stream, row.version, None if row.version is None else mark(recorded(row)))
