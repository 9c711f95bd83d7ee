"""The connection to EventStoreDB's leader: found, made, compared with what was seen of the log, given up, made again.

Addresses, discovery, TLS and credentials are those of EventStoreDB's own client, which is kept here for what is rare.
It decides which errors another attempt may heal, and says the others in words; it knows no streams and no callers.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from base64 import b64encode
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, NamedTuple, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit
from uuid import UUID

import structlog

import tidings.stores.eventstoredb.wire as wire
from tidings._support.backoff import Backoff
from tidings.errors import ConfigurationError, StoreError, StoreUnavailable, StreamDeleted, StreamForbidden
from tidings.stores import EVERYTHING, RecordedEvent
from tidings.stores.eventstoredb.grpc import Address, Connection, speaks_tls
from tidings.stores.eventstoredb.grpc_call import (
    Call,
    CallFailed,
    CertificateRefused,
    ConnectionLost,
    Status,
    TlsWanted,
)
from tidings.stores.eventstoredb.protos import AsyncClient
from tidings.stores.rules import document_of

__all__ = ["LOG_STREAM", "Leader", "Trying", "raise_refused"]

log = structlog.get_logger("tidings.stores.eventstoredb")

T = TypeVar("T")

LOG_STREAM: Final = "tidings_log"
SECONDS: Final = 10.0
"""Default of `DefaultDeadline`."""
PAUSE_SECONDS: Final = (0.05, 0.5)
"""First and longest pause before trying again."""
_KURRENTDB: Final = re.compile(r"(?:kurrentdb|kdb)(?=(?:\+discover)?://)", re.IGNORECASE)
"""KurrentDB's names for the scheme `esdb`, which both clients know."""


