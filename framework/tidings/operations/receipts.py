"""Compares the receipts of services with the log, and names the events in which they differ.

A receipt says in constant space what a service has passed in a bucket. If one differs from the log, the log is read a
second time, for the buckets that differ, to find the events. The only thing changed is the note of what is proved.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.contention import again_when_contended, commanding
from tidings.database.engine import Database
from tidings.database.layout import layout_of, ranges_of
from tidings.database.tables import proofs, watermarks
from tidings.errors import ConfigurationError
from tidings.protocol.position import BUCKETS, RESERVED, carried
from tidings.protocol.receipts import PRIME, Receipt, Sums, locate, mark, missing_run
from tidings.stores import EventStore, Filter, RecordedEvent
from tidings.stores.rules import METADATA, STREAM_DELETED

__all__ = ["Proof", "explain_differences", "keep", "proof_of"]

_ANYWHERE: Final = 2**63 - 1
_WHOLE: Final = -1
"""In the place of a bucket, in the note that the whole log was read."""
_RETENTION: Final = Filter(types=(METADATA, STREAM_DELETED))
_KEYS: Final = (b'"$maxCount"', b'"$maxAge"', b'"$tb"')


class _Bucket(NamedTuple):
    """The receipt of a bucket, and the part of the log to compare it with."""

    after: int
    """Position after which the comparison begins."""
    upto: int
    """Position up to which every event of the bucket must be in the receipt."""
    receipt: Receipt
    found: Sums
    """Sums of the log up to `after`, as they were when that was proved."""


@dataclass(slots=True)
class Proof:
    """The receipts of one service, and the comparison with the log."""

    service: str
    buckets: dict[int, _Bucket] = field(default_factory=dict)
    """By bucket: the receipts that can be compared."""
    begun: list[int] = field(default_factory=list)
    """Positions after which receipts begin, for those that do not begin with the log."""
    unknown: int = 0
    """Number of buckets without a receipt that can be compared."""
    found: dict[int, Sums] = field(default_factory=dict)
    """By bucket: the sums of the log."""
    bad: dict[int, Sums] = field(default_factory=dict)
    """By bucket: how the receipt differs from the log."""
    read_upto: int = -1
    """Position up to which an earlier proof has read the whole log, and named what is in it twice."""

    @property
    def after(self) -> int:
        """The position up to which there is nothing to compare."""
        return min((part.after for part in self.buckets.values()), default=_ANYWHERE)

    @property
    def upto(self) -> int:
        """The position up to which everything is proved if nothing is `bad`; -1 for nothing."""
        if self.unknown:
            return -1
        return min((part.upto for part in self.buckets.values()), default=-1)

    def meet(self, event: RecordedEvent, bucket: int, value: int | None) -> int | None:
        """Add an event of the log, and return its mark. `value` is the mark, if it is already known."""
        part = self.buckets.get(bucket)
        if part is None or not part.after < event.position <= part.upto:
            return value
        if value is None:
            value = mark(event)
        self.found[bucket] = self.found.get(bucket, part.found).with_event(event.position, value)
        return value

    def close(self) -> None:
        """Find the receipts that differ from the log, after the log was read."""
        for bucket, part in self.buckets.items():
            difference = part.receipt.sums.minus(self.found.get(bucket, part.found))
            if difference != Sums() or part.receipt.disorder >= 0:
                self.bad[bucket] = difference


async def proof_of(connection: AsyncConnection, service: str, log: UUID, since: int | None = None) -> Proof:
    """Read a service's receipts, to compare them with the whole log, or with what came after its last proof.

    With `since`, the last proof must end at that position or above; else `ConfigurationError` is raised.
    """
    proof = Proof(service)
    # Read the floors first: receipts that are read later include everything up to these floors.
    upto = [-1] * BUCKETS
    for part in await ranges_of(connection, service, log):
        for bucket in range(part.first, part.last + 1) if part.receipted == part.floor else ():
            upto[bucket] = part.floor
    proved = {} if since is None else await _proved(connection, service, log, since)
    ours = (watermarks.c.service == service, watermarks.c.log == str(log))
    rows = (await connection.execute(sa.select(watermarks).where(*ours).order_by(watermarks.c.bucket))).all()
    proof.unknown = BUCKETS - len(rows) if rows else 0
    for row in rows:
        receipt = Receipt.read(row.receipt)
        if receipt is None or row.receipt_at < row.position:
            proof.unknown += 1
            continue
        end = max(row.receipt_at, upto[row.bucket])
        found = _Bucket(receipt.since, end, receipt, Sums())
        known = proved.get(row.bucket)
        if known is not None and known[1].since == receipt.since and known[0] <= end:
            found = found._replace(after=known[0], found=known[1].sums)
        elif receipt.since >= 0:
            proof.begun.append(receipt.since)
        proof.buckets[row.bucket] = found
    whole = sa.select(proofs.c.position).where(*_noted(service, log), proofs.c.bucket == _WHOLE)
    proof.read_upto = -1 if (position := await connection.scalar(whole)) is None else position
    return proof


def _noted(service: str, log: UUID) -> tuple[sa.ColumnElement[bool], ...]:
    return proofs.c.service == service, proofs.c.log == str(log)


async def _proved(
    connection: AsyncConnection, service: str, log: UUID, since: int
) -> Mapping[int, tuple[int, Receipt]]:
    query = sa.select(proofs).where(*_noted(service, log), proofs.c.bucket != _WHOLE)
    rows = (await connection.execute(query)).all()
    highest = min((row.position for row in rows), default=-1)
    if since > highest:
        known = f"its last proof ends at {highest}: --since {highest}" if rows else "it has never been proved"
        raise ConfigurationError(
            f"service {service!r} is not proved up to position {since}; {known}. 'tidings verify --deep' without "
            "--since proves everything that the log holds"
        )
    found = {row.bucket: (row.position, Receipt.read(row.receipt)) for row in rows}
    return {bucket: (position, receipt) for bucket, (position, receipt) in found.items() if receipt is not None}


@again_when_contended
async def keep(database: Database, proof: Proof, log: UUID, wrong: Collection[int], read_upto: int | None) -> None:
    """Note what is proved, so that a later proof need only read what came after it.

    Nothing is noted for buckets that are `wrong`: the next comparison begins where they were proved before. `read_upto`
    is how far the whole log was read; None for a part of it. Raises `DatabaseUnavailable`, and `DBAPIError` if the user
    may not write.
    """
    own = {"service": proof.service, "log": str(log)}
    rows = [
        own | {"bucket": bucket, "position": part.upto, "receipt": part.receipt.write()}
        for bucket, part in proof.buckets.items()
        if bucket not in wrong
    ]
    if read_upto is not None:
        rows.append(own | {"bucket": _WHOLE, "position": read_upto, "receipt": ""})
    if not rows:
        return
    these = _noted(proof.service, log)
    async with database.turn, commanding(database) as connection:
        await layout_of(connection, proof.service, locked=True)  # one proof is noted after the other
        await connection.execute(proofs.delete().where(*these, proofs.c.bucket.in_([row["bucket"] for row in rows])))
        await connection.execute(proofs.insert(), rows)


# ---- what differs ------------------------------------------------------------------


class _Log(NamedTuple):
    """The log's events in the buckets that differ."""

    events: dict[int, list[tuple[int, int]]]
    """By bucket: position and mark."""
    shortened: bool
    """Whether retention or a deletion was ever asked for."""

    def before(self, bucket: int, position: int) -> int:
        """Return where to begin to read for what is at a position: the bucket's event before it, if one is known."""
        events = self.events[bucket]
        at = bisect_left(events, (position, -1))
        return events[at - 1][0] if at else position - 1


