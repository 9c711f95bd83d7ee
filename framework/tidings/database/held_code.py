"""Held events and the code of their handlers: which of them nobody can run, and which failed in other code.

Every write takes the connection of the transaction that it belongs to; nothing here begins or commits one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.held_events import NEVER_TRIED, lock_held
from tidings.database.scope import Scope
from tidings.database.tables import held

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["HeldCode", "in_code", "reason_in_code"]

RENEWED_RATE: Final = 50.0
"""Held events per second that become due after a deploy, so that they do not all come at once."""
RENEWED_SECONDS: Final = 60.0
"""Seconds after a deploy in which all held events become due, however many they are."""


def in_code(service: Declaration, handler: str, kind: str) -> bool:
    """Whether the service, as it is declared here, gives events of this type to a handler of this name."""
    return any(known.name == handler for known in service.handlers_of(kind))


def reason_in_code(service: Declaration, handler: str, kind: str | None, reason: str) -> str:
    """Return the reason why an event is held, with what this code adds: without its handler, nobody runs it. Without a
    `kind`, the handler is looked for among those of all types."""
    known = handler in service.named if kind is None else in_code(service, handler, kind)
    if known:
        return reason
    return (
        f"its handler {handler!r} is not in this code: bring it back, or skip or drop the event, or, where a handler "
        f"is the same under a new name, declare that with was=({handler!r},); before: {reason}"
    )


class HeldCode:
    """The code of the handlers that one bucket range has held events of."""

    def __init__(self, scope: Scope) -> None:
        self._in_range = scope.in_range(held)

    async def gone(self, connection: AsyncConnection, service: Declaration) -> set[tuple[str, str]]:
        """Return handler and type of held events that nobody can run, because the handler is not in the code."""
        kinds = sa.select(held.c.handler, held.c.type).where(*self._in_range).distinct()
        return {(row.handler, row.type) for row in await connection.execute(kinds) if not in_code(service, *row)}

    async def outdated(self, connection: AsyncConnection, codes: Mapping[str, str]) -> dict[str, int]:
        """Return how many events have failed in other code than `codes` names, by handler."""
        failed = sa.select(held.c.handler, held.c.code, sa.func.count())
        failed = failed.where(*self._in_range, held.c.attempts > NEVER_TRIED)
        found: dict[str, int] = {}
        for handler, code, count in await connection.execute(failed.group_by(held.c.handler, held.c.code)):
            if handler in codes and code != codes[handler]:
                found[handler] = found.get(handler, 0) + count
        return found

    async def renew(self, connection: AsyncConnection, codes: Mapping[str, str], now: float) -> int:
        """Let events that have failed in other code than `codes` names, by handler, become due from `now` on, with all
        their held attempts before them again. Returns how many they are."""
        found = await self.outdated(connection, codes)
        total = sum(found.values())
        step = min(1 / RENEWED_RATE, RENEWED_SECONDS / max(total, 1))
        other = (*self._in_range, held.c.attempts > NEVER_TRIED, held.c.handler == sa.bindparam("of"))
        if found:
            await lock_held(connection, *self._in_range, held.c.attempts > NEVER_TRIED)
        for handler in found:
            code = codes[handler]
            await connection.execute(
                held.update()
                .where(*other, (held.c.code != code) | held.c.code.is_(None))
                .values(due=now + (held.c.position % total) * step, tries=0, code=code),
                {"of": handler},
            )
        return total
