"""Verifies deeply: reads the whole log once, and compares everything that the services' databases say with it.

The only thing changed is the note of what is proved (`receipts`). It costs a full scan of the log and about 100 bytes
of memory per event: the ids by which causes and repetitions are found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from tidings._support.escaping import plain
from tidings.database.engine import Database
from tidings.database.event_rows import recorded
from tidings.database.lineage import lineage_of
from tidings.database.tables import dead, held, partials, replays, staged
from tidings.errors import DatabaseUnavailable
from tidings.modelling.codec import BY_REQUEST, CAUSATION, read_metadata
from tidings.modelling.roster import BEHIND, Span
from tidings.operations.handlers import read_spans
from tidings.operations.receipts import Proof, explain_differences, keep, proof_of
from tidings.operations.verify import Settled, last_carried, settled_in
from tidings.protocol.position import carried
from tidings.protocol.receipts import mark
from tidings.stores import EventStore, RecordedEvent

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["Recount", "Tally", "recount"]

NAMED: Final = 50
"""Contradictions and notes to name; all are counted."""
STEP: Final = 1000
"""Events between two reports of progress."""


@dataclass(slots=True)
class Tally:
    """How many carried events of a service's types are handled, held, dead or pending; together `events`."""

    service: str
    events: int = 0
    handled: int = 0
    held: int = 0
    dead: int = 0
    pending: int = 0
    late: dict[str, int] = field(default_factory=dict)
    """By handler: events that other handlers have done, and that it is still to be given."""
    skipped: dict[str, int] = field(default_factory=dict)
    """By handler: events that were settled before it began, and that it will not be given."""


@dataclass(slots=True)
class Recount:
    """What was read, and every row that the log contradicts; `str` of it is for people."""

    log: UUID
    position: int
    """Position up to which events were counted."""
    events: int = 0
    carried: int = 0
    services: list[Tally] = field(default_factory=list)
    wrong_count: int = 0
    wrong: list[str] = field(default_factory=list)
    """Contradictions: somebody changed rows by hand, or mixed up logs or backups."""
    advice: list[str] = field(default_factory=list)
    """What to do about receipts that the log contradicts."""
    proved: dict[str, int] = field(default_factory=dict)
    """By service: the position up to which the log confirms its receipts; no entry if the log contradicts them."""
    notes_count: int = 0
    notes: list[str] = field(default_factory=list)
    """What cannot be proved, because the log does not have (or no longer has) what a row names; and rows left over."""

    @property
    def ok(self) -> bool:
        """Whether the log contradicts nothing, and nothing is pending."""
        return not self.wrong_count and not any(tally.pending or tally.late for tally in self.services)

    def contradict(self, text: str) -> None:
        """Add a contradiction."""
        self.wrong_count += 1
        if len(self.wrong) < NAMED:
            self.wrong.append(text)

    def note(self, text: str) -> None:
        """Add a note."""
        self.notes_count += 1
        if len(self.notes) < NAMED:
            self.notes.append(text)

    def __str__(self) -> str:
        number = self.wrong_count
        found = f"{number or 'no'} contradiction{'s' if number > 1 else ''}"
        lines = [f"recounted {self.events} events, {self.carried} of them carried to services: {found}"]
        lines += [
            f"  {tally.service}: of {tally.events} events of its types {tally.handled} are handled, "
            f"{tally.held} held, {tally.dead} dead, {tally.pending} pending"
            for tally in self.services
        ]
        for tally in self.services:
            lines += [
                f"    {count} of them are still to be given to handler {plain(name)}"
                for name, count in tally.late.items()
            ]
            lines += [
                f"    {count} of them were settled before handler {plain(name)} began, and never given to it"
                for name, count in tally.skipped.items()
            ]
        lines += [
            f"  {service}: proved up to position {position}: its receipts are those of the log"
            + (", but for what the notes say" if self.notes_count else "")
            for service, position in self.proved.items()
        ]
        lines += [f"  WRONG {plain(text)}" for text in self.wrong]
        lines += [f"  and {self.wrong_count - len(self.wrong)} more"] if self.wrong_count > len(self.wrong) else []
        lines += [f"  {plain(text)}" for text in self.advice]
        lines += [f"  note: {plain(text)}" for text in self.notes]
        lines += [f"  and {self.notes_count - len(self.notes)} more"] if self.notes_count > len(self.notes) else []
        return "\n".join(lines)