async def explain_differences(
    store: EventStore, proof: Proof, wrong: Callable[[str], None], note: Callable[[str], None]
) -> set[int]:
    """Tell what differs, bucket by bucket, and return the buckets that are wrong.

    `wrong` is called with each text of what the log contradicts, `note` with each of what retention may explain.
    """
    log, found = await _read(store, proof), set[int]()
    for bucket, difference in sorted(proof.bad.items()):
        for is_wrong, text in await _differences(store, log, bucket, proof.buckets[bucket], difference):
            (wrong if is_wrong else note)(f"bucket {bucket}: {text}")
            if is_wrong:
                found.add(bucket)
    return found


_Finding = tuple[bool, str]
"""Whether the log contradicts it, and the text."""


async def _differences(store: EventStore, log: _Log, bucket: int, part: _Bucket, difference: Sums) -> list[_Finding]:
    told: list[_Finding] = []
    if (at := part.receipt.disorder) >= 0:
        told.append((True, f"{await _named(store, log, bucket, at)} was settled after a later one: out of order"))
    if difference == Sums():
        return told
    events = log.events[bucket]
    if (located := locate(difference, _ANYWHERE)) is not None:
        known = dict(events)
        return told + [
            await _at(store, log, bucket, position, value, known.get(position)) for position, value in located
        ]
    if (explained := missing_run(difference, events, _ANYWHERE)) is not None:
        run, others = explained
        names = [await _named(store, log, bucket, events[at][0]) for at in (run[0], run[-1])]
        what = f"{names[0]} was passed over, and the next events of the bucket, {len(run)} in all, up to {names[1]}"
        told.append((True, f"{what}: skipped"))
        known = dict(events)
        return told + [
            await _at(store, log, bucket, position, value, known.get(position)) for position, value in others
        ]
    more = difference.events
    count = f"counts {abs(more)} {'more' if more > 0 else 'fewer'} than" if more else "has others than"
    what = f"between positions {part.after} and {part.upto}, the receipt {count} the log has"
    if log.shortened and more > 0:  # retention can only leave fewer events in the log
        return [*told, (False, f"{what}. If retention removed events there, they cannot be proved any more")]
    return [*told, (True, f"{what}: three events or more were skipped, replaced or foreign")]


