"""What an event in the log says of itself: its id, its type, and which service emitted it for which cause.

An id alone proves little, because whoever can compute it can append anything under it. An event counts as one that the
service has emitted only if all of this agrees. Pure; no I/O.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

from tidings.database.staged_events import StagedEvent
from tidings.modelling.codec import CAUSATION, read_metadata
from tidings.protocol.identity import instead_of
from tidings.stores import EventData, RecordedEvent

__all__ = ["Sought", "claim"]

HANDLER: Final = b'"tidingsHandler"'
"""Key in the metadata of everything that handlers and requests emit."""


def claim(event: RecordedEvent) -> bytes | None:
    """Return 16 bytes that stand for everything that the event says of itself; None for one that nobody emitted."""
    return _digest(event.id_bytes, _origin(event)) if HANDLER in event.metadata else None


def _origin(event: RecordedEvent | EventData) -> bytes:
    own = read_metadata(event)
    service = str(own.get("tidingsHandler")).partition(".")[0]
    return f"{len(service)} {service} {own.get(CAUSATION)} {event.type}".encode("utf-8", "surrogatepass")


def _digest(id_bytes: bytes, origin: bytes) -> bytes:
    return blake2b(id_bytes + origin, digest_size=16).digest()


class Sought:
    """A staged event that is looked for in the log, under all ids that it may have there."""

    __slots__ = ("claims", "foreign", "ids", "row")

    def __init__(self, row: StagedEvent) -> None:
        self.row = row
        origin = _origin(row.event)
        self.ids = {identity.bytes for identity in (*row.ids, instead_of(row.event.id))}
        self.claims = {_digest(id_bytes, origin) for id_bytes in self.ids}
        self.foreign: RecordedEvent | None = None
        """An event of somebody else that was met under one of the ids."""

    def is_it(self, event: RecordedEvent) -> bool:
        """Whether this event is the one that is looked for."""
        if event.id_bytes not in self.ids:
            return False
        if claim(event) in self.claims:
            return True
        self.foreign = event
        return False
