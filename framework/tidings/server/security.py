"""Who may connect and do what: certificates, users, access to streams. Passwords are never stored, only salted hashes.

Users lie in the log as EventStoreDB keeps them, one stream each, so that a copy of the database has them too.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from tidings.errors import ConfigurationError, StreamDeleted, StreamNotFound
from tidings.server.refusals import Refusal, Status, access_denied
from tidings.stores import OCTETS, EventData
from tidings.stores.rules import document_of
from tidings.stores.sqlite.store import SqliteStore

__all__ = ["DEFAULT_PASSWORD", "Access", "generated_certificate", "is_loopback", "tls_context"]

DEFAULT_PASSWORD: Final = "changeit"
ADMIN: Final = "admin"
USERS: Final = "$users"
_GROUPS: Final = {ADMIN: ("$admins",), "ops": ("$ops",)}
_REMEMBERED: Final = 1024
_SCRYPT: Final = {"n": 2**14, "r": 8, "p": 1}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# ---- certificates ------------------------------------------------------------------


def tls_context(certificate: str, key: str) -> ssl.SSLContext:
    """For HTTP/2 alone. Raises `ConfigurationError` for files that cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"the server's certificate {certificate} and key {key} cannot be used: {error}. Give PEM files that belong "
            "together, or none, and a certificate for localhost is made."
        ) from error
    return context


