"""`Streams.BatchAppend`: many appends on one call, applied and answered in the order in which they were sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final, NamedTuple

from tidings.errors import EventTooLarge, StoreError, StreamDeleted, WrongExpectedVersion
from tidings.server.budgets import Charge
from tidings.server.calls import Call, Send
from tidings.server.log import ServedLog
from tidings.server.protocol import any_pb2, empty_pb2, packed, shared, status, streams
from tidings.server.refusals import Refusal, Status, WholeTooLarge, exceeded, shown
from tidings.server.releases import Release
from tidings.server.security import Access
from tidings.server.wire import Malformed, cost_of, event_data, expected_version, stream_name, uuid_of, written_name
from tidings.stores import ANY, NO_STREAM, STREAM_EXISTS, Appended, EventData, Expected
from tidings.stores.table import Kind

__all__ = ["IN_FLIGHT", "UnderWay", "batch_append"]

IN_FLIGHT: Final = 4096
"""Appends of one call that may wait for their commit; more requests are then not read."""
BYTES_IN_FLIGHT: Final = 32 * 1024 * 1024
"""Bytes of events of one call that may wait for their commit; more requests are then not read."""
UNFINISHED: Final = 1024
"""Appends of one call whose last part has not come."""
TIMEOUT: Final = 2.0
"""Seconds that an append may take until its last part has come: EventStoreDB's write timeout."""


class UnderWay:
    """Which events of which streams are being written: EventStoreDB drops a repetition that comes meanwhile."""

    def __init__(self) -> None:
        self._ids: dict[tuple[str, bytes], int] = {}

    def __contains__(self, append: _Unfinished) -> bool:
        """All of its events are being written already."""
        keys = [(append.stream, event.id.bytes) for event in append.events]
        return bool(keys) and all(key in self._ids for key in keys)

    def add(self, append: _Unfinished, outcome: asyncio.Future[Appended]) -> None:
        """From now until the outcome is known."""
        keys = [(append.stream, event.id.bytes) for event in append.events]
        for key in keys:
            self._ids[key] = self._ids.get(key, 0) + 1

        def written(_: object) -> None:
            for key in keys:
                self._ids[key] -= 1
                if not self._ids[key]:
                    del self._ids[key]

        outcome.add_done_callback(written)


class _Unfinished:
    """An append of which more parts may come."""

    def __init__(self, options: Any) -> None:
        self.identifier = options.stream_identifier
        self.stream = written_name(options.stream_identifier)
        self.expected = expected_version(options, "expected_stream_position", "stream_position")
        self.events: list[EventData] = []
        self.size = 0
        self.data = 0
        """Bytes of data alone, which EventStoreDB limits."""
        self.charged = 0
        """Bytes that count against the call's budget, until it is whole."""
        self.timer: asyncio.TimerHandle | None = None

    def add(self, event: EventData, release: Release) -> None:
        """Take one more event. Raises `EventTooLarge` when there are too many."""
        self.size += cost_of(event)
        self.data += len(event.data)
        if self.data > release.data:
            raise EventTooLarge(self.stream, self.data, release.data)
        if self.size > release.whole:
            raise WholeTooLarge(self.stream, self.size, release.whole)
        self.events.append(event)


class _Answer(NamedTuple):
    """What is to be answered, now or when the append is settled."""

    correlation: Any
    identifier: Any
    expected: Expected
    outcome: asyncio.Future[Appended] | Any
    size: int = 0
    stream: str = ""
    before: int = -1
    """How far the log had come when the append was begun."""


class _Answers:
    """What is to be answered, in order, within the limits."""

    def __init__(self, charge: Charge | None) -> None:
        self._queue: asyncio.Queue[_Answer | None] = asyncio.Queue(IN_FLIGHT)
        self._charge = charge
        self._bytes = 0
        self._less = asyncio.Event()

    async def room_for(self, size: int) -> None:
        """Wait until there is room for an append. Raises `Refusal` where there is none although nothing of this call is
        on its way."""
        charge = self._charge
        while self._bytes and (self._bytes > BYTES_IN_FLIGHT or (charge is not None and charge.excess(size))):
            self._less.clear()
            await self._less.wait()
        if charge is not None:
            await charge.wait_for(size)
            charge.hold(-size)  # it is counted until it is written

    async def put(self, answer: _Answer | None) -> None:
        self._bytes += answer.size if answer else 0
        await self._queue.put(answer)

    def put_late(self, answer: _Answer) -> None:
        """From a timer, which cannot wait: an answer too many is dropped."""
        if not self._queue.full():
            self._queue.put_nowait(answer)

    async def get(self) -> _Answer | None:
        return await self._queue.get()

    def more(self) -> bool:
        return not self._queue.empty()

    def settled(self, answer: _Answer) -> None:
        self._bytes -= answer.size
        self._less.set()


