"""An append over several streams by KurrentDB's call AppendRecords, and what becomes of it when it is lost.

It never repeats `ANY` blindly: what has no answer is looked for in the log first, and then sent again at the versions
just read. It is all or nothing, so the log shows all of it, or none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from tidings.errors import AbilityMissing, StoreError, StoreUnavailable, WrongExpectedVersion
from tidings.stores import Ability, Appended, AppendedSeveral, EventData, Expected, StreamAppend
from tidings.stores.eventstoredb.appends import Write
from tidings.stores.eventstoredb.finding import is_repeatable
from tidings.stores.eventstoredb.grpc import Connection
from tidings.stores.eventstoredb.grpc_call import CallFailed, ConnectionLost, Status
from tidings.stores.eventstoredb.leader import Leader, Trying
from tidings.stores.eventstoredb.records import APPEND_RECORDS, answer_of, refused, request_of

__all__ = ["Several"]

Parts = Sequence[StreamAppend[EventData]]


class Several:
    """Appends over several streams, of one store."""

    def __init__(self, leader: Leader, find: Callable[[Write], Awaitable[Appended | Expected]]) -> None:
        """`find` tells where an append of unknown outcome is in the log; if it is not, the version to append at."""
        self._leader = leader
        self._find = find

    async def offered(self) -> bool:
        """Return whether the server has the call. It is asked to append nothing, which it refuses if it has it."""
        return await self._leader.persistently(self._offers)

    async def _offers(self, connection: Connection) -> bool:
        try:
            await self._called(connection, request_of([]))
        except CallFailed as error:
            if error.status is Status.UNIMPLEMENTED:
                return False
            if error.status not in (Status.INVALID_ARGUMENT, Status.PERMISSION_DENIED):
                raise
        return True

    async def append(self, asked: Parts) -> AppendedSeveral:
        """Append all of it or nothing. Raises as `EventStore.append_several`."""
        trying, floor = Trying(self._leader), -1
        parts, doubtful = asked, False
        refused_at: dict[str, int] = {}
        try:
            while True:
                told, sent = None, False
                try:
                    connection = await self._leader.connected()
                    trying.check()
                    if not doubtful:
                        floor = self._leader.known
                    sent = True
                    return await self._called(connection, request_of(parts))
                except (CallFailed, ConnectionLost) as error:
                    told = self._told(error, parts)
                    if told is not None and not doubtful:
                        raise told from error
                    if isinstance(told, WrongExpectedVersion):
                        refused_at[told.stream] = told.actual
                    if told is None:
                        doubtful = doubtful or sent
                        await trying.again(error)
                if doubtful:
                    found, parts = await self._looked(asked, floor, refused_at)
                    if found is not None:
                        return found
                    if told is not None and not _others_wrote(told, asked, parts):
                        raise told
        except StoreUnavailable as error:
            raise _unavailable(error, asked, doubtful=doubtful) from error

    async def _called(self, connection: Connection, request: bytes) -> AppendedSeveral:
        leader = self._leader
        messages: list[bytes] = []
        with await leader.call(APPEND_RECORDS, connection, leader.seconds / 2) as call:
            call.send(request, end=True)
            while more := await call.receive():
                messages += more
        if not messages:
            raise ConnectionLost("the server ended an append over several streams without an answer")
        appended = answer_of(messages[0])
        leader.known = max(leader.known, appended.position)
        return appended

    def _told(self, error: CallFailed | ConnectionLost, parts: Parts) -> StoreError | None:
        """What the server says about the append; None where it says nothing, so that its outcome is unknown."""
        if not isinstance(error, CallFailed):
            return None
        if error.status is Status.UNIMPLEMENTED:
            return AbilityMissing(
                Ability.APPEND_SEVERAL.value,
                f"EventStoreDB at {self._leader.place}",
                "Name a server in TIDINGS_STORE that has the call AppendRecords (KurrentDB 26.1), or the PostgreSQL or "
                "embedded store. Or append to one stream, and let a handler emit the events of the others.",
            )
        if error.status in (Status.PERMISSION_DENIED, Status.UNAUTHENTICATED):
            return self._leader.judge(error)
        return refused(error, parts)

    async def _looked(
        self, asked: Parts, floor: int, refused_at: Mapping[str, int]
    ) -> tuple[AppendedSeveral | None, Parts]:
        """Look for what was sent: the outcome that it had; or None, and the append at the versions just read."""
        versions: dict[str, int] = {}
        position = -1
        parts: list[StreamAppend[EventData]] = []
        for part in asked:
            if not part.events:
                parts.append(part)
                continue
            future: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
            write = Write(part.stream, part.events, part.expected, 0, future)
            write.floor, write.refused_at = floor, refused_at.get(part.stream, -1)
            found = await self._find(write)
            if isinstance(found, Appended):
                versions[part.stream] = found.version
                position = max(position, found.position)
            else:
                parts.append(part if is_repeatable(part.expected) else part._replace(expected=found))
        written = sum(bool(part.events) for part in asked)
        if len(versions) == written:
            return AppendedSeveral(versions, position), asked
        # What was found of a part was there before: the server says so, or the append is judged anew as it was.
        return None, asked if versions else parts


def _unavailable(error: StoreUnavailable, asked: Parts, *, doubtful: bool) -> StoreUnavailable:
    """Return the same error, with what is known of the append."""
    outcome = "was not appended"
    if doubtful:
        remedy = "append the same events, with the same ids, again"
        if not any(part.events and is_repeatable(part.expected) for part in asked):
            remedy = "look for the id of one of its events in its stream: a server that restarts forgets it"
        outcome = f"may or may not have been appended: to be sure, {remedy}"
    return StoreUnavailable(
        f"{error} What was meant for stream {asked[0].stream!r} and {len(asked) - 1} other(s) {outcome}.",
        waiting_helps=error.waiting_helps,
    )


def _others_wrote(told: StoreError, asked: Parts, parts: Parts) -> bool:
    """Return whether the append was refused only for a version that was read, so that it may be tried at another."""
    if not isinstance(told, WrongExpectedVersion):
        return False
    expected = {part.stream: part.expected for part in parts}
    return any(part.stream == told.stream and part.expected != expected[part.stream] for part in asked)
