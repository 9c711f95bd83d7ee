"""KurrentDB's service `StreamsService`: appends of records to several streams, all or nothing, with checks.

As KurrentDB 26.1 answers. Old clients see a record's properties as metadata, beside what its schema is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final
from uuid import UUID, uuid4

from google.protobuf import json_format  # type: ignore[import-untyped]

from tidings.errors import EventTooLarge, InvalidStreamName, PartlyRepeated, StreamDeleted, WrongExpectedVersion
from tidings.server.calls import Call, Method
from tidings.server.refusals import Refusal, Status, shown
from tidings.server.releases import Release
from tidings.server.security import Access
from tidings.server.wire import OVERHEAD, check_length, cost_of
from tidings.stores import ANY, JSON, NO_STREAM, OCTETS, STREAM_EXISTS, Appended, EventData, Expected
from tidings.stores.eventstoredb.records_messages import FORMATS, MESSAGES, PACKAGE, STATUS_TRAILER, status_of
from tidings.stores.rules import check_event
from tidings.stores.several import EXISTS, NONE, TOMBSTONED
from tidings.stores.sqlite.several import Check, Several, Violation
from tidings.stores.sqlite.store import SqliteStore

__all__ = ["Records"]

SERVICE: Final = f"/{PACKAGE}.StreamsService"
LONGEST: Final = 20 * 1024 * 1024
"""Bytes of a request: more than the largest record, so that one that is larger is told so."""
MOST: Final = 1000
"""Streams of one append, and checks: each of them is looked up while nobody else may write."""
TURN: Final = 64
"""Records that are looked at in one turn of the loop, so that others have theirs."""
PROPERTIES: Final = 64 * 1024
"""Bytes of a record's properties: each of them is turned into JSON by Python."""
TOLD: Final = 3 * 1024
"""Bytes of violations that a refusal lists: it travels in a header."""
WHOLE: Final = 2**53
"""The largest number up to which each whole number can be told from the next one."""
ANY_STATE: Final = -2
_STATES: Final[dict[int, Expected]] = {NONE: NO_STREAM, ANY_STATE: ANY, EXISTS: STREAM_EXISTS}
_CODES: Final[dict[Expected, int]] = {NO_STREAM: NONE, ANY: ANY_STATE, STREAM_EXISTS: EXISTS}


