"""All connections of a server: who may come, who must go. It reads and writes nothing itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Final, Protocol

import structlog

from tidings.server.budgets import Allowance, Treasury
from tidings.server.http2_stream import Stream
from tidings.server.refusals import Refusal, exhausted

__all__ = ["Connections"]

log = structlog.get_logger(__name__)

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

    def late(self, now: float) -> float: ...

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
        """Whether there is room for one more. The one that has been idle the longest makes room: first one without the
        right credentials, which need not be idle."""
        if len(self._members) >= self.treasury.limits.connections:
            strangers = [other for other in self._members if not other.allowance.trusted]
            candidates = (
                [other for other in strangers if other.idle]
                or strangers
                or [other for other in self._members if other.idle]
            )
            if not candidates:
                self.treasury.refused["connections"] += 1
                return False
            longest = min(candidates, key=lambda other: other.since)
            del self._members[longest]
            longest.end_for("other clients need the connection")
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
            try:
                for member in self:
                    member.look_for_slow(loop.time())
                self.relieve()
            except Exception:  # a fault with one client is not to end the server
                log.exception("connections.not_looked_at")

    def relieve(self) -> None:
        """Where a budget of bytes is used up, end calls whose clients read too slowly: who is the latest goes first."""
        now = asyncio.get_running_loop().time()
        slow = [
            (stream.late(now), stream)
            for member in self._members
            if self._is_over(member)
            for stream in member.streams
            if stream.refused is None and stream.late(now) > 0
        ]
        for _, stream in sorted(slow, key=lambda each: -each[0]):
            charge = stream.charge
            if charge.excess() or self.treasury.wants(charge):
                self.treasury.refused["stalled"] += 1
                charge.clear()
                stream.refuse(exhausted("The answers are read too slowly, and others need the server's memory."))
        for member in list(self._members):
            line = member.allowance.line
            if line.bytes and (line.excess() or self.treasury.wants(line)) and member.late(now) > 0:
                member.end_for("its answers are read too slowly")
        self.treasury.make_room()

    def _is_over(self, member: _Member) -> bool:
        """Whether one of its calls may be over a budget: looking at each of them takes longer."""
        treasury = self.treasury
        return (
            bool(treasury.waiting)
            or bool(member.allowance.excess(""))
            or max(treasury.user_bytes.values(), default=0) > treasury.limits.user_bytes
        )
