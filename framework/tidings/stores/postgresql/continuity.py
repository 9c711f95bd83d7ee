"""Whether a new connection leads to the log that the process knows: not to another one, nor to one without its end."""

from __future__ import annotations

from contextlib import suppress
from uuid import UUID

from tidings.errors import StoreUnavailable
from tidings.stores.postgresql.connections import Connection
from tidings.stores.postgresql.log import head, log_id

__all__ = ["Continuity"]


class Continuity:
    """What the process has seen of its log, whichever connection told it."""

    def __init__(self, shown: str) -> None:
        self._shown = shown
        self.identity: UUID | None = None
        """None: not known, or about to be renewed."""
        self.head = -1
        """The last position that was seen."""

    async def learn(self, connection: Connection) -> None:
        """Take the log's identity, whatever it is, for the one that it has to keep."""
        with suppress(StoreUnavailable):  # it has lost it, as whoever asks for it is told
            self.identity = await log_id(connection)

    async def check(self, connection: Connection) -> None:
        """Raise `StoreUnavailable` if this is not the log as it was, gone on or not."""
        known, least = self.identity, self.head  # before the look, not what is written meanwhile
        if known is not None and (found := await log_id(connection)) != known:
            raise StoreUnavailable(
                f"the event store {self._shown} holds the log {found}, and held the log {known} before: the database "
                "was replaced, or the log got a new identity. If TIDINGS_STORE leads to a wrong database, correct "
                "that; otherwise stop everything, run  tidings log adopt  for each service "
                "(docs/restoring.md), and start again",
                waiting_helps=False,
            )
        if least >= 0:
            self.check_end(await head(connection), least)

    def check_end(self, found: int, known: int) -> None:
        """Raise `StoreUnavailable` if the log's head is below a position that was there before."""
        if found < known:
            raise StoreUnavailable(
                f"the event store {self._shown} has lost its end: it reaches position {found}, and reached {known} "
                "before. An older state of the database was restored, or a standby took over without having received "
                "everything. If the rest is on another server, name that one in TIDINGS_STORE; otherwise stop "
                "everything, run  tidings log renew-identity , then  tidings log adopt  for each service "
                "(docs/restoring.md), and start again",
                waiting_helps=False,
            )
