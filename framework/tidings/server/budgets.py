"""What clients may cost the server: budgets per connection, user and process. It knows no sockets and no events.

Where waiting helps, a client waits for room; where it does not, it is refused, and the refusal says which budget.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf
from time import monotonic
from typing import Any, Final, NamedTuple, Self

from tidings.errors import ConfigurationError
from tidings.server.refusals import Refusal, exhausted

__all__ = ["Allowance", "Bucket", "Charge", "Limits", "Reservations", "Treasury"]

MIB: Final = 1024 * 1024
CALL: Final = 16 * 1024
"""Bytes that a call counts for, whatever it holds."""
LOOKED_AT: Final = 16
"""Calls that wait for room and are looked at when there is some."""
LITTLE: Final = MIB
"""Bytes of a connection that uses little."""
SPARE: Final = MIB
"""Bytes that reads leave of every budget, so that requests, and what waits in the line, still find room."""
PAGES: Final = ((0.25, 512 * 1024), (0.5, 64 * 1024), (inf, 16 * 1024))
"""Bytes of the log that a call reads at once, by the part of a budget that is used up to which it does."""


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
    """Seconds for which a client may take its answers too slowly, where a budget of bytes is used up."""
    slowest_reader: int = 16 * 1024
    """Bytes of its answers that a client must take in a second, where a budget of bytes is used up."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 < getattr(self, field.name) < inf:  # which nan is not, either
                raise ConfigurationError(f"the server's limit {field.name} must be a number above 0")
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

    @property
    def used(self) -> bool:
        """Whether something was taken that has not come back yet."""
        self._refill()
        return self._left < self._size


