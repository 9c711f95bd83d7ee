"""Events to bytes and back: data and metadata as JSON, old schema versions lifted by upcasters. It never does I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID

from pydantic import ValidationError
from pydantic_core import to_json

from tidings.documents import check, parse
from tidings.errors import ConfigurationError, SchemaError, UnknownEventType, UpcastMissing
from tidings.events import Event
from tidings.own_metadata import own_metadata
from tidings.position import NESTING, deep
from tidings.stores import EventData, RecordedEvent

__all__ = ["Cause", "decode", "encode", "read_metadata"]

E = TypeVar("E", bound=Event)

CORRELATION: Final = "$correlationId"
CAUSATION: Final = "$causationId"
OWN_KEYS: Final = frozenset({"tidingsHandler", "schemaVersion", "traceparent", "partitionKey"})


class Cause(NamedTuple):
    """What led to an event: it hands on the correlation id and the trace, and becomes the causation id."""

    event_id: UUID
    correlation_id: str
    traceparent: str | None = None
    handler: str | None = None
    """`service.handler`; None outside handlers."""


def encode(
    event: Event,
    *,
    id: UUID,
    metadata: Mapping[str, Any] | None = None,
    cause: Cause | None = None,
    correlation_id: str | None = None,
) -> EventData:
    """The event as the store keeps it. `metadata` are the user's own keys, JSON values.

    Without cause or correlation id the event's own id begins the correlation. Raises `ConfigurationError` for metadata
    keys that are Tidings' or the store's, `SchemaError` for values that are no JSON.
    """
    document: dict[str, Any] = {
        CORRELATION: correlation_id or (cause.correlation_id if cause else str(id)),
        "schemaVersion": event.schema_version,
    }
    if cause is not None:
        document[CAUSATION] = str(cause.event_id)
        if cause.handler:
            document["tidingsHandler"] = cause.handler
        if cause.traceparent:
            document["traceparent"] = cause.traceparent
    key = event.partition_key
    if key is not None:
        if not key:
            raise SchemaError(f"event {event.wire_name!r}: its partition key {event.key_field!r} is empty")
        document["partitionKey"] = key
    for name, value in (metadata or {}).items():
        if name.startswith(("$", "tidings_")) or (name in OWN_KEYS and name != "traceparent"):
            raise ConfigurationError(
                f"metadata key {name!r} of event {event.wire_name!r} is reserved: use another name"
            )
        document[name] = value
    try:
        packed = json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        data = event.model_dump_json(by_alias=True).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"event {event.wire_name!r} or its metadata cannot become JSON: {error}") from error
    if key is not None and deep(packed):
        raise SchemaError(
            f"event {event.wire_name!r}: its metadata has over {NESTING} brackets, so its partition key could not be "
            "read back; keep large documents in the event's data"
        )
    return EventData(type=event.wire_name, data=data, metadata=packed, id=id)


def read_metadata(event: RecordedEvent) -> dict[str, Any]:
    """The metadata document; empty where it is no JSON object (other writers may do as they like)."""
    if not event.metadata:
        return {}
    own = own_metadata(event.metadata)
    if own is not None:
        return own
    try:
        document = parse(event.metadata)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def decode(event: RecordedEvent, view: type[E], metadata: Mapping[str, Any] | None = None) -> E:
    """The event as `view` declares it. `metadata` spares parsing it again.

    Raises `SchemaError` (or `UnknownEventType` for a newer schema version, `UpcastMissing` for a missing step): it
    names stream, version and fields, never values, which may be secret (unless the view's own validator says them).
    """
    document = read_metadata(event) if metadata is None else metadata
    written = document.get("schemaVersion", 1)
    if type(written) is not int or written < 1:
        raise SchemaError(f"{_where(event)}: its metadata's schemaVersion is no version number")
    try:
        check(event.data)
    except ValueError as error:
        raise SchemaError(f"{_where(event)}: its data cannot be read: {error}") from None
    try:
        if written == view.schema_version:
            return view.model_validate_json(event.data)
        if written > view.schema_version:
            raise UnknownEventType(
                f"{_where(event)} has schema version {written}, this service knows up to {view.schema_version}: "
                "deploy the service with the newer declaration, then retry"
            )
        return view.model_validate_json(_lift(event, view, written, _where(event)))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'document'}: {_message(problem)}"
            for problem in error.errors(include_input=False, include_url=False, include_context=False)[:5]
        )
        raise SchemaError(f"{_where(event)} does not fit {view.__qualname__}: {problems}") from None
    except SchemaError:
        raise
    except Exception as error:  # pydantic lets through what a validator raises beside ValueError and AssertionError
        failed = type(error).__name__
        raise SchemaError(f"{_where(event)}: a validator of {view.__qualname__} failed: {failed}") from error


def _where(event: RecordedEvent) -> str:
    return f"event {event.type!r} at {event.stream}@{event.version} (position {event.position})"


def _message(problem: Mapping[str, Any]) -> str:
    # Of pydantic's own messages this one quotes what it was given.
    return "no member of the union has its tag" if problem["type"] == "union_tag_invalid" else problem["msg"]


def _lift(event: RecordedEvent, view: type[Event], written: int, where: str) -> bytes:
    """The event's data as the current version writes it: JSON again, so that old and new are validated alike."""
    try:
        document = parse(event.data)
    except ValueError as error:
        raise SchemaError(f"{where}: its data is not JSON") from error
    for version in range(written, view.schema_version):
        step = view.upcasters.get(version)
        if step is None:
            raise UpcastMissing(
                f"{where} has schema version {written}; {view.__qualname__} is at {view.schema_version} and has no "
                f"@upcaster({version})"
            )
        try:
            document = step(document)
        except Exception as error:
            raise SchemaError(f"{where}: the upcaster from version {version} failed: {type(error).__name__}") from error
        if not isinstance(document, dict):
            raise SchemaError(f"{where}: the upcaster from version {version} returned no dict")
    try:
        return to_json(document)
    except ValueError as error:
        raise SchemaError(f"{where}: what its upcasters returned is not JSON") from error