class Leader:
    """One connection at a time, shared by everything that a store does. It belongs to the loop in which it was made."""

    def __init__(self, url: str) -> None:
        self.client = _client(url)
        spec = self.client.connection_spec
        options = _options(self.client)
        if options.node_preference != "leader":
            raise ConfigurationError(
                "TIDINGS_STORE: leave NodePreference out, or set it to leader. A follower's log may end before a "
                "position that was already handled, and events behind its end would be passed over"
            )
        self.seconds: float = SECONDS if options.default_deadline is None else options.default_deadline
        """How long a call may take, and how long to go on trying."""
        self.place = ",".join(spec.targets)
        self.known = -1
        """The highest position that the log was seen to have: a node whose log ends before it lags behind."""
        self.log: UUID | None = None
        """The identity of the log, once somebody asked for it or it was found on connecting."""
        self.changes = 0
        """How often another log was found behind the address."""
        self.connections: set[Connection] = set()
        """Those open now, for tests that cut them."""
        self._interval = _from_milliseconds(options.keep_alive_interval, self.seconds / 2)
        self._patience = _from_milliseconds(options.keep_alive_timeout, self.seconds / 2)
        self._cluster = len(spec.targets) > 1 or spec.scheme.endswith("+discover")
        self.user, password = unquote(spec.username or ""), unquote(spec.password or "")
        self._tls = _tls(self.client) if options.tls else None
        self._metadata = [("connection-name", options.connection_name), ("requires-leader", "true")]
        if self._tls is not None:
            secret = b64encode(f"{self.user}:{password}".encode()).decode()
            self._metadata.append(("authorization", f"Basic {secret}"))
            if (self.user, password) != (spec.username, spec.password):
                # The client takes a URL's user and password as they stand, so that an '@' or '/' could not be in them.
                self.client._call_credentials = self.client.construct_call_credentials(self.user, password)
        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = None
        self._opening: asyncio.Task[Connection] | None = None
        self._found = False
        self._redirected: str | None = None
        self.closed = False
        """From then on nothing new is begun."""

    def check_usable(self) -> None:
        """Raise `StoreUnavailable` when closed, or used from another loop."""
        if self.closed:
            raise StoreUnavailable("the event store is closed: open it again")
        if asyncio.get_running_loop() is not self._loop:
            raise StoreUnavailable(
                "the event store was opened in another event loop: open one in this loop", waiting_helps=False
            )

    async def close(self) -> None:
        self.closed = True
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        for connection in self.connections:
            await connection.close()
        with suppress(Exception):  # of a client that never connected, or lost its server
            await self.client.close()

    # ---- connecting ----------------------------------------------------------------------

    async def connected(self) -> Connection:
        """The connection. Raises `ConnectionLost` and `CallFailed` when this one attempt to make it fails."""
        connection = self._connection
        if connection is not None and connection.lost is None and not connection.leaving:
            return connection
        if self._opening is None:
            self._opening = self._loop.create_task(self._open(), name="tidings-eventstoredb-connect")
            self._opening.add_done_callback(self._opened)
        opening = self._opening
        await asyncio.wait([opening])  # cancelling one who waits leaves it to the others
        if opening.cancelled():
            raise ConnectionLost("the store was closed")
        return opening.result()

    def _opened(self, task: asyncio.Task[Connection]) -> None:
        self._opening = None
        if not task.cancelled():
            task.exception()  # whoever waited has heard it

    async def _open(self) -> Connection:
        target = await self._target()
        host, _, port = target.rpartition(":")
        address = Address(host.strip("[]"), int(port), self._tls)
        try:
            connection = await Connection.open(
                address, timeout=self.seconds / 3, interval=self._interval, patience=self._patience
            )
        except ConnectionLost as error:
            # A server that was reached before is away for another reason.
            if self._tls is None and not self.connections and await speaks_tls(address):
                raise TlsWanted(f"{address} speaks TLS, and was asked without it") from error
            raise
        self.connections = {other for other in self.connections if other.lost is None} | {connection}
        try:
            await self._compare(connection)
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        return connection

    async def _target(self) -> str:
        """Host and port; discovered again each time where there are several nodes."""
        redirected, self._redirected = self._redirected, None
        if redirected is not None:
            return redirected
        if not self._found or self._cluster:
            try:
                async with asyncio.timeout(self.seconds):
                    await (self.client.reconnect() if self._found else self.client.connect())
            except Exception as error:
                raise ConnectionLost(f"the leader was not found: {error}") from error
            self._found = True
        return self.client.connection_target

    async def _compare(self, connection: Connection) -> None:
        """Is it the same log, and not behind what was seen of it? Else events would be passed over."""
        identity, known = await self.identity(connection), self.known
        changed = self.log is not None and identity != self.log
        self.log = identity
        if changed:
            self.changes += 1
            self.known = known = -1
        try:
            head = await self.head(connection)
        except CallFailed as error:
            if error.status is Status.PERMISSION_DENIED:  # who may append need not be allowed to read everything
                return
            raise
        if head < known:
            raise ConnectionLost(
                f"its log ends at position {head}, but went up to {known} before: it lags behind, or was restored from "
                "an older backup (then start this process again)"
            )

    def distrust(self, reason: str, connection: Connection | None = None) -> None:
        """Use the connection (by default, the present one) no more, and look for the leader again."""
        connection = connection or self._connection
        if connection is not None:
            connection.fail(ConnectionLost(reason))

    # ---- calls ---------------------------------------------------------------------------

    async def call(self, path: str, connection: Connection, timeout: float | None = None) -> Call:
        """Begin a call. Raises `ConnectionLost`, also when the server lets no more calls begin for `seconds`."""
        try:
            async with asyncio.timeout(self.seconds):
                return await connection.call(path, self._metadata, timeout=timeout)
        except TimeoutError:
            raise ConnectionLost(
                "as many calls are open as the server allows on one connection: end reads and subscriptions that are "
                "not needed, or open a second store for them"
            ) from None

    async def head(self, connection: Connection) -> int:
        """The position of the log's last event, -1 without one."""
        found = await self._first(connection, wire.read_all_request(-1, EVERYTHING, backwards=True, count=1))
        head = -1 if found is None else found.position
        self.known = max(self.known, head)
        return head

    async def reaches(self, position: int) -> bool:
        """Whether the log goes up to the checkpoint `position`: one beyond it would hide everything that comes later.
        EventStoreDB 24.2 sends the largest number there is while a filtered subscription has read nothing."""
        if position == wire.NOTHING:
            return False
        if position <= self.known or position <= (head := await self.persistently(self.head)):
            return True
        log.warning(
            "store.checkpoint_ignored",
            place=self.place,
            checkpoint=position,
            head=head,
            advice="the server names a place behind the end of its log; nothing is missed, the next one is looked at",
        )
        return False

    async def identity(self, connection: Connection) -> UUID | None:
        """The log's; None when it has none that can be read."""
        # The first event says it, or the last one that gave a restored log a new identity (`tidings.database.lineage`).
        try:
            request = wire.read_stream_request(LOG_STREAM, None, backwards=True, count=1)
            found = await self._first(connection, request)
            if found is not None and found.version and found.type != "tidings_LogRenewed":
                found = await self._first(connection, wire.read_stream_request(LOG_STREAM, 0, count=1))
        except CallFailed as error:
            if error.status is Status.FAILED_PRECONDITION:  # a tombstone
                return None
            raise
        try:
            renewed = found is not None and found.type == "tidings_LogRenewed"
            return None if found is None or (found.version and not renewed) else UUID(document_of(found.data)["log"])
        except (TypeError, KeyError, ValueError, AttributeError):
            return None

    async def _first(self, connection: Connection, request: bytes) -> RecordedEvent | None:
        """The one event that a short read brings."""
        with await self.call(wire.READ, connection, self.seconds / 2) as call:
            call.send(request, end=True)
            while messages := await call.receive():
                for message in messages:
                    response = wire.Response.FromString(message)
                    if response.HasField("event"):
                        return wire.recorded(response.event.event)
        return None

    async def persistently(self, ask: Callable[[Connection], Awaitable[T]]) -> T:
        """The answer of a short question, asked again where that may help."""
        self.check_usable()
        trying = Trying(self)
        while True:
            try:
                return await ask(await self.connected())
            except (CallFailed, ConnectionLost) as error:
                await trying.again(error)

    # ---- errors --------------------------------------------------------------------------

    def judge(self, error: BaseException) -> StoreError | None:
        """What to tell callers; None when trying again, maybe on another connection, may heal it."""
        match error:
            case StoreError():
                return error
            case CertificateRefused():
                return StoreUnavailable(
                    f"EventStoreDB at {self.place}: {error}. Name the certificate of its authority: tlsCaFile=... in "
                    "TIDINGS_STORE; its host must be one that the certificate is for"
                )
            case TlsWanted():
                return StoreUnavailable(
                    f"EventStoreDB at {self.place} wants TLS ({error}): leave tls=false out of TIDINGS_STORE, and name "
                    "the certificate of its authority with tlsCaFile=... if the system does not know it"
                )
            case ConnectionLost() | wire.Undecided():
                return None
            case CallFailed(status=Status.UNAUTHENTICATED):
                return StoreUnavailable(
                    f"EventStoreDB at {self.place} rejects user {self.user!r}: check user and password in "
                    "TIDINGS_STORE; a percent sign or '/' in them must be percent-encoded"
                )
            case CallFailed(status=Status.PERMISSION_DENIED):
                return StoreUnavailable(
                    f"EventStoreDB at {self.place} denies user {self.user!r} what was asked for ({error}): by "
                    "default only administrators read $all. Grant it ($acl), or name another user in TIDINGS_STORE"
                )
            case CallFailed(trailers={"exception": "not-leader"}):
                host, port = (error.trailers.get(f"leader-endpoint-{part}", "") for part in ("host", "port"))
                leader = f"{host}:{port}" if host and port.isdecimal() else None
                if not self._cluster:
                    return StoreUnavailable(
                        f"EventStoreDB at {self.place} is not the leader of its cluster ({leader or 'another'} is): "
                        "name all its nodes in TIDINGS_STORE, kurrentdb://one,two,three (or esdb://...), or use "
                        "kurrentdb+discover:// (or esdb+discover://)"
                    )
                self._redirected = leader
                self.distrust("it is not the leader")
                return None
            case CallFailed(status=Status.DEADLINE_EXCEEDED):
                self.distrust(error.details)
                return None
            case CallFailed(status=Status.UNAVAILABLE | Status.CANCELLED | Status.ABORTED | Status.INTERNAL):
                return None
        return StoreUnavailable(f"EventStoreDB at {self.place} refuses what it was asked for: {error!s}")

    def unavailable(self, error: BaseException) -> StoreUnavailable:
        """What to tell callers when trying again has not helped."""
        return StoreUnavailable(
            f"EventStoreDB at {self.place} was not there for {self.seconds:g} s: {error}. Is it running, and the "
            "address in TIDINGS_STORE right?"
        )


