"""Events to bytes and back: data and metadata as JSON, old schema versions lifted by upcasters. It never does I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID

from pydantic import ValidationError
from pydantic_core import to_json

from tidings._support.json_limits import check, parse
from tidings.errors import (
    ConfigurationError,
    PartitionKeyDiffers,
    SchemaError,
    UnknownEventType,
    UpcastFailed,
    UpcastMissing,
)
from tidings.modelling.events import Event, comparable_key, is_exact, partition_key
from tidings.modelling.readback import difference
from tidings.protocol.metadata import own_metadata
from tidings.protocol.position import NESTING, deep
from tidings.stores import EventData, RecordedEvent

__all__ = ["Cause", "check_key", "decode", "encode", "read_metadata"]

E = TypeVar("E", bound=Event)

CORRELATION: Final = "$correlationId"
CAUSATION: Final = "$causationId"
HELD: Final = "; until then the event is held"
"""What becomes of an event that a service needs another deploy for."""
BY_REQUEST: Final = "transaction"
"""Name after the service's in `tidingsHandler` of what `service.transaction()` emitted. Such an event has no cause."""
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
    handler: str | None = None,
) -> EventData:
    """The event as the store keeps it. `metadata` are the user's own keys, JSON values; `handler` is what emits the
    event where no other one is the cause.

    Without cause or correlation id the event's own id begins the correlation. Raises `ConfigurationError` for metadata
    keys that are Tidings' or the store's, `SchemaError` for an event or metadata that would not be read back equal.
    """
    if not isinstance(event, Event):
        raise ConfigurationError(_no_event(event))
    own = event.__tidings__
    document: dict[str, Any] = {
        CORRELATION: correlation_id or (cause.correlation_id if cause else str(id)),
        "schemaVersion": own.version,
    }
    if handler is not None:
        document["tidingsHandler"] = handler
    if cause is not None:
        document[CAUSATION] = str(cause.event_id)
        if cause.handler:
            document["tidingsHandler"] = cause.handler
        if cause.traceparent:
            document["traceparent"] = cause.traceparent
    key = partition_key(event)
    if key is not None:
        if not key:
            raise SchemaError(f"event {own.name!r}: its partition key {own.key!r} is empty")
        document["partitionKey"] = key
    for name, value in (metadata or {}).items():
        if not isinstance(name, str):
            raise ConfigurationError(f"metadata key {name!r} of event {own.name!r} is no text")
        if name.startswith(("$", "tidings_")) or (name in OWN_KEYS and name != "traceparent"):
            raise ConfigurationError(f"metadata key {name!r} of event {own.name!r} is reserved: use another name")
        document[name] = value
    try:
        packed = to_json(document)  # a sixth of the time that `json.dumps` takes
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"metadata of event {own.name!r} cannot become JSON: {error}") from error
    if metadata or not isinstance(document[CORRELATION], str):
        _check_metadata(own.name, document, packed)
    if key is not None and deep(packed):
        raise SchemaError(
            f"event {own.name!r}: its metadata has over {NESTING} brackets, so its partition key could not be "
            "read back; keep large documents in the event's data"
        )
    return EventData(type=own.name, data=_written(event), metadata=packed, id=id)


def _no_event(given: object) -> str:
    if isinstance(given, type) and issubclass(given, Event):
        return f"{given.__qualname__} is a class of events: give an event, {given.__qualname__}(...)"
    what = f"{type(given).__qualname__!r} is no event"
    if isinstance(given, list | tuple | set):
        return f"{what}: give several events one by one, as in append(stream, first, second) or append(stream, *events)"
    return f"{what}: give an instance of a subclass of tidings.Event"


def _check_metadata(name: str, document: dict[str, Any], packed: bytes) -> None:
    """Raises `SchemaError` for metadata that would be read back as something else."""
    if all(type(value) is str or (key == "schemaVersion" and type(value) is int) for key, value in document.items()):
        return
    try:
        problem = difference(document, parse(packed))
    except (ValueError, RecursionError) as error:
        problem = str(error)
    if problem is not None:
        raise SchemaError(f"metadata of event {name!r} would not be read back as it was written: {problem}")


def _written(event: Event) -> bytes:
    """The event's data. Raises `SchemaError` for what would not be read back as it is."""
    kind = type(event)
    name, exact = kind.__tidings__.name, kind.__tidings__.exact
    if exact is None:
        exact = is_exact(kind)
    try:
        # Warnings are about values of another type than their field says: what is read back decides about these.
        data = kind.__pydantic_serializer__.to_json(event, by_alias=True, warnings="none")
    except (TypeError, ValueError, RecursionError, AttributeError) as error:
        raise SchemaError(f"event {name!r} cannot become JSON: {error}") from error
    try:
        check(data)
        back = kind.__pydantic_validator__.validate_json(data)
        if exact and event.__dict__ == back.__dict__:
            return data
        problem = difference(event, back)
    except ValidationError as error:
        problem = f"its data would be refused: {_problems(error)}"
    except Exception as error:  # also what a validator raises, or a comparison
        problem = f"{type(error).__name__}: {error}" if isinstance(error, RecursionError) else _said(error)
    if problem is None:
        return data
    raise SchemaError(
        f"event {name!r} would not be read back as it was written, so it is not appended: {problem}. Give the field "
        "the type of its value, or the value the type of its field"
    )