async def recount(
    store: EventStore,
    services: Sequence[tuple[Declaration, Database | None]],
    progress: Callable[[int, int, int], None] = lambda events, position, end: None,
    *,
    upto: int | None = None,
    since: int | None = None,
) -> Recount:
    """Read the whole log, and compare with it what services say of its events up to position `upto`.

    By default, `upto` is the last event that the log has now. With `since`, only read what came after the last proof,
    which must end at that position or above. What receipts prove is noted in the services' databases. `progress` is
    told the events read, the position, and the log's end. Raises `StoreUnavailable`, `DatabaseUnavailable`, and
    `ConfigurationError` if the service is not proved up to `since`.
    """
    log = await store.log_id()
    # The order matters: the position is read before the rows, so the rows are complete up to it, and the head is read
    # after them, so every event that a row names is at or below it.
    found = Recount(log, await last_carried(store) if upto is None else upto)
    # Adopting a restored log has lowered watermarks to the last position that both logs have in common.
    cuts = {position for position, _ in (await lineage_of(store)).former}
    ledgers = [await _ledger(service, database, log, found, cuts, since) for service, database in services]
    end = await store.head()
    after = -1 if since is None else min(since, *(ledger.proof.after for ledger in ledgers))
    causes = _Causes({ledger.service: ledger.proof.read_upto for ledger in ledgers}, found, after)
    async for event in store.read_all(after=after):
        if event.position > end:
            break
        found.events += 1
        bucket, mark = carried(event), None
        if bucket is not None:
            if event.position <= found.position:
                found.carried += 1
            causes.meet(event)
        for ledger in ledgers:
            ledger.meet(event, bucket)
            if bucket is not None:
                mark = ledger.proof.meet(event, bucket, mark)
        if found.events % STEP == 0:
            progress(found.events, event.position, end)
    for ledger, (_, database) in zip(ledgers, services, strict=True):
        ledger.close(end, await _staged_ids(ledger, database, log))
        await _prove(store, database, ledger.proof, found, end if since is None else None)
    return found


async def _prove(
    store: EventStore, database: Database | None, proof: Proof, found: Recount, read_upto: int | None
) -> None:
    """Add to the recount what the receipts prove, or what is wrong with them. `read_upto` is None if only a part of the
    log was read."""
    service = proof.service
    proof.close()
    if proof.begun:
        found.note(
            f"{service}: the receipts of {len(proof.begun)} buckets begin after position {min(proof.begun)} or later, "
            "where an upgrade, a replay or a restored log began: of what was before, they prove nothing"
        )
    if proof.unknown:
        found.note(f"{service}: {proof.unknown} buckets have no receipt; they get one when the service is started")
    wrong: Collection[int] = ()
    if proof.bad:
        wrong = await explain_differences(
            store,
            proof,
            lambda text: found.contradict(f"{service}: {text}"),
            lambda text: found.note(f"{service}: {text}"),
        )
        if wrong:
            found.advice.append(
                f"{service}: find out who may publish on the bus (docs/trust.md). 'tidings replay MODULE:SERVICE "
                "--from POSITION', from the first position named, gives its handlers what the log has from there on"
            )
    if database is not None:
        if not wrong and proof.upto >= 0:
            found.proved[service] = proof.upto
        try:
            await keep(database, proof, found.log, wrong, read_upto)
        except (DatabaseUnavailable, DBAPIError) as error:  # the result is still good, and took a scan of the whole log
            why = error.orig if isinstance(error, DBAPIError) else error
            found.note(f"{service}: its proof could not be noted, so --since can only go on from the one before: {why}")


