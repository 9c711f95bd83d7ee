"""Streams that one store has deleted and then written again. It does no I/O.

EventStoreDB and KurrentDB can answer "not found" to a read right after that (measured: 3 of 60), although the append
was acknowledged. Whoever has appended knows better, and asks once more.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

__all__ = ["AGAIN_SECONDS", "Revived"]

AGAIN_SECONDS: Final = 0.1
"""Seconds until such a stream is read again."""
STREAMS: Final = 1024
"""Streams that are remembered."""


class Revived:
    """What is remembered of the streams of one store."""

    def __init__(self) -> None:
        self._streams: OrderedDict[str, bool] = OrderedDict()
        """Streams that were deleted, with whether they were written since, the oldest first."""

    def deleted(self, stream: str) -> None:
        """The stream was deleted: not finding it is right until it is written again."""
        self._streams.pop(stream, None)
        self._streams[stream] = False
        if len(self._streams) > STREAMS:
            self._streams.popitem(last=False)

    def appended(self, stream: str) -> None:
        """Events were appended to the stream."""
        if self._streams and stream in self._streams:
            self._streams[stream] = True

    def doubts(self, stream: str) -> bool:
        """Whether to ask once more for a stream that was not found; once for each time that it was deleted."""
        return self._streams.get(stream, False) and self._streams.pop(stream)
