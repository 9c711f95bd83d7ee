"""Which handlers an event is given to: pure bookkeeping beside the lanes. No I/O.

Mostly all that the service declares for its type. Not those that are done with it already while it waits for another
handler (`partial`), not those that began after it, and not those that are behind in its bucket and come to it on their
own (`tidings.catchup`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tidings.handlers import Handler

__all__ = ["Partial", "Roster"]

Partial = Mapping[int, Mapping[str, bool]]
"""Position to the handlers that are done with the event there; True for one that a replay has run again."""


class Roster:
    """Of one bucket range; `of` says which handlers the service declares for a type, in their order."""

    def __init__(self, of: Callable[[str], tuple[Handler, ...]], partial: Partial) -> None:
        self._of = of
        self.partial = partial
        self.since: Mapping[str, int] = {}
        """Handler to the position after which it is given events."""
        self._upto = -1
        """Above it, every handler is given every event of its types."""
        self.behind: dict[int, dict[str, int]] = {}
        """By bucket: handlers that are not given its events now, to the position up to which they are done."""
        self.known = False
        """What the database says of handlers was read."""
        self.generation = 0
        """Counts how often it was read."""

    def read(self, since: Mapping[str, int], behind: dict[int, dict[str, int]]) -> None:
        """What the database says; `behind` becomes ours to change."""
        self.since, self.behind, self.known = since, behind, True
        self.generation += 1
        self._upto = max(since.values(), default=-1)

    def handlers(self, type: str, bucket: int, position: int) -> tuple[Handler, ...]:
        """Those that are given this event of the bucket, in the order in which they run."""
        found = self._of(type)
        if position > self._upto and not self.behind and not self.partial:
            return found
        behind, done = self.behind.get(bucket, {}), self.partial.get(position, {})
        return tuple(
            handler
            for handler in found
            if position > self.since.get(handler.name, -1)
            and handler.name not in behind
            and done.get(handler.name, True)
        )

    def again(self, handler: str, position: int) -> bool:
        """A replay has the handler run this event again, though its bucket's watermark never passed it."""
        return bool(self.partial) and self.partial.get(position, {}).get(handler, False)

    def late(self, type: str, bucket: int, position: int) -> list[Handler]:
        """Those that are behind in the bucket, and have not done this event of it."""
        behind = self.behind.get(bucket)
        if not behind:
            return []
        return [handler for handler in self._of(type) if position > behind.get(handler.name, position)]

    def caught_up(self, bucket: int) -> list[str]:
        """No handler is behind in the bucket from now on: those that were."""
        return list(self.behind.pop(bucket, ()))
