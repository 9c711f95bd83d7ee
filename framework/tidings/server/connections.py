"""All connections of a server: who may come, who must go. It reads and writes nothing itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Final, Protocol

from tidings.server.budgets import Allowance, Treasury
from tidings.server.http2_stream import Stream
from tidings.server.refusals import Refusal, exhausted

__all__ = ["Connections"]

TICK: Final = 1.0
"""Seconds between two looks at who is slow."""


class _Member(Protocol):
    """A connection as the limits of all see it."""

    allowance: Allowance
    since: float

    @property
    def idle(self) -> bool: ...

    @property
    def busy(self) -> bool: ...

    @property
    def streams(self) -> Iterable[Stream]: ...

    def end_for(self, reason: str) -> None: ...

    def look_for_slow(self, now: float) -> None: ...

    def leave(self) -> None: ...

    def drop(self, refusal: Refusal) -> None: ...


class Connections:
    """The connections of one server, with what they use together."""

    def __init__(self, treasury: Treasury) -> None:
        self.treasury = treasury
        self._members: dict[_Member, None] = {}

    def admit(self, member: _Member) -> bool:
        """Whether there is room for one more. The one that has been idle the longest makes room."""
        if len(self._members) >= self.treasury.limits.connections:
            idle = [other for other in self._members if other.idle]
            if not idle:
                self.treasury.refused["connections"] += 1
                return False
            longest = min(idle, key=lambda other: other.since)
            del self._members[longest]
            longest.end_for("other clients need the connection, which was idle")
        self._members[member] = None
        return True

    def discard(self, member: _Member) -> None:
        self._members.pop(member, None)

    def __iter__(self) -> Iterator[_Member]:
        return iter(list(self._members))

    async def run(self) -> None:
        """End clients that are too slow, again and again."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(TICK)
            for member in self:
                member.look_for_slow(loop.time())
            self.relieve()

    def relieve(self) -> None:
        """Where a budget of bytes is used up, end calls whose clients do not read: who stopped first goes first."""
        limits = self.treasury.limits
        now = asyncio.get_running_loop().time()
        stalled = [
            stream
            for member in self._members
            if self._is_over(member)
            for stream in member.streams
            if stream.stalled and stream.failure is None and now - stream.stalled >= limits.stalled_seconds
        ]
        for stream in sorted(stalled, key=lambda stream: stream.stalled):
            if budget := stream.charge.excess():
                self.treasury.refused["stalled"] += 1
                stream.charge.clear()
                stream.refuse(exhausted(f"The answers are not read, and more bytes wait than the server's {budget}."))

    def _is_over(self, member: _Member) -> bool:
        """Whether one of its calls may be over a budget: looking at each of them takes longer."""
        treasury = self.treasury
        return (
            treasury.bytes > treasury.limits.process_bytes
            or member.allowance.bytes > treasury.limits.connection_bytes
            or max(treasury.user_bytes.values(), default=0) > treasury.limits.user_bytes
        )
