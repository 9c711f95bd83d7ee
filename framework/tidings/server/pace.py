"""How fast a client takes what is sent to it, over time: one byte more does not make a slow client a fast one."""

from __future__ import annotations

__all__ = ["Pace"]


class Pace:
    """The pace of one reader. While something waits for it, it must take `rate` bytes a second, or it falls behind."""

    def __init__(self, rate: float, patience: float) -> None:
        self._rate, self._patience = rate, patience
        self._behind = 0.0
        """Seconds that it has fallen behind."""
        self._since = 0.0
        """Since when something waits; 0 while nothing does."""

    @property
    def waits(self) -> bool:
        """Whether something waits."""
        return self._since > 0

    def wait(self, now: float) -> None:
        """Something waits for the client."""
        if not self._since:
            self._since = now

    def took(self, size: int, now: float) -> None:
        """The client has taken so many bytes of it."""
        if self._since:
            # No more than patience: who has not read for long, and does again, is forgiven soon.
            self._behind = min(self._behind + now - self._since, self._patience)
            self._since = now
        self._behind = max(self._behind - size / self._rate, 0.0)

    def rest(self, now: float) -> None:
        """Nothing waits any more."""
        self.took(0, now)
        self._since = 0.0

    def late(self, now: float) -> float:
        """Return the seconds by which patience with it has ended; 0 or less while it has not."""
        return self._behind + now - self._since - self._patience if self._since else 0.0
