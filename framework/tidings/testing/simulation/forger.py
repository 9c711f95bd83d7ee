"""The forger: whoever may publish to the exchange, or append to the log.

Its messages are well formed, name the right log, and claim what the log does not hold yet. Believed, they make a
service pass over the events that are given those positions later. Its events stand under the ids that the service's own
would have without a key. Believed, they keep those out of the log.
"""

from __future__ import annotations

from uuid import UUID

from tidings.modelling.events import wire_name
from tidings.protocol.identity import digest
from tidings.protocol.message import Marker, Message, encode
from tidings.protocol.position import bucket_of
from tidings.stores import EventData, RecordedEvent
from tidings.testing.simulation.service import Answered, Ignored

__all__ = ["forged", "suppressing"]


def forged(log: UUID, position: int, event: tuple[str, str, int, int, str | None] | None) -> Message:
    """Return a message that claims `position`: a marker, or the given event of a plan."""
    if event is None:
        return Marker(log, position, -1, {}).encode()
    kind, stream, n, fails, _ = event
    data = b'{"n":%d,"fails":%d}' % (n, fails)
    record = RecordedEvent(position, stream, 0, kind, data, b"", True, UUID(int=n + 1).bytes, 0)
    return encode(record, log=log, previous=-1, bucket=bucket_of(stream))


def suppressing(log: UUID, service: str, handler: str, cause: int, stream: str) -> EventData:
    """Return an event under the id that the handler's answer to the event at position `cause` would have without a
    key."""
    identity = digest(service, handler, str(log), str(cause), "emit", stream, wire_name(Answered), "0")
    return EventData(wire_name(Ignored), b"{}", id=identity)
