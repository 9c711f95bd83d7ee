"""What clients may cost the server: budgets per connection, user and process. It knows no sockets and no events.

Where waiting helps, a client waits for room; where it does not, it is refused, and the refusal says which budget.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from time import monotonic
from typing import Final, Self

from tidings.errors import ConfigurationError
from tidings.server.refusals import Refusal, exhausted

__all__ = ["Allowance", "Bucket", "Charge", "Limits", "Reservations", "Treasury"]

MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """The server's budgets. Sizes are bytes, times are seconds."""

    connections: int = 1000
    """Connections at once. Beyond that, the one that has been idle the longest makes room."""
    streams: int = 100
    """Calls at once on one connection, as HTTP/2's SETTINGS announce."""
    user_streams: int = 1000
    """Calls at once of one user, over all connections."""
    connection_bytes: int = 32 * MIB
    """Bytes of requests and answers that may wait for one connection; at least 24 MiB, for the largest request."""
    user_bytes: int = 64 * MIB
    """The same for one user, over all connections."""
    process_bytes: int = 128 * MIB
    """The same for all clients together."""
    resets: int = 200
    """Calls that a connection may give up unanswered at once; a tenth of them come back in a second."""
    frames: int = 2000
    """Frames without data that a connection may send at once; a tenth of them come back in a second."""
    failed_logins: int = 5
    """Wrong passwords on one connection, which is then ended."""
    user_failed_logins: int = 50
    """Wrong passwords for one user at once; a tenth of them come back in a second."""
    handshake_seconds: float = 10.0
    """Seconds from connecting to the first frame."""
    request_seconds: float = 30.0
    """Seconds that a request may take to arrive, from its first byte to its last, and until the first one of a call."""
    stalled_seconds: float = 2.0
    """Seconds without reading after which a client is ended, where its answers are more than a budget of bytes."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ConfigurationError(f"the server's limit {field.name} must be more than 0")
        if not 24 * MIB <= self.connection_bytes <= self.process_bytes:
            raise ConfigurationError(
                "the server's limit connection_bytes must be 24 MiB or more, for the largest request, and at most "
                "process_bytes"
            )


class Bucket:
    """Tokens that come back with time."""

    def __init__(self, size: int, clock: Callable[[], float] = monotonic) -> None:
        self._size, self._clock = float(size), clock
        self._left, self._at = self._size, clock()

    def _refill(self) -> None:
        now = self._clock()
        self._left = min(self._size, self._left + (now - self._at) * self._size / 10)
        self._at = now

    def take(self, count: float = 1) -> bool:
        """Whether there was enough."""
        self._refill()
        self._left -= count
        return self._left >= 0

    def give(self, count: float) -> None:
        self._left = min(self._size, self._left + count)

    @property
    def empty(self) -> bool:
        self._refill()
        return self._left < 1


class Treasury:
    """What all connections of a server use together."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.bytes = 0
        self.user_bytes: Counter[str] = Counter()
        self.user_streams: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        """How often each budget was used up."""
        self.large = Reservations(limits.process_bytes * 3 // 4)

    def refusal(self, budget: str, details: str) -> Refusal:
        self.refused[budget] += 1
        return exhausted(details)


class Allowance:
    """What one connection uses."""

    def __init__(self, treasury: Treasury) -> None:
        self.treasury = treasury
        self.limits = treasury.limits
        self.bytes = 0
        self.resets = Bucket(self.limits.resets)
        self.frames = Bucket(self.limits.frames)
        self.large = Reservations(self.limits.connection_bytes * 3 // 4, treasury.large)
        self.failed_logins = 0
        self.logging_in = asyncio.Lock()
        """Held while a password is checked: one at a time."""

    def excess(self, user: str) -> str:
        """The budget of bytes that is used up; empty where none is."""
        limits, treasury = self.limits, self.treasury
        if self.bytes > limits.connection_bytes:
            return f"connection_bytes ({limits.connection_bytes})"
        if user and treasury.user_bytes[user] > limits.user_bytes:
            return f"user_bytes ({limits.user_bytes})"
        if treasury.bytes > limits.process_bytes:
            return f"process_bytes ({limits.process_bytes})"
        return ""


class Charge:
    """The bytes and the stream that one call uses, until `clear`."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._treasury = allowance.treasury
        self.bytes = 0
        self._user = ""
        self._over = False

    def of(self, user: str) -> None:
        """The caller is known now. Raises `Refusal` where the user has too many calls."""
        if not user or self._over:
            return
        treasury = self._treasury
        if treasury.user_streams[user] >= treasury.limits.user_streams:
            raise treasury.refusal(
                "user_streams", f"The user has {treasury.limits.user_streams} calls, as many as a user may have."
            )
        self._user = user
        treasury.user_streams[user] += 1
        treasury.user_bytes[user] += self.bytes

    def hold(self, size: int) -> None:
        """Count `size` bytes more, or less."""
        if self._over:
            return
        self.bytes += size
        self._allowance.bytes += size
        self._treasury.bytes += size
        if self._user:
            self._treasury.user_bytes[self._user] += size

    def take(self, size: int) -> None:
        """Count `size` bytes more. Raises `Refusal` when a budget has no room for them."""
        self.hold(size)
        if budget := self.excess():
            self.hold(-size)
            raise self._treasury.refusal(budget.split()[0], f"More bytes of requests wait than the server's {budget}.")

    def excess(self) -> str:
        return self._allowance.excess(self._user)

    def clear(self) -> None:
        """The call is over. What is counted later is not."""
        self.hold(-self.bytes)
        self._over = True
        if self._user:
            streams = self._treasury.user_streams
            streams[self._user] -= 1
            if not streams[self._user]:  # so does nothing that the user holds
                del streams[self._user], self._treasury.user_bytes[self._user]
        self._user = ""


class Reservations:
    """Room for requests that are larger than a call's window: who comes first gets all of it, so that it can end.

    With `above`, what has room here asks there, too.
    """

    def __init__(self, room: int, above: Self | None = None) -> None:
        self._left = room
        self._above = above
        self._waiting: deque[tuple[object, int, Callable[[], None]]] = deque()
        self._granted: dict[object, int] = {}

    def ask(self, who: object, size: int, granted: Callable[[], None]) -> None:
        """Call `granted` when there is room, which may be at once. Asking again changes nothing."""
        if who not in self._granted and all(who is not other for other, _, _ in self._waiting):
            self._waiting.append((who, size, granted))
            self._serve()

    def give_back(self, who: object) -> None:
        """Harmless for who has nothing."""
        size = self._granted.pop(who, None)
        if size is None:
            self._waiting = deque(entry for entry in self._waiting if entry[0] is not who)
        else:
            self._left += size
            if self._above is not None:
                self._above.give_back(who)
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][1] <= self._left:
            who, size, granted = self._waiting.popleft()
            self._left -= size
            self._granted[who] = size
            if self._above is None:
                granted()
            else:
                self._above.ask(who, size, granted)
