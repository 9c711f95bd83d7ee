"""One transaction on the PostgreSQL log: a group of appends, in one round trip for most groups.

A group is decided here, by what is known of its streams, and written by a function of the database, which checks
behind the lock that all of it is still so. Otherwise the streams are looked at, and the group is decided again; the
third time while the lock is held.

What was sent and has no answer is looked for before anything is decided again, while the lock is held: its outcomes are
those that it had then, not those that the log of today would give it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from tidings.errors import StoreError, StoreUnavailable
from tidings.stores import Appended
from tidings.stores.postgresql.connections import Connection
from tidings.stores.postgresql.continuity import Continuity
from tidings.stores.postgresql.decisions import Draft, Found, Outcome, State, Unknown, Write, asked_of
from tidings.stores.postgresql.log import standings
from tidings.stores.postgresql.schema import LOG_STREAM, RENEWED, key_of, uuid_of
from tidings.stores.postgresql.troubles import is_lost

__all__ = ["Appender"]

CACHED_STREAMS: Final = 65_536
CACHED_BYTES: Final = 4096
"""Bytes of a metadata document that is remembered, at most."""

_APPEND: Final = (
    "SELECT tidings_log.append($1::uuid[], $2::bigint[], $3::uuid[], $4::uuid[], $5::uuid[], $6::bytea[], "
    "$7::bigint[], $8::bytea[], $9::boolean[], $10::uuid[], $11::bytea[], $12::bytea[])"
)
_BEGIN_ALONE: Final = "BEGIN; LOCK TABLE tidings_log.writer IN EXCLUSIVE MODE"
_AT_HOME: Final = "SELECT place = tidings_log.place() FROM tidings_log.about"
_BY_ID: Final = (
    "SELECT n, e.version, e.position FROM unnest($1::uuid[], $2::uuid[]) WITH ORDINALITY AS asked (key, id, n), "
    "LATERAL (SELECT version, position FROM tidings_log.events "
    "WHERE events.key = asked.key AND events.id = asked.id ORDER BY version LIMIT 1) e"
)
_BY_VERSION: Final = (
    "SELECT n, e.id, e.position FROM unnest($1::uuid[], $2::bigint[]) WITH ORDINALITY AS asked (key, version, n), "
    "LATERAL (SELECT id, position FROM tidings_log.events "
    "WHERE events.key = asked.key AND events.version = asked.version) e"
)
_COMMITTED: Final = (
    "SELECT count(e.position), min(e.position - n), max(e.position - n) "
    "FROM unnest($1::uuid[], $2::bigint[], $3::uuid[]) WITH ORDINALITY AS sent (key, version, id, n) "
    "LEFT JOIN LATERAL (SELECT position FROM tidings_log.events "
    "WHERE events.key = sent.key AND events.version = sent.version AND events.id = sent.id) e ON true"
)
_RESTORED: Final = (
    "the event store {} was restored, or moved, from another database, and takes no appends until it is said which of "
    "the two it was; nothing was written. Restored from a backup, or the old one may have been written to since: stop "
    "everything and run  tidings log renew-identity , then  tidings log adopt  for each service (docs/restoring.md). "
    "Moved as a whole, and nothing was written to the old one since: run  SELECT tidings_log.accept_place()  in it."
)


class Appender:
    """Writes groups on a connection, one at a time. After an error, the connection is of no use any more, unless it was
    one statement that failed.

    What is known of streams is kept from one group to the next: everything that happens to a stream is an append.
    """

    def __init__(self, shown: str, log: Continuity) -> None:
        self._shown = shown
        self._log = log
        self._known: dict[str, State] = {}
        self._sent: list[Draft] = []
        """Drafts of the group at hand that were sent, and may have been committed."""
        self._restored = False
        """Whether the log is in another place than where it was made, and has no new identity yet."""
        self.head = -1
        """The last position that is known to be visible."""

    def forget(self) -> None:
        """Take nothing for known."""
        self._known.clear()

    @property
    def in_doubt(self) -> bool:
        """Whether something of the group at hand may have been committed, and nobody could tell so far."""
        return bool(self._sent)

    def answered(self) -> None:
        """The group at hand has its outcomes, and the next one begins."""
        self._sent.clear()

    async def begin(self, connection: Connection) -> None:
        """Look, on a new connection, where the log is."""
        self.forget()
        self._restored = not await connection.fetchval(_AT_HOME)
        if self._restored:
            self._log.identity = None  # it is to get another one
        elif self._log.identity is None:
            await self._log.learn(connection)

    async def write(self, connection: Connection, group: Sequence[Write]) -> list[Outcome]:
        """Write the group; it is durable when this returns. Raises what asyncpg raises.

        After an error that leaves the outcome open, the same group, or a part of it, may be written again on another
        connection: what was committed is found, and not written twice.
        """
        if self._restored:
            await self.begin(connection)  # it may have been accepted meanwhile
        if self._restored:
            if not _is_renewal(group):
                return [StoreUnavailable(_RESTORED.format(self._shown), waiting_helps=False) for _ in group]
            return await self._write_alone(connection, group, renewing=True)
        if any(event.type == RENEWED for write in group if write.stream == LOG_STREAM for event in write.events):
            self._log.identity = None
        if any(group[0] in draft.writes for draft in self._sent):
            return await self._write_alone(connection, group)
        draft = Draft(self._known)
        with suppress(Unknown):
            draft.add(group)
            if (head := await self._written(connection, draft)) is not None:
                return self._done(draft, head)
        draft, head = await self._looked(connection, group)
        if head is not None:
            return self._done(draft, head)
        return await self._write_alone(connection, group)  # others write to the same streams

    async def _write_alone(
        self, connection: Connection, group: Sequence[Write], *, renewing: bool = False
    ) -> list[Outcome]:
        """Look, decide and write while nobody else can write."""
        try:
            await connection.execute(_BEGIN_ALONE)
            if (outcomes := await self._committed(connection, group)) is not None:
                await connection.execute("COMMIT")
                return outcomes
            draft, head = await self._looked(connection, group)
            assert head is not None, "nobody else can write"
            if renewing and not any(isinstance(outcome, StoreError) for outcome in draft.outcomes):
                await connection.execute("SELECT tidings_log.accept_place()")
            await connection.execute("COMMIT")
        except BaseException:
            connection.terminate()  # the server rolls back; to wait for it could take for ever
            raise
        return self._done(draft, head)

    async def _committed(self, connection: Connection, group: Sequence[Write]) -> list[Outcome] | None:
        """The outcomes that the group had, if a draft of it was committed. The lock must be held: what is not in the
        log now cannot come any more, because this group is decided alike where all that it takes for granted is so.

        All rows are looked for, in one piece: the first one alone may be the caller's earlier attempt, which had other
        neighbours.
        """
        for draft in self._sent:
            outcomes = dict(zip(draft.writes, draft.outcomes, strict=True))
            if not draft.rows or not all(write in outcomes for write in group):
                continue
            keys = [key_of(stream) for stream, *_ in draft.rows]
            versions = [version for _, version, *_ in draft.rows]
            ids = [uuid_of(id_) for _, _, id_, _ in draft.rows]
            count, head, last = await connection.fetchrow(_COMMITTED, keys, versions, ids)
            if count == len(draft.rows) and head == last:
                self.head = max(self.head, head + count)
                return [draft.placed(outcomes[write], head) for write in group]
        return None

    async def _looked(self, connection: Connection, group: Sequence[Write]) -> tuple[Draft, int | None]:
        """Look up everything that the group may ask for, decide and write it."""
        streams, found = asked_of(group)
        for stream, standing in zip(streams, await standings(connection, streams), strict=True):
            self._known[stream] = State(standing.last, standing.document)
        await _find(connection, found)
        draft = Draft(self._known, found)
        draft.add(group)
        return draft, await self._written(connection, draft)

    async def _written(self, connection: Connection, draft: Draft) -> int | None:
        """The head before the draft's rows; None if something that it takes for granted is not so: nothing was
        written."""
        self._sent.append(draft)
        try:
            head: int | None = await connection.fetchval(_APPEND, *draft.arguments())
        except Exception as error:
            if not is_lost(error):
                self._sent.pop()
            raise
        if head is None:
            self._sent.pop()
        return head

    def _done(self, draft: Draft, head: int) -> list[Outcome]:
        """The outcomes of a draft that was committed behind position `head`."""
        if len(self._known) > CACHED_STREAMS:
            self._known.clear()
        for stream, state in draft.states.items():
            if len(state.document) <= CACHED_BYTES:
                self._known[stream] = state
            else:
                self._known.pop(stream, None)
        self.head = max(self.head, head + len(draft.rows))
        return [draft.placed(outcome, head) for outcome in draft.outcomes]


def _is_renewal(group: Sequence[Write]) -> bool:
    """Whether the group is what gives a log a new identity, and nothing else."""
    return all(write.stream == LOG_STREAM and [event.type for event in write.events] == [RENEWED] for write in group)


async def _find(connection: Connection, found: Found) -> None:
    """Fill in what is in the log of what is to be found."""
    if found.ids:
        ids = list(found.ids)
        keys = [key_of(stream) for stream, _ in ids]
        for n, version, position in await connection.fetch(_BY_ID, keys, [uuid_of(id_) for _, id_ in ids]):
            found.ids[ids[n - 1]] = Appended(version, position)
    if found.at:
        versions = list(found.at)
        keys = [key_of(stream) for stream, _ in versions]
        for n, id_, position in await connection.fetch(_BY_VERSION, keys, [version for _, version in versions]):
            found.at[versions[n - 1]] = (id_.bytes, position)
