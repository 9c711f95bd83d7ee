"""Passwords that wait to be checked: whose turn it is, and who is refused at once. It knows no log and no sockets.

A check takes 16 MiB and much time on purpose, so there is one at a time. Names that do not exist wait for one, too, so
that nobody learns from the time which names there are; but they wait behind everybody else.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
from typing import Final, NamedTuple

from tidings.server.budgets import Allowance, Bucket, Treasury
from tidings.server.refusals import Refusal, shown

__all__ = ["NOBODY", "Logins", "User", "hashed"]

WAITING: Final = 64
"""Passwords that may wait to be checked."""
WAITING_OF_ONE: Final = 8
"""Of these, passwords for one name; all names that do not exist count as one."""
_SCRYPT: Final = {"n": 2**14, "r": 8, "p": 1}


def hashed(password: str, salt: bytes) -> bytes:
    """Return what is kept of a password."""
    return hashlib.scrypt(password.encode("utf-8", "surrogateescape"), salt=salt, **_SCRYPT)


class User:
    """A user as the log has it."""

    def __init__(self, name: str, groups: tuple[str, ...], salt: bytes, hashed: bytes, *, disabled: bool) -> None:
        self.name, self.groups, self.salt, self.hashed = name, groups, salt, hashed
        self.disabled = disabled

    def has(self, password: str) -> bool:
        """Whether this is the user's password. Takes long."""
        return hmac.compare_digest(hashed(password, self.salt), self.hashed)


NOBODY: Final = User("", (), b"", b"", disabled=False)
"""Stands for a user that is not known: the refusal takes as long as that of a wrong password."""


class _Waiting(NamedTuple):
    rank: int
    came: int
    queue: str
    treasury: Treasury
    turn: asyncio.Future[None]


def _too_many(treasury: Treasury) -> Refusal:
    return treasury.refusal("logins", "Too many passwords wait to be checked: try again.")


class Logins:
    """The passwords that wait, and those that were right."""

    def __init__(self, user_failures: int = 50) -> None:
        self._user_failures = user_failures
        self._failed: dict[str, Bucket] = {}
        """For each user that exists, the wrong passwords that are left."""
        self._key = os.urandom(32)
        self._right: dict[str, bytes] = {}
        """For each user, a digest of the password that was right: checking it again takes no time."""
        self._busy = False
        self._checking: dict[bytes, asyncio.Future[bool | None]] = {}
        """What is being checked, by the digest of user and password: None for what nobody has answered."""
        self._line: list[_Waiting] = []
        self._came = 0

    def remember(self, user: User, password: str) -> None:
        """The password is right: let it in without a check, as long as the user is not changed."""
        self._right[user.name] = self._digest(user, password)

    def remembers(self, user: User, password: str) -> bool:
        known = self._right.get(user.name)
        return known is not None and hmac.compare_digest(known, self._digest(user, password))

    def _digest(self, user: User, password: str) -> bytes:
        said = b"\0".join((user.salt, user.hashed, password.encode("utf-8", "surrogateescape")))
        return hashlib.blake2b(said, key=self._key, digest_size=32).digest()

    async def check(self, user: User | None, name: str, password: str, allowance: Allowance) -> bool:
        """Whether the password is right; nobody's never is. Raises `Refusal` for who has tried too often, and while
        too many wait."""
        treasury = allowance.treasury
        if user is not None and self._bucket(name).empty:
            raise treasury.refusal(
                "user_failed_logins", f"Too many wrong passwords for {shown(name)!r}: try again in some seconds."
            )
        key = b"" if user is None else self._digest(user, password)
        while key and (first := self._checking.get(key)) is not None:  # one check answers all who say the same
            if (answer := await asyncio.shield(first)) is not None:
                return answer
        if not key:
            return await self._check(user, name, password, allowance)
        self._checking[key], answer = asyncio.get_running_loop().create_future(), None
        try:
            answer = await self._check(user, name, password, allowance)
        finally:
            self._checking.pop(key).set_result(answer)
        return answer

    async def _check(self, user: User | None, name: str, password: str, allowance: Allowance) -> bool:
        await self._turn("" if user is None else name, self._rank(user, allowance), allowance)
        work = asyncio.get_running_loop().run_in_executor(None, (user or NOBODY).has, password)
        # Also when the client has gone meanwhile: the work goes on, and counts.
        work.add_done_callback(lambda done: self._checked(user, password, allowance, done))
        return await asyncio.shield(work) and user is not None

    def _checked(self, user: User | None, password: str, allowance: Allowance, done: asyncio.Future[bool]) -> None:
        self._next()
        right = not done.cancelled() and done.exception() is None and done.result()
        if user is not None and right:
            self.remember(user, password)
            return
        allowance.failed_logins += 1
        if user is not None:
            self._bucket(user.name).take()

    # ---- turns

    def _rank(self, user: User | None, allowance: Allowance) -> int:
        """How likely the password is wrong."""
        if user is None:
            return 2
        return 1 if allowance.failed_logins or self._bucket(user.name).used else 0

    async def _turn(self, queue: str, rank: int, allowance: Allowance) -> None:
        """Wait for it. `_next` ends it. Raises `Refusal` for who is one too many."""
        if not self._busy:
            self._busy = True
            return
        same = sum(entry.queue == queue for entry in self._line)
        if same >= WAITING_OF_ONE or (len(self._line) >= WAITING and not self._displaces(rank)):
            raise _too_many(allowance.treasury)
        mine = _Waiting(rank, self._came, queue, allowance.treasury, asyncio.get_running_loop().create_future())
        self._came += 1
        self._line.append(mine)
        try:
            await mine.turn
        except asyncio.CancelledError:
            if mine in self._line:
                self._line.remove(mine)
            elif not mine.turn.cancelled() and mine.turn.exception() is None:
                self._next()  # its turn had come
            raise

    def _displaces(self, rank: int) -> bool:
        """Send away who waits with the password that is the likeliest to be wrong, if it is likelier than this one."""
        last = max(self._line, key=lambda entry: entry[:2])
        if last.rank <= rank:
            return False
        self._line.remove(last)
        if not last.turn.done():
            last.turn.set_exception(_too_many(last.treasury))
        return True

    def _next(self) -> None:
        while self._line:
            first = min(self._line, key=lambda entry: entry[:2])
            self._line.remove(first)
            if not first.turn.done():  # its client has left in this very turn of the loop
                first.turn.set_result(None)
                return
        self._busy = False

    def _bucket(self, name: str) -> Bucket:
        return self._failed.setdefault(name, Bucket(self._user_failures))
