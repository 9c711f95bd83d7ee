"""Who may connect and do what: users, and access to streams. Passwords are never stored, only salted hashes.

Users lie in the log as EventStoreDB keeps them, one stream each, so that a copy of the database has them too.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from time import monotonic
from typing import Final

import structlog

from tidings.errors import ConfigurationError, StreamDeleted, StreamNotFound
from tidings.server.budgets import Allowance
from tidings.server.logins import Logins, User, hashed
from tidings.server.permissions import ADMINS, IDENTITY, SERVICES, Reader, closed, permitted
from tidings.server.refusals import Refusal, Status, access_denied, shown
from tidings.stores import OCTETS, EventData
from tidings.stores.rules import MAX_VERSION, document_of
from tidings.stores.sqlite.log import last_version
from tidings.stores.sqlite.store import SqliteStore

__all__ = ["DEFAULT_PASSWORD", "Access"]

log = structlog.get_logger(__name__)

DEFAULT_PASSWORD: Final = "changeit"
ADMIN: Final = "admin"
USERS: Final = "$users"
_GROUPS: Final = {ADMIN: (ADMINS,), "ops": ("$ops",)}
_FRESH: Final = 1.0
"""Seconds for which a user who was looked up is not looked up again."""


class Access:
    """Decides about calls. One that is `open` lets everybody do everything, as EventStoreDB does when insecure.
    `services` are users that may read `$all`."""

    def __init__(
        self, store: SqliteStore, *, open: bool, services: Collection[str] = (), user_failures: int = 50
    ) -> None:
        self._store = store
        self._open = open
        self._services = frozenset(services)
        self._users: dict[str, User] = {}
        self._looked_up: dict[str, float] = {}
        self._logins = Logins(user_failures)

    async def load(self, given: Mapping[str, str], *, default: bool) -> None:
        """The users that the log knows, and those that are given with their passwords, which replace the known.

        `default`: where there is no user at all, make EventStoreDB's own with its well-known password. Raises
        `ConfigurationError` for a service that is no user.
        """
        listed = set[str]()
        with suppress(StreamNotFound, StreamDeleted):
            async for event in self._store.read_stream(USERS):
                listed.add(event.data.decode("utf-8", "replace"))
        for name in sorted(listed):
            await self._load(name)
        if default and not self._users and not given:
            given = dict.fromkeys(_GROUPS, DEFAULT_PASSWORD)
        for name, password in given.items():
            known = self._users.get(name)
            if known is None or not await asyncio.to_thread(known.has, password):
                try:
                    await self._write(name, password)
                except StreamDeleted as error:
                    advice = "that cannot be undone: choose another name for the user"
                    log.error("user.closed", user=name, reason=str(error), advice=advice)
                    continue
            self._logins.remember(self._users[name], password)
        for name in self._services - set(self._users) - listed:
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
        """Read the user from the log; one who is gone there is gone here, and so is one who cannot be read."""
        self._looked_up[name] = monotonic()
        try:
            async for event in self._store.read_stream(f"$user-{name}", backwards=True, limit=1):
                self._users[name] = _user_of(name, document_of(event.data))
                return
        except (StreamNotFound, StreamDeleted):
            pass
        except ValueError as error:  # it is data, which never stops the server
            advice = "give the user a password: name it in TIDINGS_SERVER_USERS"
            log.error(
                "user.unreadable", user=shown(name), stream=f"$user-{shown(name)}", reason=str(error), advice=advice
            )
        self._users.pop(name, None)

    async def _current(self, name: str) -> User | None:
        """The user as the log has it now, or had it a moment ago."""
        if name in self._users and monotonic() - self._looked_up.get(name, -_FRESH) > _FRESH:
            await self._load(name)
        user = self._users.get(name)
        return None if user is None or user.disabled else user

    async def _write(self, name: str, password: str) -> None:
        if not name or not password:
            raise ConfigurationError("a user of the server needs a name and a password")
        salt = os.urandom(16)
        digest = await asyncio.to_thread(hashed, password, salt)
        known = self._users.get(name)
        groups = _GROUPS.get(name, ()) if known is None else known.groups
        disabled = known is not None and known.disabled
        document = {
            "loginName": name,
            "fullName": name,
            "groups": list(groups),
            "salt": base64.b64encode(salt).decode(),
            "hash": base64.b64encode(digest).decode(),
            "disabled": disabled,
        }
        kind = "$UserCreated" if known is None else "$PasswordChanged"
        await self._store.append(f"$user-{name}", [EventData(kind, json.dumps(document).encode())])
        if known is None:
            with suppress(StreamDeleted):  # then the user is known as long as the server runs
                await self._store.append(USERS, [EventData("$User", name.encode(), content_type=OCTETS)])
        self._users[name] = User(name, groups, salt, digest, disabled=disabled)
        self._looked_up[name] = monotonic()

    # ---- who it is

    async def authenticate(self, metadata: Mapping[str, str], allowance: Allowance, public: bool) -> str:
        """The caller's name; empty where there are no users, and without credentials for what is `public`.

        Raises `Refusal` for wrong credentials, for too many of them, and for none.
        """
        if self._open:
            return ""
        header = metadata.get("authorization", "")
        if not header:
            if public:
                return ""
            raise access_denied()
        name, password = _credentials(header)
        if await self._is_remembered(name, password):
            return name
        async with allowance.logging_in:
            if await self._is_remembered(name, password):
                return name
            if allowance.failed_logins >= allowance.limits.failed_logins:
                raise allowance.treasury.refusal("failed_logins", "Too many wrong passwords on this connection.")
            right = await self._logins.check(await self._current(name), name, password, allowance)
            # The user may have been disabled, or the password changed, while it waited for its turn.
            if not right or not await self._is_remembered(name, password):
                raise Refusal(Status.UNAUTHENTICATED, "Unauthenticated")
        return name

    async def _is_remembered(self, name: str, password: str) -> bool:
        """Whether the password was right before, and the user was not changed since."""
        user = await self._current(name)
        return user is not None and self._logins.remembers(user, password)

    # ---- what it may

    def _roles(self, user: str) -> set[str]:
        """The names under which access lists may let the user in. Raises `Refusal` for nobody."""
        known = self._users.get(user)
        if known is None or known.disabled:
            raise access_denied()
        return {user, "$all", *known.groups, *([SERVICES] if user in self._services else [])}

    async def check(self, user: str, operation: str, stream: str) -> None:
        """Whether the user may; `operation` is `$r`, `$w` or `$d`, as access lists name them. Raises `Refusal`."""
        if closed(operation, stream):
            raise access_denied()
        if self._open:
            # An event there may name another identity, and nobody is an administrator here. A tombstone answers itself.
            if operation == "$w" and stream == IDENTITY and await self._store.look(last_version, stream) < MAX_VERSION:
                raise access_denied()
            return
        roles = self._roles(user)
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


def _user_of(name: str, document: Mapping[str, object]) -> User:
    """A user from the log. Raises `ValueError` for one who cannot log in."""
    salt, digest = (base64.b64decode(str(document.get(key, "")), validate=True) for key in ("salt", "hash"))
    if not salt or not digest:
        raise ValueError("it has no salt or no hash")
    groups = document.get("groups")
    named = tuple(map(str, groups)) if isinstance(groups, list) else ()
    return User(name, named, salt, digest, disabled=document.get("disabled") is True)