class Treasury:
    """What all connections of a server use together. Where it has `users`, most is theirs: who gives no credentials has
    a quarter."""

    def __init__(self, limits: Limits, *, users: bool = False) -> None:
        self.limits = limits
        self.users = users
        self.bytes = 0
        self.nameless_bytes = 0
        """Of these, the bytes of callers that are nobody's yet."""
        self.user_bytes: Counter[str] = Counter()
        self.user_streams: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        """How often each budget was used up."""
        self.large = Reservations(limits.process_bytes * 3 // 4)

        self.waiting: deque[Waiting] = deque()
        """Calls that wait for room."""

    def make_room(self) -> None:
        """Give one of the calls that wait what it waits for, if there is room for it now."""
        for _ in range(min(LOOKED_AT, len(self.waiting))):
            first = self.waiting.popleft()
            if first.turn.done():
                continue
            if first.charge.excess(first.size, SPARE):
                self.waiting.append(first)
                continue
            first.charge.hold(first.size)
            first.turn.set_result(None)
            return

    def wants(self, charge: Charge) -> bool:
        """Whether somebody waits for what this call holds."""
        return any(waiting.wants(charge) for waiting in self.waiting)

    def refusal(self, budget: str, details: str) -> Refusal:
        self.refused[budget] += 1
        return exhausted(details)


class Allowance:
    """What one connection uses."""

    def __init__(self, treasury: Treasury) -> None:
        self.treasury = treasury
        self.limits = treasury.limits
        self.bytes = 0
        self.user = ""
        """The last caller who has given the right credentials."""
        self.line = Charge(self)
        """What the connection itself holds: bytes that are no request yet."""
        self.resets = Bucket(self.limits.resets)
        self.frames = Bucket(self.limits.frames)
        self.large = Reservations(self.limits.connection_bytes * 3 // 4, treasury.large)
        self.failed_logins = 0
        self.logging_in = asyncio.Lock()
        """Held while a password is checked: one at a time."""

    @property
    def trusted(self) -> bool:
        """Whether somebody with the right credentials has called, or nobody needs any."""
        return bool(self.user) or not self.treasury.users

    def excess(self, user: str, more: int = 0, spare: int = 0) -> str:
        """The budget of bytes that is used up, or would be with `more`; empty where none is."""
        limits, treasury = self.limits, self.treasury
        if self.bytes + more + spare > limits.connection_bytes:
            return f"connection_bytes ({limits.connection_bytes})"
        if user and treasury.user_bytes[user] + more + spare > limits.user_bytes:
            return f"user_bytes ({limits.user_bytes})"
        # A part is left to connections that use little, so that some that use much do not stop all the others.
        if treasury.bytes + more + spare > limits.process_bytes * (4 if self.bytes + more <= LITTLE else 3) // 4:
            return f"process_bytes ({limits.process_bytes})"
        if treasury.users and not user and treasury.nameless_bytes + more > limits.process_bytes // 4:
            return f"process_bytes ({limits.process_bytes}, of which callers without credentials have a quarter)"
        return ""


class Charge:
    """The bytes and the stream that one call uses, until `clear`."""

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance
        self._treasury = allowance.treasury
        self.bytes = 0
        self.user = ""
        self._is_call = False
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
        treasury.user_streams[user] += 1
        self._is_call = True
        self.belongs_to(user)
        if not self.allowance.user:
            self.allowance.user = user
            self.allowance.line.belongs_to(user)

    def belongs_to(self, user: str) -> None:
        """What it holds is the user's from now on."""
        self.user = user
        self._treasury.user_bytes[user] += self.bytes
        self._treasury.nameless_bytes -= self.bytes

    def hold(self, size: int) -> None:
        """Count `size` bytes more, or less."""
        if self._over or not size:
            return
        treasury = self._treasury
        self.bytes += size
        self.allowance.bytes += size
        treasury.bytes += size
        if self.user:
            treasury.user_bytes[self.user] += size
        else:
            treasury.nameless_bytes += size
        if size < 0 and treasury.waiting:
            treasury.make_room()

    def take(self, size: int) -> None:
        """Count `size` bytes more. Raises `Refusal` when a budget has no room for them."""
        self.check(size)
        self.hold(size)

    def check(self, size: int) -> None:
        """Raise `Refusal` when a budget has no room for `size` bytes more."""
        if budget := self.excess(size):
            raise self._treasury.refusal(budget.split()[0], f"More bytes of requests wait than the server's {budget}.")

    def until(self, done: asyncio.Future[Any], size: int) -> None:
        """Count `size` bytes until that is done, also when the call is over before."""
        apart = Charge(self.allowance)
        if self.user:
            apart.belongs_to(self.user)
        apart.hold(size)
        done.add_done_callback(lambda _: apart.hold(-size))

    async def wait_for(self, size: int) -> None:
        """Count `size` bytes more when there is room for them. Raises `Refusal` after `request_seconds`."""
        budget = self.excess(size, SPARE)
        if not budget:
            self.hold(size)
            return
        treasury = self._treasury
        waiting = Waiting(self, size, budget, asyncio.get_running_loop().create_future())
        treasury.waiting.append(waiting)
        try:
            async with asyncio.timeout(treasury.limits.request_seconds):
                await waiting.turn
        except BaseException as error:
            if waiting.turn.done() and not waiting.turn.cancelled():
                self.hold(-size)
            if isinstance(error, TimeoutError):
                raise treasury.refusal("room", f"There was no room for the answer in the server's {budget}.") from None
            raise
        treasury.make_room()  # there may be more

    def excess(self, more: int = 0, spare: int = 0) -> str:
        """The budget that is used up, or would be with `more` bytes; empty where none is."""
        return self.allowance.excess(self.user, more, spare)

    @property
    def page(self) -> int:
        """Bytes of the log that the call may read at once: less where much of its connection's, its user's or the
        process's budget is used."""
        treasury, allowance, limits = self._treasury, self.allowance, self.allowance.limits
        used = max(treasury.bytes / limits.process_bytes, allowance.bytes / limits.connection_bytes)
        if self.user:
            used = max(used, treasury.user_bytes[self.user] / limits.user_bytes)
        return next(size for part, size in PAGES if used <= part)

    def clear(self) -> None:
        """The call is over. What is counted later is not."""
        self.hold(-self.bytes)
        self._over = True
        treasury, user, self.user = self._treasury, self.user, ""
        if user and self._is_call:
            treasury.user_streams[user] -= 1
        if user and not treasury.user_streams[user]:
            del treasury.user_streams[user]
            if not treasury.user_bytes[user]:
                del treasury.user_bytes[user]


class Waiting(NamedTuple):
    """A call that waits for room."""

    charge: Charge
    size: int
    budget: str
    """The budget that is used up."""
    turn: asyncio.Future[None]

    def wants(self, other: Charge) -> bool:
        """Whether there is more room when the other call ends."""
        if self.turn.done():
            return False
        if self.budget.startswith("connection"):
            return other.allowance is self.charge.allowance
        return other.user == self.charge.user if self.budget.startswith("user") else True


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
