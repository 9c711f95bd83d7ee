"""News: what tells a relay at work from messages that are sent again.

Whoever may publish can send old messages again for ever, and a seal does not tell them from new ones. So a message is
news only if it names a higher position than each one before it on its connection, and than what was accepted before
the connection. A relay whose log rests has no news either: its markers repeat themselves. They prove that it is at
work, as long as they do not fall short of what the log holds. It accepts nothing and reads nothing.
"""

from __future__ import annotations

__all__ = ["News"]


class News:
    """What one bucket range has heard of how far the relay is."""

    __slots__ = ("at", "came_at", "furthest", "owed")

    def __init__(self) -> None:
        self.at: float | None = None
        """When news came last, by the site's clock."""
        self.came_at: float | None = None
        """When a message came last, news or not."""
        self.owed = -1
        """The log holds an event here that services get, and nothing came for so long that a relay at work would have
        published it."""
        self.furthest = -1
        """What is not beyond this position is no news."""

    def begin(self, reached: int) -> None:
        """A connection was made, or this process is chosen: what goes beyond `reached`, which was accepted, is news."""
        self.furthest = reached

    def hear(self, position: int, now: float) -> None:
        """A message, an event or a marker, names this position."""
        self.came_at = now
        if position > self.furthest:
            self.furthest, self.at = position, now

    def current(self, marker: int) -> bool:
        """Whether a marker that names this position proves that a relay is at work."""
        return marker >= self.owed