def generated_certificate(folder: Path, host: str) -> tuple[str, str]:
    """Certificate and key in `folder`, made with the program `openssl` unless they are there. For tests and laptops."""
    certificate, key = folder / "server.crt", folder / "server.key"
    if certificate.exists() and key.exists():
        return str(certificate), str(key)
    program = shutil.which("openssl")
    if program is None:
        raise ConfigurationError("no certificate was given, and none can be made without the program openssl")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    kind = "IP" if host.replace(".", "").isdigit() or ":" in host else "DNS"
    names = sorted({"DNS:localhost", "IP:127.0.0.1", "IP:::1", f"{kind}:{host}"})
    made = subprocess.run(
        [
            *(program, "req", "-x509", "-nodes", "-days", "825", "-subj", "/CN=localhost"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-addext", f"subjectAltName={','.join(names)}"),
            *("-addext", "keyUsage=critical,digitalSignature,keyCertSign", "-addext", "extendedKeyUsage=serverAuth"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        raise ConfigurationError(f"openssl made no certificate: {made.stderr.decode(errors='replace').strip()}")
    key.chmod(0o600)
    return str(certificate), str(key)


# ---- users -------------------------------------------------------------------------


def _hashed(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, **_SCRYPT)


class _User:
    def __init__(self, name: str, groups: tuple[str, ...], salt: bytes, hashed: bytes) -> None:
        self.name, self.groups, self.salt, self.hashed = name, groups, salt, hashed

    def has(self, password: str) -> bool:
        return hmac.compare_digest(_hashed(password, self.salt), self.hashed)


_NOBODY: Final = _User("", (), b"", b"")
"""Stands for a user that is not known: the refusal takes as long as that of a wrong password."""


class Access:
    """Decides about calls. One that is `open` lets everybody do everything, as EventStoreDB does when insecure."""

    def __init__(self, store: SqliteStore, *, open: bool) -> None:
        self._store = store
        self._open = open
        self._users: dict[str, _User] = {}
        self._known: dict[bytes, str] = {}
        """Digests of headers that were found right: hashing a password is slow on purpose."""

    async def load(self, given: Mapping[str, str], *, default: bool) -> None:
        """The users that the log knows, and those that are given with their passwords, which replace the known.

        `default`: where there is no user at all, make EventStoreDB's own with its well-known password.
        """
        with suppress(StreamNotFound, StreamDeleted):
            async for event in self._store.read_stream(USERS):
                await self._load(event.data.decode())
        if default and not self._users and not given:
            given = dict.fromkeys(_GROUPS, DEFAULT_PASSWORD)
        for name, password in given.items():
            known = self._users.get(name)
            if known is None or not await asyncio.to_thread(known.has, password):
                await self._write(name, password)

    @property
    def users(self) -> set[str]:
        return set(self._users)

    async def uses_default_password(self) -> bool:
        users = list(self._users.values())
        return await asyncio.to_thread(lambda: any(user.has(DEFAULT_PASSWORD) for user in users))

    async def _load(self, name: str) -> None:
        try:
            async for event in self._store.read_stream(f"$user-{name}", backwards=True, limit=1):
                document = document_of(event.data)
                salt, hashed = (base64.b64decode(document.get(key, "")) for key in ("salt", "hash"))
                self._users[name] = _User(name, tuple(document.get("groups", ())), salt, hashed)
        except (StreamNotFound, StreamDeleted, binascii.Error):
            return

    async def _write(self, name: str, password: str) -> None:
        if not name or not password:
            raise ConfigurationError("a user of the server needs a name and a password")
        salt = os.urandom(16)
        hashed = await asyncio.to_thread(_hashed, password, salt)
        groups = _GROUPS.get(name, ())
        document = {
            "loginName": name,
            "fullName": name,
            "groups": list(groups),
            "salt": base64.b64encode(salt).decode(),
            "hash": base64.b64encode(hashed).decode(),
            "disabled": False,
        }
        known = name in self._users
        kind = "$PasswordChanged" if known else "$UserCreated"
        await self._store.append(f"$user-{name}", [EventData(kind, json.dumps(document).encode())])
        if not known:
            await self._store.append(USERS, [EventData("$User", name.encode(), content_type=OCTETS)])
        self._users[name] = _User(name, groups, salt, hashed)

    async def authenticate(self, metadata: Mapping[str, str]) -> str:
        """The caller's name, empty without credentials. Raises `Refusal` for wrong ones."""
        header = metadata.get("authorization", "")
        if self._open or not header:
            return ""
        digest = hashlib.sha256(header.encode()).digest()
        known = self._known.get(digest)
        if known is not None:
            return known
        scheme, _, credentials = header.partition(" ")
        try:
            name, _, password = base64.b64decode(credentials, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            name = password = ""  # of nobody  # nosec B105
        user = self._users.get(name, _NOBODY)
        if scheme.lower() != "basic" or not await asyncio.to_thread(user.has, password):
            raise Refusal(Status.UNAUTHENTICATED, "Unauthenticated")
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[digest] = name
        return name

    # ---- streams

    async def check(self, user: str, operation: str, stream: str) -> None:
        """Whether the user may; `operation` is `$r`, `$w` or `$d`, as access lists name them. Raises `Refusal`."""
        if self._open:
            return
        if user not in self._users:
            raise access_denied()
        roles = {user, "$all", *self._users[user].groups}
        if "$admins" in roles:
            return
        if stream.startswith("$$"):
            stream, operation = stream[2:], {"$r": "$mr"}.get(operation, "$mw")
        allowed = await self._allowed(stream, operation)
        if not roles & allowed:
            raise access_denied()

    async def _allowed(self, stream: str, operation: str) -> set[str]:
        """By the stream's own access list; without one, system streams and `$all` are the administrators' alone."""
        listed: Any = None
        try:
            document = (await self._store.get_metadata(stream)).values
        except StreamDeleted:
            document = {}
        access = document.get("$acl")
        if isinstance(access, dict):
            listed = access.get(operation)
        if isinstance(listed, str):
            return {listed}
        if isinstance(listed, list):
            return {str(name) for name in listed}
        return set() if stream.startswith("$") else {"$all"}

    def check_operator(self, user: str) -> None:
        """Whether the user may manage persistent subscriptions and projections. Raises `Refusal`."""
        if self._open:
            return
        known = self._users.get(user)
        if known is None or not {"$admins", "$ops"} & set(known.groups):
            raise access_denied()
