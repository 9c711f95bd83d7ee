"""Who may connect and do what: users, and access to streams. Passwords are never stored, only salted hashes.

Users lie in the log as EventStoreDB keeps them, one stream each, so that a copy of the database has them too.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from time import monotonic
from typing import Final

import structlog

from tidings.errors import ConfigurationError, StreamDeleted, StreamNotFound
from tidings.server.budgets import Allowance, Bucket
from tidings.server.permissions import ADMINS, SERVICES, Reader, closed, permitted
from tidings.server.refusals import Refusal, Status, access_denied, shown
from tidings.stores import OCTETS, EventData
from tidings.stores.rules import document_of
from tidings.stores.sqlite.store import SqliteStore

__all__ = ["DEFAULT_PASSWORD", "Access"]

log = structlog.get_logger(__name__)

DEFAULT_PASSWORD: Final = "changeit"
ADMIN: Final = "admin"
USERS: Final = "$users"
_GROUPS: Final = {ADMIN: (ADMINS,), "ops": ("$ops",)}
_REMEMBERED: Final = 1024
_FRESH: Final = 1.0
"""Seconds for which a user who was looked up is not looked up again."""
_WAITING: Final = 64
"""Passwords that may wait to be checked: one after the other, because each takes 16 MiB and much time on purpose."""
_SCRYPT: Final = {"n": 2**14, "r": 8, "p": 1}


# ---- users -------------------------------------------------------------------------


def _hashed(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, **_SCRYPT)


class _User:
    def __init__(self, name: str, groups: tuple[str, ...], salt: bytes, hashed: bytes, *, disabled: bool) -> None:
        self.name, self.groups, self.salt, self.hashed = name, groups, salt, hashed
        self.disabled = disabled
        self.checked = monotonic()

    def has(self, password: str) -> bool:
        return hmac.compare_digest(_hashed(password, self.salt), self.hashed)


_NOBODY: Final = _User("", (), b"", b"", disabled=False)
"""Stands for a user that is not known: the refusal takes as long as that of a wrong password."""


class Access:
    """Decides about calls. One that is `open` lets everybody do everything, as EventStoreDB does when insecure.
    `services` are users that may read `$all`."""

    def __init__(
        self, store: SqliteStore, *, open: bool, services: Collection[str] = (), user_failures: int = 50
    ) -> None:
        self._store = store
        self._open = open
        self._services = frozenset(services)
        self._users: dict[str, _User] = {}
        self._known: dict[bytes, str] = {}
        """Digests of headers that were found right: hashing a password is slow on purpose."""
        self._hashing = asyncio.Lock()
        self._waiting = 0
        self._user_failures = user_failures
        self._failed: dict[str, Bucket] = {}
        """For each user that exists, the wrong passwords that are left."""

    async def load(self, given: Mapping[str, str], *, default: bool) -> None:
        """The users that the log knows, and those that are given with their passwords, which replace the known.

        `default`: where there is no user at all, make EventStoreDB's own with its well-known password. Raises
        `ConfigurationError` for a service that is no user.
        """
        with suppress(StreamNotFound, StreamDeleted):
            async for event in self._store.read_stream(USERS):
                await self._load(event.data.decode("utf-8", "replace"))
        if default and not self._users and not given:
            given = dict.fromkeys(_GROUPS, DEFAULT_PASSWORD)
        for name, password in given.items():
            known = self._users.get(name)
            if known is None or not await asyncio.to_thread(known.has, password):
                await self._write(name, password)
        for name in self._services - set(self._users):
            raise ConfigurationError(
                f"{name!r} is to read $all as a service, but there is no such user: give it a password"
            )
        for user in self._users.values():
            if user.disabled:
                log.warning("user.disabled", user=user.name, stream=f"$user-{user.name}")

    @property
    def users(self) -> set[str]:
        return set(self._users)

    async def uses_default_password(self) -> bool:
        users = [user for user in self._users.values() if not user.disabled]
        return await asyncio.to_thread(lambda: any(user.has(DEFAULT_PASSWORD) for user in users))

    async def _load(self, name: str) -> None:
        """Read the user from the log; one who is gone there is gone here."""
        try:
            async for event in self._store.read_stream(f"$user-{name}", backwards=True, limit=1):
                document = document_of(event.data)
                salt, hashed = (base64.b64decode(str(document.get(key, ""))) for key in ("salt", "hash"))
                groups = document.get("groups")
                named = tuple(map(str, groups)) if isinstance(groups, list) else ()
                if not salt or not hashed:
                    break
                self._users[name] = _User(name, named, salt, hashed, disabled=document.get("disabled") is True)
                return
        except (StreamNotFound, StreamDeleted, binascii.Error):
            pass
        self._users.pop(name, None)

    async def _current(self, name: str) -> _User | None:
        """The user as the log has it now, or had it a moment ago."""
        user = self._users.get(name)
        if user is not None and monotonic() - user.checked > _FRESH:
            await self._load(name)
            user = self._users.get(name)
        return None if user is None or user.disabled else user

    async def _write(self, name: str, password: str) -> None:
        if not name or not password:
            raise ConfigurationError("a user of the server needs a name and a password")
        salt = os.urandom(16)
        hashed = await asyncio.to_thread(_hashed, password, salt)
        known = self._users.get(name)
        groups = _GROUPS.get(name, ()) if known is None else known.groups
        disabled = known is not None and known.disabled
        document = {
            "loginName": name,
            "fullName": name,
            "groups": list(groups),
            "salt": base64.b64encode(salt).decode(),
            "hash": base64.b64encode(hashed).decode(),
            "disabled": disabled,
        }
        kind = "$UserCreated" if known is None else "$PasswordChanged"
        await self._store.append(f"$user-{name}", [EventData(kind, json.dumps(document).encode())])
        if known is None:
            await self._store.append(USERS, [EventData("$User", name.encode(), content_type=OCTETS)])
        self._users[name] = _User(name, groups, salt, hashed, disabled=disabled)

    # ---- who it is

    async def authenticate(self, metadata: Mapping[str, str], allowance: Allowance) -> str:
        """The caller's name, empty without credentials. Raises `Refusal` for wrong ones, and for too many of them."""
        header = metadata.get("authorization", "")
        if self._open or not header:
            return ""
        digest = hashlib.sha256(header.encode()).digest()
        if (known := await self._remembered(digest)) is not None:
            return known
        async with allowance.logging_in:
            if (known := await self._remembered(digest)) is not None:
                return known
            if allowance.failed_logins >= allowance.limits.failed_logins:
                raise allowance.treasury.refusal("failed_logins", "Too many wrong passwords on this connection.")
            name, password = _credentials(header)
            user = await self._current(name)
            if user is not None and self._bucket(name).empty:
                raise allowance.treasury.refusal(
                    "user_failed_logins", f"Too many wrong passwords for {shown(name)!r}: try again in some seconds."
                )
            if self._waiting >= _WAITING:
                raise allowance.treasury.refusal("logins", "Too many passwords wait to be checked: try again.")
            if not await self._right(user or _NOBODY, password):
                allowance.failed_logins += 1
                if user is not None:
                    self._bucket(name).take()
                raise Refusal(Status.UNAUTHENTICATED, "Unauthenticated")
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[digest] = name
        return name

    async def _remembered(self, digest: bytes) -> str | None:
        """The user of a header that was right before, unless the user was changed since."""
        name = self._known.get(digest)
        if name is None:
            return None
        before = self._users.get(name)
        user = await self._current(name)
        if user is None or before is None or user.hashed != before.hashed:
            self._known = {key: other for key, other in self._known.items() if other != name}
            return None
        return name

    def _bucket(self, name: str) -> Bucket:
        return self._failed.setdefault(name, Bucket(self._user_failures))

    async def _right(self, user: _User, password: str) -> bool:
        self._waiting += 1
        try:
            async with self._hashing:
                return await asyncio.to_thread(user.has, password)
        finally:
            self._waiting -= 1

    # ---- what it may

    def _roles(self, user: str) -> set[str]:
        """The names under which access lists may let the user in. Raises `Refusal` for nobody."""
        known = self._users.get(user)
        if known is None or known.disabled:
            raise access_denied()
        return {user, "$all", *known.groups, *([SERVICES] if user in self._services else [])}

    async def check(self, user: str, operation: str, stream: str) -> None:
        """Whether the user may; `operation` is `$r`, `$w` or `$d`, as access lists name them. Raises `Refusal`."""
        if self._open and not closed(operation, stream):
            return
        roles = {"$all"} if self._open else self._roles(user)
        if ADMINS in roles:
            return
        if not await self._store.look(permitted, roles, operation, stream):
            raise access_denied()

    def reader(self, user: str) -> Reader | None:
        """What decides, event by event, what the user may see through links and in `$all`; None: everything."""
        if self._open:
            return None
        roles = self._roles(user)
        return None if ADMINS in roles else Reader(frozenset(roles))

    def check_user(self, user: str) -> None:
        """Whether it is a user at all. Raises `Refusal`."""
        if not self._open:
            self._roles(user)

    def check_operator(self, user: str) -> None:
        """Whether the user may manage persistent subscriptions and projections. Raises `Refusal`."""
        if not self._open and not {ADMINS, "$ops"} & self._roles(user):
            raise access_denied()


def _credentials(header: str) -> tuple[str, str]:
    """Name and password; those of nobody where they cannot be read."""
    scheme, _, credentials = header.partition(" ")
    try:
        name, _, password = base64.b64decode(credentials, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    return (name, password) if scheme.lower() == "basic" else ("", "")