def raise_refused(error: CallFailed | ConnectionLost, stream: str) -> None:
    """Raise what the error says about the stream, if it says anything."""
    if not isinstance(error, CallFailed):
        return
    deleted = error.status is Status.FAILED_PRECONDITION and "is deleted" in error.details
    if deleted or error.trailers.get("exception") == "stream-deleted":
        raise StreamDeleted(stream) from error
    if error.status is Status.PERMISSION_DENIED:
        raise StreamForbidden(stream, "to read") from error


class Trying:
    """How long one question is asked again without progress."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._changes = leader.changes
        self._since: float | None = None
        self._backoff = Backoff(*PAUSE_SECONDS)

    def progressed(self) -> None:
        self._since = None

    def check(self) -> None:
        """Raise `StoreUnavailable` when what is asked for was begun on another log."""
        if self._changes != self._leader.changes:
            raise StoreUnavailable(
                f"EventStoreDB at {self._leader.place} now holds another log; positions of the one before mean nothing "
                "in it. What follows the log must begin again"
            )

    async def again(self, error: CallFailed | ConnectionLost) -> None:
        """Wait a little before the next attempt. Raises what to tell the caller when there is to be none."""
        leader, now = self._leader, asyncio.get_running_loop().time()
        leader.check_usable()
        verdict = leader.judge(error)
        if verdict is not None:
            raise verdict from error
        if self._since is None:
            self._since = now
            self._backoff.reset()
        if now - self._since >= leader.seconds:
            raise leader.unavailable(error) from error
        await self._backoff.wait()
        leader.check_usable()


class _Options(NamedTuple):
    """Those of the URL's options that are not the client's own business."""

    tls: bool
    connection_name: str
    node_preference: str
    default_deadline: int | None
    keep_alive_interval: int | None
    keep_alive_timeout: int | None
    user_cert_file: str | None
    user_key_file: str | None


def _options(client: AsyncClient) -> _Options:
    """As the URL has them (esdbclient), or in lower case (kurrentdbclient)."""
    options = client.connection_spec.options
    names = [(name, name.title().replace("_", "")) for name in _Options._fields]
    return _Options(*(getattr(options, other if hasattr(options, other) else name) for name, other in names))


def _from_milliseconds(option: int | None, default: float) -> float:
    return default if option is None else option / 1000


def _client(url: str) -> AsyncClient:
    try:
        parts = urlsplit(url)
        options = [(name.lower(), value.lower()) for name, value in parse_qsl(parts.query, keep_blank_values=True)]
    except ValueError as error:
        raise ConfigurationError(f"TIDINGS_STORE cannot be meant: {error}") from None
    if "@" in parts.path + parts.query + parts.fragment:
        raise ConfigurationError(  # an error of the client would quote what it takes for a port or an option
            "TIDINGS_STORE cannot be meant: in user and password write '/' as %2F, '@' as %40, '#' as %23, '?' as %3F"
        )
    if any(name == "tlsverifycert" and value != "true" for name, value in options):
        raise ConfigurationError(
            "TIDINGS_STORE has the option tlsVerifyCert: certificates are always verified, because whoever is between "
            "could read and forge everything otherwise. For your own authority name its certificate: tlsCaFile=..."
        )
    url = _KURRENTDB.sub("esdb", url, count=1) if _KURRENTDB.match(url) else url
    if "gossiptimeout" not in dict(options):
        # A paused node answers no gossip: five seconds for each would use up what a search may take.
        url += ("&" if parts.query else "?") + "GossipTimeout=1"
    try:
        return AsyncClient(url)
    except ValueError as error:
        text = re.split(r":? ?[\w+]*://", str(error))[0]  # it repeats the URL with the password
        raise ConfigurationError(f"TIDINGS_STORE cannot be meant: {text}") from None
    except OSError as error:
        raise ConfigurationError(f"TIDINGS_STORE names a file that cannot be read: {error}") from error


def _tls(client: AsyncClient) -> ssl.SSLContext:
    options = _options(client)
    roots = client.root_certificates
    try:
        context = ssl.create_default_context(cadata=None if roots is None else roots.decode("ascii"))
        # Python 3.13 refuses authorities without some extensions, which EventStoreDB's own client takes.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if options.user_cert_file is not None:
            context.load_cert_chain(options.user_cert_file, options.user_key_file)
    except (ValueError, OSError) as error:  # ssl.SSLError is an OSError
        raise ConfigurationError(f"TIDINGS_STORE: its certificate files cannot be used: {error}") from error
    context.set_alpn_protocols(["h2"])
    return context
