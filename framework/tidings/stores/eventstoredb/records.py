"""Between the port's events and the messages of KurrentDB's call AppendRecords. It does no I/O.

A record has no metadata as bytes, but properties; readers get them back as a JSON object, together with the record's
schema. So metadata must be a JSON object, or nothing.
"""

from __future__ import annotations

import binascii
import json
import re
from base64 import b64decode
from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any, Final

from google.protobuf import json_format  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from tidings.errors import (
    EventTooLarge,
    InvalidAppend,
    PartlyRepeated,
    StoreError,
    StreamDeleted,
    WrongExpectedVersion,
)
from tidings.stores import (
    ANY,
    JSON,
    MAX_POSITION,
    AppendedSeveral,
    EventData,
    StreamAppend,
    describe,
)
from tidings.stores.eventstoredb.grpc_call import CallFailed
from tidings.stores.eventstoredb.records_messages import FORMATS, MESSAGES, PACKAGE, STATUS_TRAILER
from tidings.stores.several import DELETED, EXISTS, TOMBSTONED, number_of, too_large

__all__ = ["APPEND_RECORDS", "answer_of", "refused", "request_of"]

APPEND_RECORDS: Final = f"/{PACKAGE}.StreamsService/AppendRecords"
WHOLE: Final = 2**53
"""The largest number up to which a property keeps every whole number: it is a float there."""
DEPTH: Final = 30
"""Objects and lists within one another, at most: each is three messages within one another, of which readers of
protobuf take 100."""
_CUT: Final = re.compile(r"(.*)\.\.\. \((\d+) bytes\)", re.DOTALL)
_SCHEMA: Final = ("$schema.name", "$schema.format")
"""Properties that the server adds."""
_FORMATS: Final = {JSON: FORMATS.index("Json")}
_BYTES: Final = FORMATS.index("Bytes")

Parts = Sequence[StreamAppend[EventData]]


def request_of(parts: Parts) -> bytes:
    """Return the request. Raises `InvalidAppend` for metadata that a record cannot carry."""
    message = MESSAGES["AppendRecordsRequest"]()
    for stream, events, expected in parts:
        for event in events:
            record = message.records.add(record_id=str(event.id), data=event.data, stream=stream)
            record.schema.name = event.type
            record.schema.format = _FORMATS.get(event.content_type, _BYTES)
            _add_properties(record, stream, event.metadata)
        if expected is not ANY:
            message.checks.add().stream_state.MergeFrom(
                MESSAGES["StreamStateCheck"](stream=stream, expected_state=min(number_of(expected), MAX_POSITION))
            )
    data: bytes = message.SerializeToString()
    return data


def _add_properties(record: Any, stream: str, metadata: bytes) -> None:
    if not metadata:
        return
    try:
        values = json.loads(metadata)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not _survives(values):
        raise _not_carried(stream)
    try:
        for key, value in values.items():
            if key not in _SCHEMA:
                entry = record.properties.add(key=key)
                json_format.ParseDict(value, entry.value)
                entry.value.SetInParent()
    except (json_format.Error, ValueError) as error:  # half a character
        raise _not_carried(stream) from error


def _not_carried(stream: str) -> InvalidAppend:
    return InvalidAppend(
        stream,
        "an event's metadata is not what AppendRecords can carry. Make it a JSON object of at most 30 levels "
        "with finite numbers, of which whole ones go up to 2^53",
    )


def _survives(value: object) -> bool:
    """Return whether a value comes back as it was."""
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, dict | list):
            if depth == DEPTH:
                return False
            waiting += [(each, depth + 1) for each in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, int):
            if not -WHOLE <= value <= WHOLE:
                return False
        elif isinstance(value, float) and not isfinite(value):
            return False
    return True


def answer_of(message: bytes) -> AppendedSeveral:
    """Return what the server answers. Raises `StoreError` for what is no answer."""
    answer = MESSAGES["AppendRecordsResponse"].FromString(message)
    versions = {each.stream: each.revision for each in answer.revisions}
    return AppendedSeveral(versions, answer.position)


# ---- refusals ----------------------------------------------------------------------


def refused(error: CallFailed, parts: Parts) -> StoreError | None:
    """Return what a failed call says about the append; None where it says nothing about it."""
    details = dict(_details(error))
    reason = details["ErrorInfo"].reason if "ErrorInfo" in details else ""
    match reason:
        case "APPEND_CONSISTENCY_VIOLATION":
            violations = details["AppendConsistencyViolationErrorDetails"].violations
            return _violated(violations[0].stream_state, parts)
        case "STREAM_TOMBSTONED":
            return StreamDeleted(_meant(details["StreamTombstonedErrorDetails"].stream, parts))
        case "STREAM_DELETED":
            return StreamDeleted(_meant(details["StreamDeletedErrorDetails"].stream, parts), tombstoned=False)
        case "APPEND_RECORD_SIZE_EXCEEDED":
            record = details["AppendRecordSizeExceededErrorDetails"]
            return EventTooLarge(_meant(record.stream, parts), record.size, record.max_size, "the server's")
        case "APPEND_TRANSACTION_SIZE_EXCEEDED":
            whole = details["AppendTransactionSizeExceededErrorDetails"]
            return too_large(parts, whole.size, whole.max_size, "the server's")
        case "BAD_REQUEST":
            return InvalidAppend(None, f"the server refuses it: {error.details}")
    return None


def _violated(found: Any, parts: Parts) -> StoreError:
    named, actual, state = _meant(found.stream, parts), found.actual_state, found.expected_state
    if actual == TOMBSTONED or (actual == DELETED and state == EXISTS):
        return StreamDeleted(named, tombstoned=actual == TOMBSTONED)
    for stream, _, expected in parts:
        if stream == named and expected is not ANY:
            return WrongExpectedVersion(stream, describe(expected), max(actual, -1))
    return PartlyRepeated(named, actual)


def _meant(name: str, parts: Parts) -> str:
    """Return the stream that the server names: `tidings server` cuts long names."""
    cut = _CUT.fullmatch(name)
    if cut is not None and all(part.stream != name for part in parts):
        for stream, _, _ in parts:
            if stream.startswith(cut[1]) and len(stream.encode()) == int(cut[2]):
                return stream
    return name


def _details(error: CallFailed) -> Iterable[tuple[str, Any]]:
    """Yield the details of a status, each with its name."""
    text = error.trailers.get(STATUS_TRAILER, "")
    try:
        status = MESSAGES["Status"].FromString(b64decode(text + "=" * (-len(text) % 4)))
        for each in status.details:
            name = each.type_url.rpartition(".")[2]
            if name in MESSAGES:
                yield name, MESSAGES[name].FromString(each.value)
    except (binascii.Error, DecodeError):
        return
