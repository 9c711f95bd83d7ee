"""What access lists (`$acl`) permit, read from the log itself. It knows no passwords."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from typing import Final

from tidings.stores.rules import document_of
from tidings.stores.sqlite.log import latest_data

__all__ = ["ADMINS", "IDENTITY", "SERVICES", "Reader", "closed", "permitted"]

SERVICES: Final = "$tidings-services"
"""The role of users that read `$all` without being administrators."""
ADMINS: Final = "$admins"
IDENTITY: Final = "tidings_log"
"""The stream that the log's identity is in. Services stop when it is gone, so nobody but administrators writes it."""
OWN: Final = "tidings_"
"""How the names of Tidings' own streams begin, as those of relays' checkpoints."""
ALL: Final = "$all"
_SECRET: Final = ("$user-", "$users", "$$$user")
"""Beginnings of streams that only administrators see in `$all`: hashes of passwords lie there."""


def closed(operation: str, stream: str) -> bool:
    """Whether this could take the log's identity away, which would end the installation: not even administrators may.

    Its metadata can hide it (`$tb`, `$maxCount`), and so can the metadata of its metadata.
    """
    original = stream
    while original.startswith("$$"):
        original = original[2:]
    return original == IDENTITY and (operation == "$d" or (operation == "$w" and stream != IDENTITY))


def permitted(connection: sqlite3.Connection, roles: Collection[str], operation: str, stream: str) -> bool:
    """Whether one of the roles may.

    The stream's own access list says so. Without one, only administrators reach system streams, who may read `$all`
    writes Tidings' own streams, and everybody reaches the others.
    """
    if ADMINS in roles:
        return True
    if stream.startswith("$$"):
        stream, operation = stream[2:], {"$r": "$mr"}.get(operation, "$mw")
    if stream == IDENTITY and operation not in ("$r", "$mr"):
        return False
    return not _allowed(connection, stream, operation).isdisjoint(roles)


def _allowed(connection: sqlite3.Connection, stream: str, operation: str) -> set[str]:
    access = document_of(latest_data(connection, f"$${stream}")[0]).get("$acl")
    listed = access.get(operation) if isinstance(access, dict) else None
    if isinstance(listed, str):
        return {listed}
    if isinstance(listed, list):
        return {str(name) for name in listed}
    if stream == ALL and operation == "$r":
        return {SERVICES}
    if stream.startswith(OWN) and operation not in ("$r", "$mr"):
        return _allowed(connection, ALL, "$r")  # relays and services, which read the log
    return set() if stream.startswith("$") else {"$all"}


class Reader:
    """A user who reads: decides about single events. Compares equal to others with the same roles."""

    def __init__(self, roles: frozenset[str]) -> None:
        self.roles = roles

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reader) and self.roles == other.roles

    def __hash__(self) -> int:
        return hash(self.roles)

    def may(self, connection: sqlite3.Connection, stream: str) -> bool:
        """Whether the user may read this stream, to which a link leads."""
        return permitted(connection, self.roles, "$r", stream)

    def sees(self, stream: str) -> bool:
        """Whether `$all` shows the user the stream's events."""
        return not stream.startswith(_SECRET)