async def batch_append(
    log: ServedLog,
    access: Access,
    call: Call,
    requests: AsyncIterator[Any],
    send: Send,
    release: Release,
    under_way: UnderWay | None = None,
) -> None:
    """The call as a whole: it ends when the client has sent everything and was answered everything.

    With `under_way`, a repetition of an append that is being written is dropped, and answered with a time-out, as
    EventStoreDB does; without, it is answered as soon as the first one is.
    """
    answers = _Answers(call.charge)
    async with asyncio.TaskGroup() as group:
        group.create_task(_reply(log, answers, send))
        await _Intake(log, access, call, answers, release, under_way).run(requests)
        await answers.put(None)


async def _reply(log: ServedLog, answers: _Answers, send: Send) -> None:
    """In order, and together what is settled together."""
    ready: list[bytes] = []
    while True:
        if ready and not answers.more():
            await send(ready)
            ready = []
        answer = await answers.get()
        if answer is None:
            break
        outcome = answer.outcome
        if isinstance(outcome, asyncio.Future) and not outcome.done():
            if ready:
                await send(ready)
                ready = []
            await asyncio.wait([outcome])
        ready.append(packed(_response(answer, await _is_hidden(log, answer))))
        answers.settled(answer)
    if ready:
        await send(ready)


class _Intake:
    """The appends of one call, put together from their parts and begun in the order in which they are whole."""

    def __init__(
        self,
        log: ServedLog,
        access: Access,
        call: Call,
        answers: _Answers,
        release: Release,
        under_way: UnderWay | None,
    ) -> None:
        self._log = log
        self._access = access
        self._call = call
        self._answers = answers
        self._release = release
        self._under_way = under_way
        self._unfinished: dict[bytes, _Unfinished] = {}
        self._dropped: list[asyncio.TimerHandle] = []

    async def run(self, requests: AsyncIterator[Any]) -> None:
        """Take requests until there are no more. An append that is not whole by then is forgotten."""
        try:
            async for request in requests:
                await self._take(request)
        finally:
            for timer in self._dropped:
                timer.cancel()
            for append in self._unfinished.values():
                if append.timer is not None:
                    append.timer.cancel()

    async def _take(self, request: Any) -> None:
        """Take one part of an append, and begin the append when it is the last one."""
        correlation, identifier = request.correlation_id, request.options.stream_identifier
        append = None
        try:
            key = uuid_of(correlation).bytes
            append = self._unfinished.get(key)
            if request.HasField("options"):
                append = await self._opened(request, key, append)
            if append is None:
                return
            identifier = append.identifier
            for proposed in request.proposed_messages:
                event = event_data(proposed)
                append.add(event, self._release)
                if not request.is_final:
                    self._charge(append, cost_of(event))
            if request.is_final:
                self._forget(key)
                await self._begin(append, correlation)
        except (Malformed, Refusal, EventTooLarge, StoreError) as error:
            if append is not None and (isinstance(error, EventTooLarge) or _is_over(error)):
                self._forget(key)
                self._charge(append, -append.charged)
            await self._answers.put(_Answer(correlation, identifier, ANY, _error(error, ANY)))

    async def _opened(self, request: Any, key: bytes, append: _Unfinished | None) -> _Unfinished | None:
        """Return the append that a request with options belongs to; None when its time is over, which is answered."""
        correlation, identifier = request.correlation_id, request.options.stream_identifier
        seconds = _requested(request.options)
        if not request.options.HasField("stream_identifier"):
            raise Malformed("Required field StreamIdentifier not set.")
        if seconds <= 0:
            await self._answers.put(_Answer(correlation, identifier, ANY, _timeout()))
            return None
        await self._access.check(self._call.user, "$w", stream_name(identifier))
        if append is None:
            append = _Unfinished(request.options)
            if not request.is_final:
                if len(self._unfinished) >= UNFINISHED:
                    raise Malformed(f"More than {UNFINISHED} appends are unfinished on this call.")
                self._unfinished[key] = append
                loop = asyncio.get_running_loop()
                append.timer = loop.call_later(min(seconds, TIMEOUT), self._expire, key, correlation)
        return append

    async def _begin(self, append: _Unfinished, correlation: Any) -> None:
        """Hand a whole append to the log; the answer follows its outcome."""
        under_way, answers = self._under_way, self._answers
        if under_way is not None and append in under_way:
            late = _Answer(correlation, append.identifier, append.expected, _timeout())
            self._dropped.append(asyncio.get_running_loop().call_later(TIMEOUT, answers.put_late, late))
            return
        await answers.room_for(append.size)
        before = self._log.store.heard if append.events else -1
        outcome: Any = self._log.store.begin(Kind.APPEND, append.stream, append.events, append.expected)
        outcome.add_done_callback(_seen)
        if self._call.charge is not None:
            self._call.charge.until(outcome, append.size)
        if under_way is not None:
            under_way.add(append, outcome)
        size, stream = append.size, append.stream
        await answers.put(_Answer(correlation, append.identifier, append.expected, outcome, size, stream, before))

    def _expire(self, key: bytes, correlation: Any) -> None:
        late = self._unfinished.pop(key, None)
        if late is not None:
            self._charge(late, -late.charged)
            self._answers.put_late(_Answer(correlation, late.identifier, late.expected, _timeout()))

    def _forget(self, key: bytes) -> None:
        append = self._unfinished.pop(key, None)
        if append is not None:
            self._charge(append, -append.charged)
            if append.timer is not None:
                append.timer.cancel()

    def _charge(self, append: _Unfinished, size: int) -> None:
        """Count bytes of an append that is not whole. Raises `Refusal` when there are too many."""
        charge = self._call.charge
        if charge is None:
            return
        if size > 0:
            charge.take(size)
        else:
            charge.hold(size)
        append.charged += size


