"""Which held events may run now. It reads only."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.held_events import NEVER_TRIED, HeldEvent, Line, held_event
from tidings.database.scope import AnyScope, Scope
from tidings.database.tables import dead, floors, held, watermarks

__all__ = ["AT_ONCE", "DueEvents"]

AT_ONCE: Final = 256
"""Held events that are read at once: what is due, with its followers."""

_LINE: Final = sa.tuple_(held.c.key, held.c.line)
_OTHER_LINE: Final = _LINE.not_in(sa.bindparam("besides", expanding=True))
_GONE: Final[sa.BindParameter[Any]] = sa.bindparam("gone", expanding=True)
_PAUSED: Final[sa.BindParameter[Any]] = sa.bindparam("paused", expanding=True)

Lines = sa.Select[tuple[str, str]]


_ANY: Final = AnyScope()


class DueEvents:
    """The held events of one bucket range that may run.

    Most services hold nothing, so a statement is made when it is first needed: that takes milliseconds.
    """

    def __init__(self, scope: Scope) -> None:
        self._own = _ANY.values_of(scope)

    async def find(
        self,
        connection: AsyncConnection,
        now: float,
        longest: float,
        besides: Collection[Line],
        after: Collection[Line] | None = None,
        paused: Collection[str] = (),
        gone: Collection[tuple[str, str]] = (),
    ) -> list[HeldEvent]:
        """Return what may run now, of other lines than `besides` and of other handlers than `paused`; each line's
        events in order, `AT_ONCE` at most. No line begins with a handler and type of `gone`.

        A due time further away than `longest` seconds was written by a clock that jumped: it counts as now. What only
        waited for an older event is looked for in the lines `after`, whose events were run, or in all of them, which
        takes as long as there are held events.
        """
        other: dict[str, Any] = self._own | {"besides": list(besides)}
        some = bool(paused or gone)
        if some:
            other |= {"paused": list(paused), "gone": list(gone)}
        lines = list(await connection.execute(_failed()[some], {"now": now, "absurd": now + longest, **other}))
        if after is None:
            lines += await connection.execute(_turn()[some], other)
        elif after:
            lines += await connection.execute(_turn_after()[some], {"after": list(after), **other})
        if not lines:
            return []
        wanted = self._own | {"lines": [tuple(line) for line in lines]}
        return [held_event(row) for row in await connection.execute(_events(), wanted)]

    async def candidate(
        self,
        connection: AsyncConnection,
        handler: str,
        besides: Collection[Line],
        *,
        newest: bool,
        gone: Collection[tuple[str, str]] = (),
    ) -> list[HeldEvent]:
        """Return one event for a trial of a handler, of another line than `besides` and no handler and type of `gone`,
        if there is any: the newest that was never tried, or the one that has been due the longest."""
        wanted = self._own | {"of_handler": handler, "besides": list(besides), "gone": list(gone)}
        for query in (_newest, _longest_due) if newest else (_longest_due, _oldest):
            found = [held_event(row) for row in await connection.execute(query(), wanted)]
            if found:
                return found
        return []


@cache
def _failed() -> dict[bool, Lines]:
    """Lines whose oldest event has failed and is due: with all handlers, and (True) without those that are paused or
    not in the code."""
    failed = (
        sa.select(held.c.key, held.c.line)
        .where(
            *_ANY.in_range(held),
            held.c.attempts > NEVER_TRIED,
            (held.c.due <= sa.bindparam("now")) | (held.c.due > sa.bindparam("absurd")),
            _OTHER_LINE,
            _is_oldest(held),
            *_is_free(held),
        )
        .order_by(held.c.due)
        .limit(AT_ONCE)
    )
    running = sa.and_(held.c.handler.not_in(_PAUSED), sa.tuple_(held.c.handler, held.c.type).not_in(_GONE))
    return {False: failed, True: failed.where(running)}


@cache
def _turn() -> dict[bool, Lines]:
    """Lines whose oldest event has waited for another one, which is gone; keys as for `_failed`."""
    return _waiting()


@cache
def _turn_after() -> dict[bool, Lines]:
    """As `_turn`, of the lines `after`."""
    return _waiting(_LINE.in_(sa.bindparam("after", expanding=True)))


def _waiting(*where: sa.ColumnElement[bool]) -> dict[bool, Lines]:
    waiting = (
        sa.select(
            held.c.key,
            held.c.line,
            sa.func.min(held.c.position).label("position"),
            sa.func.min(held.c.bucket).label("bucket"),
        )
        .where(*_ANY.in_range(held), held.c.attempts == NEVER_TRIED, _OTHER_LINE, *where)
        .group_by(held.c.key, held.c.line)
        .subquery()
    )
    free = (
        sa.select(waiting.c.key, waiting.c.line)
        .where(_is_oldest(waiting), *_is_free(waiting))
        .order_by(waiting.c.position)
        .limit(AT_ONCE)
    )
    first = held.alias()
    of_paused = sa.exists().where(
        *_ANY.of_log(first),
        first.c.position == waiting.c.position,
        first.c.line == waiting.c.line,
        first.c.handler.in_(_PAUSED) | sa.tuple_(first.c.handler, first.c.type).in_(_GONE),
    )
    return {False: free, True: free.where(~of_paused)}


@cache
def _events() -> sa.Select[Any]:
    """The events of `lines`, each up to a dead letter that holds its line."""
    # First which rows, and that from the index: the rest of a row may be large, and many may wait behind one.
    first = (
        sa.select(held.c.position, held.c.handler)
        .where(*_ANY.in_range(held), _LINE.in_(sa.bindparam("lines", expanding=True)))
        .order_by(held.c.position)
        .limit(AT_ONCE)
    )
    # A dead letter that holds its key may stand between held events, older ones having been retried.
    these = sa.tuple_(held.c.position, held.c.handler).in_(first)
    return sa.select(held).where(*_ANY.of_log(held), these, *_is_free(held)).order_by(held.c.position)


@cache
def _newest() -> sa.Select[Any]:
    return _candidate(held.c.attempts == NEVER_TRIED, held.c.position.desc())


@cache
def _longest_due() -> sa.Select[Any]:
    return _candidate(held.c.attempts > NEVER_TRIED, held.c.due)


@cache
def _oldest() -> sa.Select[Any]:
    return _candidate(held.c.attempts == NEVER_TRIED, held.c.position)


def _candidate(tried: sa.ColumnElement[bool], order: sa.ColumnElement[Any]) -> sa.Select[Any]:
    """The first event of `of_handler` in this order that may run."""
    return (
        sa.select(held)
        .where(
            *_ANY.in_range(held),
            held.c.handler == sa.bindparam("of_handler"),
            tried,
            sa.tuple_(held.c.handler, held.c.type).not_in(_GONE),
            _OTHER_LINE,
            _is_oldest(held),
            *_is_free(held),
        )
        .order_by(order)
        .limit(1)
    )


def _is_oldest(event: sa.FromClause) -> sa.ColumnElement[bool]:
    """No held event of its line is older. Buckets are left out, so that the index answers: a key has one bucket."""
    older = held.alias()
    return ~sa.exists().where(
        *_ANY.of_log(older),
        older.c.key == event.c.key,
        older.c.line == event.c.line,
        older.c.position < event.c.position,
    )


def _is_free(event: sa.FromClause) -> tuple[sa.ColumnElement[bool], ...]:
    """No dead letter before it holds its line; and what was held when a replay began has its turn when the replay comes
    to its position."""
    grave = dead.alias()
    holding = sa.exists().where(
        *_ANY.of_log(grave),
        grave.c.holds_key,
        grave.c.key == event.c.key,
        grave.c.line == event.c.line,
        grave.c.position < event.c.position,
    )
    reached = sa.exists().where(
        *_ANY.of_log(watermarks),
        watermarks.c.bucket == event.c.bucket,
        watermarks.c.position >= event.c.position,
    ) | sa.exists().where(
        *_ANY.of_log(floors),
        floors.c.first_bucket <= event.c.bucket,
        floors.c.last_bucket >= event.c.bucket,
        floors.c.position >= event.c.position,
    )
    return ~holding, reached