def _said(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"reading it raises {type(error).__name__}"


def read_metadata(event: RecordedEvent | EventData) -> dict[str, Any]:
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


def decode(
    event: RecordedEvent,
    view: type[E],
    metadata: Mapping[str, Any] | None = None,
    *,
    reader: str = "this service",
    until: str = HELD,
) -> E:
    """The event as `view` declares it. `metadata` spares parsing it again; `reader` is for errors, and so is `until`,
    what becomes of the event until the deploy that an error asks for.

    An event of a newer schema version is read as far as the view's fields validate. Raises `DeployNeeded` for what
    another deploy of the reader can read: `UnknownEventType` for a newer version that does not fit, `UpcastMissing` for
    one older than the view reaches, `UpcastFailed`; `SchemaError` for what none can. Errors name stream, version and
    fields, never values, which may be secret (unless the view's own validator says them).
    """
    document = read_metadata(event) if metadata is None else metadata
    written = document.get("schemaVersion", 1)
    if type(written) is not int or written < 1:
        raise SchemaError(f"{_where(event)}: its metadata's schemaVersion is no version number")
    try:
        check(event.data)
    except ValueError as error:
        raise SchemaError(f"{_where(event)}: its data cannot be read: {error}") from None
    known = view.__tidings__.version
    try:
        data = event.data if written >= known else _lift(event, view, written, reader, until)
        return view.__pydantic_validator__.validate_json(data)  # type: ignore[no-any-return]
    except ValidationError as error:
        problems = _problems(error)
        if written > known and not _is_no_json(error):
            raise UnknownEventType(
                f"{_where(event)} has schema version {written}; {reader} reads it with {view.__qualname__} at version "
                f"{known}, which it does not fit: {problems}. Deploy {reader} with {view.__qualname__} at version "
                f"{written}{until}"
            ) from None
        raise SchemaError(
            f"{_where(event)} does not fit {view.__qualname__}: {problems}. If the class has changed since: give a new "
            "field a default, or raise the schema version and write an upcaster"
        ) from None
    except SchemaError:
        raise
    except Exception as error:  # pydantic lets through what a validator raises beside ValueError and AssertionError
        failed = type(error).__name__
        raise SchemaError(f"{_where(event)}: a validator of {view.__qualname__} failed: {failed}") from error


def check_key(event: RecordedEvent, read: Event, metadata: Mapping[str, Any], *, reader: str = "this service") -> None:
    """Raises `PartitionKeyDiffers` when the view's `key=` is not the key that the event was written with.

    The producer's key decides in which bucket, and so in which order, every service has the event: a view cannot choose
    another one. Compared are events of the view's own schema version that Tidings wrote: another version may have had
    another key, and what other programs write has none.
    """
    own = read.__tidings__
    if own.key is None or metadata.get("schemaVersion") != own.version:
        return
    given, value = metadata.get("partitionKey"), read.__dict__.get(own.key)
    if type(value) is str and value == given:  # nearly always, and found faster so
        return
    wanted = comparable_key(read)
    if wanted is None or wanted == given:
        return
    how = "no partition key, so the stream's name orders it" if given is None else f"the partition key {given!r}"
    raise PartitionKeyDiffers(
        f"{_where(event)} was written with {how}; {reader} reads it with {type(read).__qualname__}, whose "
        f"key={own.key!r} is {wanted!r}. Order follows the producer's key. Deploy {reader} with the producer's key=, "
        "or without key=; until then the event is held"
    )


def _where(event: RecordedEvent) -> str:
    return f"event {event.type!r} at {event.stream}@{event.version} (position {event.position})"


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'document'}: {_message(problem)}"
        for problem in error.errors(include_input=False, include_url=False, include_context=False)[:5]
    )


def _is_no_json(error: ValidationError) -> bool:
    return any(problem["type"] == "json_invalid" and not problem["loc"] for problem in error.errors(include_url=False))


def _message(problem: Mapping[str, Any]) -> str:
    # Of pydantic's own messages this one quotes what it was given.
    return "no member of the union has its tag" if problem["type"] == "union_tag_invalid" else problem["msg"]


def _lift(event: RecordedEvent, view: type[Event], written: int, reader: str, until: str) -> bytes:
    """The event's data as the current version writes it: JSON again, so that old and new are validated alike."""
    own, where = view.__tidings__, _where(event)
    try:
        document = parse(event.data)
    except ValueError as error:
        raise SchemaError(f"{where}: its data is not JSON") from error
    if written < own.oldest:
        raise UpcastMissing(
            f"{where} has schema version {written}; {reader} reads it with {view.__qualname__} at version "
            f"{own.version}, declared with oldest={own.oldest}. Deploy {reader} with @upcaster({written}) and "
            f"oldest={written}{until}"
        )
    for version in range(written, own.version):
        try:
            document = own.upcasters[version](document)
        except Exception as error:
            raise UpcastFailed(
                f"{where}: the upcaster from version {version} of {view.__qualname__} failed: {type(error).__name__}. "
                f"Deploy {reader} with one that reads it{until}"
            ) from error
        if not isinstance(document, dict):
            raise UpcastFailed(
                f"{where}: the upcaster from version {version} returned no dict. Deploy {reader} with one that "
                f"does{until}"
            )
    try:
        return to_json(document)
    except ValueError as error:
        raise UpcastFailed(f"{where}: what its upcasters returned is not JSON") from error