class Records:
    """The service on one log."""

    def __init__(self, store: SqliteStore, access: Access, release: Release) -> None:
        self._store = store
        self._access = access
        self._release = release

    def methods(self) -> list[Method]:
        records, request = MESSAGES["AppendRecordsRequest"], MESSAGES["AppendRequest"]
        session = self.append_session
        return [
            Method(f"{SERVICE}/AppendRecords", records, unary=self.append_records, most=LONGEST),
            Method(f"{SERVICE}/AppendSession", request, unary=session, requests_stream=True, most=LONGEST),
        ]

    async def append_records(self, request: Any, call: Call) -> Any:
        """Records that each name their stream."""
        if not request.records:
            raise _bad("Records", "must not be empty")
        if len(request.checks) > MOST:
            raise _many("Checks")
        records: list[tuple[str, EventData]] = []
        size = 0
        for record in request.records:
            stream = _stream(record.stream)
            event = self._event(record, stream)
            size += _cost(stream, event)
            self._check_whole(size)
            records.append((stream, event))
            if not len(records) % TURN:
                await asyncio.sleep(0)
        checks = [_check(index, check) for index, check in enumerate(request.checks)]
        append, appended = await self._append(call, records, {}, checks, size)
        revision = MESSAGES["StreamRevision"]
        revisions = [revision(stream=stream, revision=version) for stream, version in append.versions.items()]
        return MESSAGES["AppendRecordsResponse"](revisions=revisions, position=appended.position)

    async def append_session(self, requests: AsyncIterator[Any], call: Call) -> Any:
        """A request for each stream; they are one append."""
        records: list[tuple[str, EventData]] = []
        expectations: dict[str, Expected] = {}
        size = 0
        async for request in requests:
            stream = _stream(request.stream)
            if not request.records:
                raise _bad("Records", "must not be empty")
            if stream in expectations:
                details = MESSAGES["StreamAlreadyInAppendSessionErrorDetails"](stream=shown(stream))
                says = f"Stream '{shown(stream)}' is already part of this append session."
                raise _refused(Status.ABORTED, "STREAM_ALREADY_IN_APPEND_SESSION", says, details)
            if len(expectations) == MOST:
                raise _many("Records")
            expectations[stream] = _revision(request)
            for record in request.records:
                event = self._event(record, stream)
                cost = _cost(stream, event)
                size += cost
                self._check_whole(size)
                if call.charge is not None:
                    await call.charge.wait_for(cost)  # until the call ends
                records.append((stream, event))
                if not len(records) % TURN:
                    await asyncio.sleep(0)
        if not records:
            raise _refused(Status.FAILED_PRECONDITION, "APPEND_SESSION_NO_REQUESTS", "The session has no requests.")
        append, appended = await self._append(call, records, expectations, [], size)
        answer = MESSAGES["AppendResponse"]
        output = [answer(stream=stream, stream_revision=append.versions[stream]) for stream in expectations]
        return MESSAGES["AppendSessionResponse"](output=output, position=appended.position)

    async def _append(
        self,
        call: Call,
        records: Sequence[tuple[str, EventData]],
        expectations: dict[str, Expected],
        checks: Sequence[Check],
        size: int,
    ) -> tuple[Several, Appended]:
        _check_ids(records)
        streams = dict.fromkeys(stream for stream, _ in records)
        if len(streams) > MOST:
            raise _many("Records")
        for stream in streams:
            await self._access.check(call.user, "$w", stream)
        for stream in dict.fromkeys(check.stream for check in checks if check.stream not in streams):
            await self._access.check(call.user, "$r", stream)
        append = Several(self._store, records, expectations, checks, size)
        try:
            outcome = self._store.begin_several(append)
            if call.charge is not None:
                call.charge.until(outcome, append.size)
            return append, await asyncio.shield(outcome)  # it is written, whether or not its client waits for that
        except WrongExpectedVersion as error:
            raise _wrong(append, error.stream, error.actual, session=bool(expectations)) from None
        except PartlyRepeated as error:
            raise _wrong(append, error.stream, error.version, session=bool(expectations)) from None
        except StreamDeleted as error:
            if append.violations:
                raise _wrong(append, error.stream, append.violations[0].actual, session=False) from None
            kind, reason = ("Tombstoned", "STREAM_TOMBSTONED") if error.tombstoned else ("Deleted", "STREAM_DELETED")
            details = MESSAGES[f"Stream{kind}ErrorDetails"](stream=shown(error.stream))
            says = f"Stream '{shown(error.stream)}' is {kind.lower()}."
            raise _refused(Status.FAILED_PRECONDITION, reason, says, details) from None
        except EventTooLarge as error:
            raise self._too_much(error.size) from None
        except InvalidStreamName as error:
            raise _bad("Stream.Stream", str(error)) from None

    def _event(self, record: Any, stream: str) -> EventData:
        id_ = _id(record)
        if not record.schema.name:
            raise _bad("Schema.Name", "must not be empty", twice=True)
        if not 0 < record.schema.format < len(FORMATS):
            raise _bad("Schema.Format.Schema format", "must be one that there is")
        content_type = JSON if FORMATS[record.schema.format] == "Json" else OCTETS
        event = EventData(record.schema.name, record.data, _metadata(record), content_type, id_)
        check_event(stream, event)
        limit = self._release.data
        if len(event.data) > limit:
            size = event.size
            details = MESSAGES["AppendRecordSizeExceededErrorDetails"](
                stream=shown(stream), record_id=str(id_), size=size, max_size=limit
            )
            says = f"Record {id_} of stream '{shown(stream)}' has {size} bytes, and {limit} is the most."
            raise _refused(Status.INVALID_ARGUMENT, "APPEND_RECORD_SIZE_EXCEEDED", says, details)
        return event

    def _check_whole(self, size: int) -> None:
        if size > self._release.whole:
            raise self._too_much(size)

    def _too_much(self, size: int) -> Refusal:
        limit = self._release.whole
        details = MESSAGES["AppendTransactionSizeExceededErrorDetails"](size=min(size, 2**31 - 1), max_size=limit)
        says = (
            f"The append has {size} bytes or more, and {limit} is the most. Each record counts with the name of its "
            f"stream and {OVERHEAD} bytes, beside its data, properties and schema: send less at once."
        )
        return _refused(Status.INVALID_ARGUMENT, "APPEND_TRANSACTION_SIZE_EXCEEDED", says, details)


# ---- requests ----------------------------------------------------------------------


def _stream(name: str) -> str:
    return _named("Stream.Stream", name)


def _named(field: str, name: str) -> str:
    if not name.strip():
        raise _bad(field, "must not be empty")
    try:
        check_length(name)
    except Refusal as refusal:
        raise _bad(field, f"must be shorter. {refusal.details}") from None
    return name


def _cost(stream: str, event: EventData) -> int:
    """Return the bytes that a record counts for: the log has its stream's name with each of them."""
    return cost_of(event) + len(stream.encode("utf-8", "replace"))