def _is_over(error: BaseException) -> bool:
    return isinstance(error, Refusal) and error.code is Status.RESOURCE_EXHAUSTED


def _seen(outcome: asyncio.Future[Appended]) -> None:
    """The client may have gone before its answer: that is no error that nobody looked at."""
    if not outcome.cancelled():
        outcome.exception()


def _requested(options: Any) -> float:
    """Seconds that the client gives the append."""
    if options.WhichOneof("deadline_option") == "deadline":
        return int(options.deadline.seconds) + int(options.deadline.nanos) / 1e9
    return TIMEOUT


# ---- answers -----------------------------------------------------------------------


async def _is_hidden(log: ServedLog, answer: _Answer) -> bool:
    """It was appended before, and nobody can read it any more: EventStoreDB does not say then where it is."""
    outcome = answer.outcome
    if not isinstance(outcome, asyncio.Future) or outcome.exception() is not None:
        return False
    appended = outcome.result()
    return appended.position <= answer.before and not await log.is_readable(answer.stream, appended.version)


def _response(answer: _Answer, hidden: bool) -> Any:
    response = streams.BatchAppendResp(correlation_id=answer.correlation, stream_identifier=answer.identifier)
    outcome = answer.outcome
    if not isinstance(outcome, asyncio.Future):
        response.error.CopyFrom(outcome)
        return response
    error = outcome.exception()
    if error is not None:
        response.error.CopyFrom(_error(error, answer.expected))
        return response
    appended = outcome.result()
    success = response.success
    if hidden:
        success.no_position.SetInParent()
    else:
        success.position.commit_position = success.position.prepare_position = appended.position
    if appended.version < 0:
        success.no_stream.SetInParent()
    else:
        success.current_revision = appended.version
    return response


def _error(error: BaseException, expected: Expected) -> Any:
    if isinstance(error, WrongExpectedVersion):
        return _status(Status.ALREADY_EXISTS, "WrongExpectedVersion", _wrong(error, expected))
    if isinstance(error, StreamDeleted):
        identifier = shared.StreamIdentifier(stream_name=error.stream.encode())
        deleted = shared.StreamDeleted(stream_identifier=identifier)
        return _status(Status.NOT_FOUND, f"Event stream '{shown(error.stream)}' is deleted.", deleted)
    if isinstance(error, EventTooLarge):
        details = shared.MaximumAppendSizeExceeded(maxAppendSize=error.limit)
        says = exceeded(error.limit, whole=isinstance(error, WholeTooLarge))
        return _status(Status.INVALID_ARGUMENT, says, details)
    if isinstance(error, Refusal) and error.code is Status.PERMISSION_DENIED:
        return _status(error.code, error.details, shared.AccessDenied())
    if isinstance(error, Malformed | Refusal):
        says = error.details if isinstance(error, Refusal) else str(error)
        code = Status.RESOURCE_EXHAUSTED if _is_over(error) else Status.INVALID_ARGUMENT
        return _status(code, says, shared.BadRequest(message=says))
    return _status(Status.UNKNOWN, str(error), shared.Unknown())


def _timeout() -> Any:
    return _status(Status.DEADLINE_EXCEEDED, "Timeout", shared.Timeout())


def _status(code: Status, message: str, details: Any) -> Any:
    details_any = any_pb2.Any()
    details_any.Pack(details)
    return status.Status(code=int(code), message=message, details=details_any)  # type: ignore[arg-type]


def _wrong(error: WrongExpectedVersion, expected: Expected) -> Any:
    wrong = shared.WrongExpectedVersion()
    if error.actual < 0:
        wrong.current_no_stream.CopyFrom(empty_pb2.Empty())
    else:
        wrong.current_stream_revision = error.actual
    if isinstance(expected, int):
        wrong.expected_stream_position = expected
    elif expected is ANY:
        wrong.expected_any.CopyFrom(empty_pb2.Empty())
    elif expected is STREAM_EXISTS:
        wrong.expected_stream_exists.CopyFrom(empty_pb2.Empty())
    elif expected is NO_STREAM:
        wrong.expected_no_stream.CopyFrom(empty_pb2.Empty())
    return wrong