async def _at(store: EventStore, log: _Log, bucket: int, position: int, value: int, there: int | None) -> _Finding:
    """Return what is wrong at a position.

    `there` is the mark of the log's event at that position, and `value` is what the receipt has in excess of it.
    """
    named = await _named(store, log, bucket, position)
    if there is not None:
        if (value + there) % PRIME == 0:
            return True, f"{named} was passed over: skipped"
        if value == there:
            return True, f"{named} was settled twice"
        return True, f"another event was settled in the place of {named}: replaced"
    if named:
        return True, f"an event was settled at position {position}, where the log has {named}: foreign"
    if position > await store.head():
        return True, f"an event was settled at position {position}, beyond the end of the log: foreign"
    what = f"an event was settled at position {position}, where the log has none"
    if log.shortened:
        return False, f"{what}: removed by retention since, or foreign"
    return True, f"{what}, and no retention or deletion was ever asked for: foreign"


async def _read(store: EventStore, proof: Proof) -> _Log:
    parts = {bucket: proof.buckets[bucket] for bucket in proof.bad}
    last = max(part.upto for part in parts.values())
    log = _Log({bucket: [] for bucket in parts}, await _shortened(store))
    async for event in store.read_all(after=min(part.after for part in parts.values())):
        if event.position > last:
            break
        bucket = carried(event)
        if bucket in parts and parts[bucket].after < event.position <= parts[bucket].upto:
            log.events[bucket].append((event.position, mark(event)))
    return log


async def _shortened(store: EventStore) -> bool:
    """Return whether retention or a deletion was ever asked for, for streams other than Tidings' own."""
    async for event in store.read_all(filter=_RETENTION):
        ours = event.stream.removeprefix("$$").startswith(RESERVED)
        if not ours and (event.type == STREAM_DELETED or any(key in event.data for key in _KEYS)):
            return True
    return False


async def _named(store: EventStore, log: _Log, bucket: int, position: int) -> str:
    """Return the event at a position, in words; "" if there is none."""
    async for event in store.read_all(after=log.before(bucket, position)):
        if event.position > position:
            break
        if event.position == position:
            return f"{event.type} {event.id} at {event.stream}@{event.version}, position {position}"
    return ""