class _Causes:
    """The emitted events of the log: each must be there once, and after its cause if a handler emitted it.

    What is there twice stays so, because a log only grows. So it is named as wrong by the first proof that reads the
    whole log, and noted by later ones.
    """

    def __init__(self, services: Mapping[str, int], found: Recount, after: int) -> None:
        self._services = services
        """By service: the position up to which an earlier proof has named what is in the log twice."""
        self._found = found
        self._after = after
        """Position up to which events were not read, so that causes there are unknown."""
        self._ids: set[int] = set()
        self._emitted: dict[int, int] = {}
        """Positions of emitted events by their short ids."""

    def meet(self, event: RecordedEvent) -> None:
        short = int.from_bytes(event.id_bytes[8:])  # half an id: a collision in a log of a billion events is unlikely
        if b'"tidingsHandler"' in event.metadata:
            self._check(event, short)
        self._ids.add(short)

    def _check(self, event: RecordedEvent, short: int) -> None:
        metadata = read_metadata(event)
        by = metadata.get("tidingsHandler")
        if not isinstance(by, str) or by.partition(".")[0] not in self._services:
            return
        what = f"{_place(event)}, emitted by {by},"
        first = self._emitted.setdefault(short, event.position)
        if first != event.position:
            twice = f"{what} has the id of the event at position {first}: it is in the log twice"
            if event.position <= self._services[by.partition(".")[0]]:
                self._found.note(f"{twice}, as an earlier proof has said")
            else:
                self._found.contradict(
                    f"{twice}. The first one counts as the service's own. Somebody else has appended the other one, "
                    "which services handle, too: see who may write to its stream. From now on, this is only a note"
                )
        if CAUSATION not in metadata and by.partition(".")[2] == BY_REQUEST:
            return
        try:
            cause = UUID(metadata.get(CAUSATION))
        except (ValueError, TypeError, AttributeError):
            self._found.contradict(f"{what} names no cause")
            return
        if int.from_bytes(cause.bytes[8:]) not in self._ids and self._after < 0:
            self._found.note(f"{what} names cause {cause}, which is not in the log before it: removed by retention?")


class _Ledger:
    """One service's rows; each must be met in the log at the position that it names."""

    def __init__(self, service: Declaration, found: Recount) -> None:
        self.service = service.name
        self.proof = Proof(service.name)
        self.settled = Settled([], {})
        self.staged: dict[bytes, sa.Row[Any]] = {}
        """By event id."""
        self.rows: dict[int, list[tuple[str, sa.Row[Any]]]] = defaultdict(list)
        """Held and dead rows of events, by position."""
        self.marks: dict[int, list[int]] = defaultdict(list)
        """By position: the buckets whose watermark is there."""
        self.causes: dict[int, list[sa.Row[Any]]] = defaultdict(list)
        """Staged rows by the position of their cause."""
        self.replayed: dict[int, int] = {}
        """Buckets that a replay sent back, and that have not come to where they were: rows up to there stay, and the
        watermark stands wherever the replay began."""
        self.spans: dict[tuple[int, str], list[Span]] = {}
        """What handlers are behind, or were not given, by bucket and handler."""
        self.partial: set[tuple[int, str]] = set()
        """Handlers that are done with an event which waits for others: position and handler."""
        self._handlers_of = service.handlers_of
        self._found = found
        self._tally = Tally(service.name)
        self._appended: dict[bytes, str] = {}
        found.services.append(self._tally)

    def meet(self, event: RecordedEvent, bucket: int | None) -> None:
        position = event.position
        rows = self.rows.pop(position, ())
        for kind, row in rows:
            self._compare(kind, row, event, bucket)
        for marked in self.marks.pop(position, ()):
            if marked != bucket:
                self._wrong(f"the watermark of bucket {marked} names {_place(event)}, which is not of that bucket")
        self.causes.pop(position, None)
        if event.id_bytes in self.staged:
            self._appended[event.id_bytes] = _place(event)
        if bucket is None or not self._handlers_of(event.type) or position > self._found.position:
            return
        self._tally.events += 1
        self._count_late(event, bucket)
        kinds = {kind for kind, _ in rows}
        if "held" in kinds:
            self._tally.held += 1
        elif "dead" in kinds:
            self._tally.dead += 1
        elif self.settled(bucket, position):
            self._tally.handled += 1
        else:
            self._tally.pending += 1

    def _count_late(self, event: RecordedEvent, bucket: int) -> None:
        for handler in self._handlers_of(event.type) if self.spans else ():
            for span in self.spans.get((bucket, handler.name), ()):
                if span.covers(event.position) and (span.kind != BEHIND or self.settled(bucket, event.position)):
                    counts = self._tally.late if span.open else self._tally.skipped
                    counts[handler.name] = counts.get(handler.name, 0) + 1

    def _compare(self, kind: str, row: sa.Row[Any], event: RecordedEvent, bucket: int | None) -> None:
        what = f"the {kind} row of {row.type} {row.event_id}, position {row.position},"
        if (str(event.id), event.type, event.stream) != (row.event_id, row.type, row.stream):
            self._wrong(f"{what} is not the event that the log has there: {_place(event)}")
        elif row.version is not None and mark(recorded(row)) != mark(event):
            self._wrong(
                f"{what} has other content than the log has there: it was forged, or changed by hand. Drop the row "
                f"(tidings {kind} drop) before a replay from that position, or its content is handled again"
            )
        elif bucket is None or (row.bucket is not None and row.bucket != bucket):
            self._wrong(f"{what} is of bucket {row.bucket}, the event of {'none' if bucket is None else bucket}")
        elif (
            not self.settled(bucket, row.position)
            and row.position > self.replayed.get(bucket, -1)
            and (row.position, row.handler) not in self.partial
        ):
            self._wrong(f"{what} stands above the watermark of its bucket: the event would be handled once more")

    def close(self, end: int, still_staged: set[bytes]) -> None:
        """Tell, after the log was read to its end, which rows name events that were not met."""
        for rows in self.rows.values():
            for kind, row in rows:
                self._unmet(f"the {kind} row of {row.type} {row.event_id}", row.position, end)
        for position, buckets in self.marks.items():
            for bucket in buckets:
                self._unmet(f"the watermark of bucket {bucket}", position, end)
        for position, causes in self.causes.items():
            for row in causes:
                self._unmet(f"the cause of staged {row.type} {row.event_id}", position, end)
        for identity in still_staged & self._appended.keys():
            row = self.staged[identity]
            self._found.note(
                f"{self.service}: staged {row.type} {row.event_id} is in the log already, {self._appended[identity]}: "
                "the service forgets the row when it starts"
            )

    def _unmet(self, what: str, position: int, end: int) -> None:
        if position > end:
            self._wrong(f"{what} names position {position}, and the log ends at {end}")
        else:
            self._found.note(f"{self.service}: {what} names position {position}: removed by retention, or never there")

    def _wrong(self, text: str) -> None:
        self._found.contradict(f"{self.service}: {text}")