def _id(record: Any) -> UUID:
    if not record.HasField("record_id"):
        return uuid4()
    try:
        id_ = UUID(record.record_id)
    except ValueError:
        id_ = UUID(int=0)
    if not id_.int:
        raise _bad("RecordId.Record ID", "must be a UUID that is not zero")
    return id_


def _metadata(record: Any) -> bytes:
    """The record's properties as an old client reads them."""
    if sum(entry.ByteSize() for entry in record.properties) > PROPERTIES:
        raise _bad("Properties", f"must not have more than {PROPERTIES} bytes")
    try:
        values = {entry.key: _plain(json_format.MessageToDict(entry.value)) for entry in record.properties}
        values["$schema.name"] = record.schema.name
        values["$schema.format"] = FORMATS[record.schema.format]
        if record.schema.HasField("id"):
            values["$schema.id"] = record.schema.id
        return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (json_format.Error, ValueError, RecursionError) as error:
        raise _bad("Properties", f"must be JSON: {str(error)[:200]}") from None


def _plain(value: Any) -> Any:
    """A property as JSON has it: protobuf has no integers there."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= WHOLE:
        return int(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, dict) else value


def _check_ids(records: Sequence[tuple[str, EventData]]) -> None:
    """Raise `Refusal` where two streams are to have an event with the same id: the log remembers it for one of them,
    so that it would not know the same append again."""
    streams: dict[UUID, str] = {}
    for stream, event in records:
        other = streams.setdefault(event.id, stream)
        if other != stream:
            raise _bad("RecordId.Record ID", f"{event.id} must not be that of a record of another stream")


def _check(index: int, check: Any) -> Check:
    field = f"Checks[{index}].StreamState"
    if not check.HasField("stream_state"):
        raise _bad(field, "must be there")
    state = check.stream_state.expected_state
    if state < TOMBSTONED or state in (ANY_STATE, -3):
        raise _bad(f"{field}.ExpectedState", "must be a revision or the name of a state")
    return Check(_named(f"{field}.Stream", check.stream_state.stream), state)


def _revision(request: Any) -> Expected:
    if not request.HasField("expected_revision"):
        return ANY
    revision = int(request.expected_revision)
    if revision >= 0:
        return revision
    try:
        return _STATES[revision]
    except KeyError:
        raise _bad("ExpectedRevision", "must be a revision or the name of a state") from None


# ---- refusals ----------------------------------------------------------------------


def _refused(code: Status, reason: str, says: str, *details: Any, domain: str = "streams") -> Refusal:
    refusal = Refusal(code, says)
    info = MESSAGES["ErrorInfo"](reason=reason, domain=domain)
    refusal.trailers.append((STATUS_TRAILER, status_of(int(code), says, info, *details)))
    return refusal


def _bad(field: str, says: str, *, twice: bool = False) -> Refusal:
    """A field that cannot be meant. KurrentDB names one twice that breaks two of its rules."""
    violation = MESSAGES["FieldViolation"](field=field, description=says)
    details = MESSAGES["BadRequest"](field_violations=[violation] * (1 + twice))
    return _refused(Status.INVALID_ARGUMENT, "BAD_REQUEST", f"{field} {says}", details, domain="server")


def _many(field: str) -> Refusal:
    return _bad(field, f"must not be about more than {MOST} streams")


def _wrong(append: Several, stream: str, actual: int, *, session: bool) -> Refusal:
    if session:
        expected = append.expectations[stream]
        number = expected if isinstance(expected, int) else _CODES[expected]
        details = MESSAGES["StreamRevisionConflictErrorDetails"](
            stream=shown(stream), expected_revision=number, actual_revision=actual
        )
        says = f"Stream '{shown(stream)}' is at revision {actual}, and {number} was expected."
        return _refused(Status.FAILED_PRECONDITION, "STREAM_REVISION_CONFLICT", says, details)
    details = MESSAGES["AppendConsistencyViolationErrorDetails"]()
    for violation in append.violations or [Violation(0, stream, ANY_STATE, actual)]:
        told = _told(violation)
        if details.ByteSize() + told.ByteSize() > TOLD:
            break
        details.violations.append(told)
    if append.violations:
        says = f"{len(append.violations)} of the checks do not hold, the first one of '{shown(stream)}'."
    else:
        says = (
            f"Stream '{shown(stream)}', at revision {actual}, has records of the append already, and "
            "others were never written: send it again as it was, or give the records new ids."
        )
    return _refused(Status.FAILED_PRECONDITION, "APPEND_CONSISTENCY_VIOLATION", says, details)


def _told(violation: Violation) -> Any:
    state = MESSAGES["StreamStateViolation"](
        stream=shown(violation.stream), expected_state=violation.expected, actual_state=violation.actual
    )
    return MESSAGES["ConsistencyViolation"](check_index=violation.place, stream_state=state)
