"""What goes wrong with a PostgreSQL server, as errors that say what to do. It runs no statement."""

from __future__ import annotations

from typing import Final

import asyncpg

from tidings.errors import StoreUnavailable, TidingsError

__all__ = ["is_lost", "of_one_write", "state_of", "unavailable"]

_REFUSED: Final = ("28", "3D000", "42501")
"""Codes that only a person can mend: who is let in, a database that is not there, rights."""
_LOST: Final = ("08", "25006", "57P")
"""Codes after which a connection is of no use any more: it broke, the server is a standby, or is shutting down."""
_OF_ONE: Final = ("22", "23", "53100", "53200", "54")
"""Codes that one write of a group may have brought about, by its size or what is in it."""
_REMEDIES: Final = {
    ("28",): "Check user and password in TIDINGS_STORE, and what pg_hba.conf allows",
    ("3D000",): "Create the database (createdb NAME), or correct its name in TIDINGS_STORE",
    (
        "42501",
    ): "Let its user create the schema (GRANT CREATE ON DATABASE ... TO ...), or fill one that is empty (GRANT "
    "USAGE, CREATE ON SCHEMA tidings_log TO ...), or use the log that another user made (GRANT USAGE ON SCHEMA "
    "tidings_log TO ...; GRANT ALL ON ALL TABLES IN SCHEMA tidings_log TO ...; GRANT EXECUTE ON ALL FUNCTIONS IN "
    "SCHEMA tidings_log TO ...)",
    ("42704",): "An option in TIDINGS_STORE is none that PostgreSQL knows: correct it, or leave it out",
    ("3F", "42P01", "42883"): "The schema tidings_log is not whole: restore a backup of the database, and give the log "
    "a new identity (tidings log renew-identity)",
    ("25006",): "It takes no writes, as a standby does: name the primary in TIDINGS_STORE, or all hosts "
    "(postgresql://host1,host2/database)",
    ("53100",): "The disk is full: free some space and try again",
    ("53300",): "Raise its max_connections, or look for who holds so many (pg_stat_activity)",
    ("TL001",): "It is being restored, or a restore broke off: wait until it has ended, or restore the backup again",
    ("55P03",): "Another transaction holds the log: end it, or try again",
    ("57014",): "Its statement_timeout is too short, or the server is overloaded: ALTER ROLE ... SET statement_timeout",
    ("57P03",): "It is starting, stopping or recovering: try again",
    ("57P",): "It was stopped, or somebody ended the connection: try again",
    ("58", "XX"): "The server failed: look into its log before you go on",
}
"""What to do, by the beginning of PostgreSQL's code (appendix A of its manual)."""


def state_of(error: BaseException) -> str:
    """Return PostgreSQL's code of an error; "" for one that is not the server's."""
    return str(getattr(error, "sqlstate", None) or "")


def is_lost(error: BaseException) -> bool:
    """Return whether the connection is gone, so that what it was doing has an unknown outcome, and another may help."""
    if isinstance(error, asyncpg.PostgresError):
        return state_of(error).startswith(_LOST)
    # The last one is what asyncpg says when the server's goodbye comes while it is about to send a statement.
    lost = OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError
    return isinstance(error, lost) and not isinstance(error, ValueError)


def of_one_write(error: BaseException) -> bool:
    """Return whether one write of a group may be to blame, so that the others need not fail with it."""
    return state_of(error).startswith(_OF_ONE) or not (state_of(error) or is_lost(error))


def unavailable(shown: str, error: BaseException, holder: str = "") -> StoreUnavailable:
    """Return what happened, and what to do about it. `holder` says who holds a lock. Our own errors say it already."""
    if isinstance(error, TidingsError):
        return StoreUnavailable(str(error), waiting_helps=getattr(error, "waiting_helps", False))
    state = state_of(error)
    remedy = next((text for states, text in _REMEDIES.items() if state.startswith(states)), "")
    if not remedy:
        remedy = (
            "See the cause" if state else "Check that the server runs and that its address in TIDINGS_STORE is right"
        )
    said = f"{error}" or type(error).__name__
    if isinstance(error, TimeoutError):  # which has no words of its own
        said, remedy = "it did not answer", "Its server is paused, overloaded or cut off: look there"
    return StoreUnavailable(
        f"the event store {shown} failed: {said.rstrip('.')}{holder}. {remedy}.",
        waiting_helps=not state.startswith((*_REFUSED, "3F", "42")),
    )