async def _ledger(
    service: Declaration,
    database: Database | None,
    log: UUID,
    found: Recount,
    cuts: Collection[int],
    since: int | None,
) -> _Ledger:
    ledger = _Ledger(service, found)
    if database is None:
        return ledger
    async with database.reading() as connection:

        def rows(table: sa.Table, *names: str) -> sa.Select[Any]:
            columns = [table.c[name] for name in ("event_id", "type", "stream", "bucket", *names)]
            return sa.select(*columns).where(table.c.service == service.name, table.c.log == str(log))

        # Read the watermarks last: once a row is visible, the watermark has moved to its event or beyond.
        whole = ("position", "handler", "version", "data", "metadata", "is_json", "ticks")
        for row in await connection.execute(rows(held, *whole)):
            ledger.rows[row.position].append(("held", row))
        for row in await connection.execute(rows(dead, *whole).where(dead.c.kind == "handler")):
            ledger.rows[row.position].append(("dead", row))
        for row in await connection.execute(rows(staged, "cause", "requested")):
            ledger.staged[UUID(row.event_id).bytes] = row
            if not row.requested:
                ledger.causes[row.cause].append(row)
        for span in await read_spans(connection, service, log):
            ledger.spans.setdefault((span.bucket, span.handler), []).append(span)
        done = sa.select(partials.c.position, partials.c.handler).where(
            partials.c.service == service.name, partials.c.log == str(log)
        )
        ledger.partial = {(row.position, row.handler) for row in await connection.execute(done)}
        ledger.settled, marks = await settled_in(connection, service.name, log)
        again = await connection.execute(
            sa.select(replays.c.bucket, replays.c.upto).where(
                replays.c.service == service.name, replays.c.log == str(log)
            )
        )
        ledger.proof = await proof_of(connection, service.name, log, since)
        ledger.replayed = {row.bucket: row.upto for row in again if row.upto > marks.get(row.bucket, -1)}
    for bucket, position in marks.items():
        if position >= 0 and bucket not in ledger.replayed and position not in cuts:
            ledger.marks[position].append(bucket)
    if since is not None:
        for named in (ledger.rows, ledger.marks, ledger.causes):
            for position in [position for position in named if position <= since]:
                del named[position]
    return ledger


async def _staged_ids(ledger: _Ledger, database: Database | None, log: UUID) -> set[bytes]:
    """Return the ids that are still staged after the log was read; those appended meanwhile need no note."""
    if database is None or not ledger.staged:
        return set()
    query = sa.select(staged.c.event_id).where(staged.c.service == ledger.service, staged.c.log == str(log))
    async with database.reading() as connection:
        return {UUID(text).bytes for text in await connection.scalars(query)}


def _place(event: RecordedEvent) -> str:
    return f"{event.type} {event.id} at {event.stream}@{event.version}, position {event.position}"
