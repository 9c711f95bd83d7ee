"""Checks an event that a person writes on a command line, and gives it the key and schema version of its classes.

It appends nothing.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from types import ModuleType
from typing import Any, Final, NamedTuple
from uuid import UUID

from tidings._support.json_limits import parse
from tidings.cli._exits import NO, USAGE, Refused
from tidings.cli._output import document_lines, event_facts, facts, plain
from tidings.errors import DeployNeeded, SchemaError, StreamDeleted, StreamNotFound
from tidings.modelling.aggregate import Aggregate, declared
from tidings.modelling.codec import decode, read_metadata
from tidings.modelling.events import Event, partition_key, schema_version, wire_name
from tidings.protocol.position import partition_key as partition_key_of
from tidings.service import Service
from tidings.stores import JSON, EventData, EventStore, RecordedEvent

__all__ = [
    "Handmade",
    "Known",
    "check_against",
    "check_data",
    "checked",
    "classes_of",
    "dry_lines",
    "given_metadata",
    "made",
]

UNCHECKED: Final = "tidingsUnchecked"
"""The metadata key of an event that was appended unchecked. Later events of its type are not compared with it."""
LOOKED_AT: Final = 10_000
"""Newest events of the log in which to look for one of the same type."""


class Handmade(NamedTuple):
    """The event as a person gave it."""

    stream: str
    type: str
    data: bytes
    metadata: dict[str, Any]
    """With `partitionKey` and `schemaVersion` if they were given."""


class Known(NamedTuple):
    """The event's metadata with what its classes add."""

    metadata: dict[str, Any]
    by: tuple[str, ...]
    """The classes that have checked it; empty if none is declared for the type."""
    notes: tuple[str, ...]


def classes_of(type: str, services: Mapping[str, Service]) -> dict[str, type[Event]]:
    """Return the classes with this wire name, by who uses them.

    These are each service's view, and the classes that the services' modules define or that their aggregates evolve.
    """
    found: dict[str, Any] = {}
    for service in services.values():
        view = service.view(type)
        if view is not None:
            found[f"service {service.name!r}"] = view
    for module in _modules_of(services):
        for value in list(vars(module).values()):
            if not inspect.isclass(value):
                continue
            evolved = declared(value).evolutions if issubclass(value, Aggregate) else ()
            for kind in chain((value,), evolved):
                if issubclass(kind, Event) and wire_name(kind) == type and kind not in found.values():
                    found[f"{kind.__module__}.{kind.__qualname__}"] = kind
    return found


def _modules_of(services: Mapping[str, Service]) -> Iterator[ModuleType]:
    names = dict.fromkeys(target.partition(":")[0] for target in services)
    for service in services.values():
        names |= dict.fromkeys(handler.function.__module__ for handler in service.named.values())
    for name, module in list(sys.modules.items()):
        if any(name == given or name.startswith(f"{given}.") for given in names):
            yield module


def checked(event: Handmade, classes: Mapping[str, type[Event]]) -> Known:
    """Check the event with its classes, and return it with their partition key and schema version.

    Raises `Refused` if one of them cannot read it, or if they disagree about its key.
    """
    if not classes:
        return Known(event.metadata, (), ())
    metadata = {"schemaVersion": max(map(schema_version, classes.values()))} | event.metadata
    recorded = RecordedEvent(
        0, event.stream, 0, event.type, event.data, json.dumps(metadata).encode(), True, bytes(16), 0
    )
    keys: dict[str, str | None] = {}
    notes = []
    for reader, kind in classes.items():
        try:
            read = decode(recorded, kind, metadata, reader=reader)
        except DeployNeeded as error:
            notes.append(str(error))
            continue
        except SchemaError as error:
            said = str(error).partition(" (position 0)")
            raise Refused(NO, f"not appended, because {reader} could not read it: {said[0]}{said[2]}") from error
        if kind.__tidings__.key is not None and schema_version(kind) == metadata["schemaVersion"]:
            keys[reader] = partition_key(read)
    return Known(_keyed(metadata, keys), tuple(classes), tuple(notes))


def _keyed(metadata: dict[str, Any], keys: Mapping[str, str | None]) -> dict[str, Any]:
    if not keys:
        return metadata
    given = metadata.get("partitionKey")
    said = ", ".join(f"{reader} says {key!r}" for reader, key in keys.items())
    if "partitionKey" in metadata and any(key != given for key in keys.values()):
        raise Refused(
            NO, f"not appended: you gave the partition key {given!r}, but {said}. --unchecked appends it as it is"
        )
    if len(set(keys.values())) > 1:
        raise Refused(NO, f"not appended: its classes disagree about its partition key: {said}. Give them one key=")
    key = next(iter(keys.values()))
    return metadata if key is None else metadata | {"partitionKey": key}


async def check_against(event: Handmade, store: EventStore) -> bool:
    """Compare an event of an undeclared type with the newest one of its type, and return whether there is one.

    Raises `Refused` if the newest one has a key or schema version and this one does not. Looks for it at the end of the
    event's own stream, and then among the newest events of the log. Leaves out events that were appended unchecked.
    """
    found = await _newest(event, store)
    if found is None:
        return False
    metadata, wanted = read_metadata(found), []
    if "partitionKey" in metadata and "partitionKey" not in event.metadata:
        wanted.append(f"--key KEY (it has {metadata['partitionKey']!r}; --key '' for none)")
    if metadata.get("schemaVersion", 1) != 1 and "schemaVersion" not in event.metadata:
        wanted.append(f"--schema-version N (it has {metadata['schemaVersion']!r})")
    if wanted:
        raise Refused(
            USAGE,
            f"not appended: the newest event of type {event.type!r}, {found.stream}@{found.version}, has what this one "
            f"lacks. Give {' and '.join(wanted)}; or set TIDINGS_SERVICES=MODULE:SERVICE,... to services that declare "
            "the type. --unchecked appends it as it is",
        )
    return True


async def _newest(event: Handmade, store: EventStore) -> RecordedEvent | None:
    own = store.read_stream(event.stream, backwards=True, limit=LOOKED_AT)
    for events in (own, store.read_all(backwards=True, limit=LOOKED_AT)):
        with suppress(StreamNotFound, StreamDeleted):
            async for recorded in events:
                if recorded.type == event.type and UNCHECKED not in read_metadata(recorded):
                    return recorded
    return None


def check_data(data: bytes) -> None:
    """Raise `Refused` for data that no service could read as JSON."""
    try:
        parse(data)
    except (ValueError, RecursionError) as error:
        raise Refused(USAGE, f"DATA is not JSON that services can read: {error}; --octets takes anything") from error


def made(event: Handmade, known: Known, id: UUID, content_type: str) -> EventData:
    """Return the event to append."""
    document: dict[str, Any] = {"$correlationId": str(id)} | known.metadata
    if document.get("partitionKey") == "":
        del document["partitionKey"]
    packed = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return EventData(event.type, event.data, packed.encode("utf-8", "backslashreplace"), content_type, id)


def dry_lines(stream: str, event: EventData, expected: str, known: Known, as_json: bool) -> list[str]:
    """Return the lines that `--dry-run` prints."""
    recorded = RecordedEvent(
        0, stream, 0, event.type, event.data, event.metadata, event.content_type == JSON, event.id.bytes, 0
    )
    if as_json:
        shown = event_facts(recorded)
        wanted = ("stream", "type", "id", "content_type", "data", "metadata")
        found = {name: shown[name] for name in wanted}
        return [facts({"dry_run": True, **found, "expected": expected, "checked_by": known.by})]
    key = partition_key_of(recorded)
    lines = [f"Would append to {plain(stream)} ({plain(expected)}): {plain(event.type)}, id {event.id}"]
    for name, content in (("data", event.data), ("metadata", event.metadata)):
        lines += document_lines(name, content, is_json=name == "metadata" or recorded.is_json)
    lines.append(f"  {'key':<9} {plain(key)}{'' if key != stream else ' (the name of the stream)'}")
    lines.append(f"  {'checked':<9} {', '.join(map(plain, known.by)) or 'by nobody: no class is known for this type'}")
    return lines


def given_metadata(metadata: str, key: str | None, version: int | None, *, unchecked: bool) -> dict[str, Any]:
    """Return `--metadata`, `--key`, `--schema-version` and `--unchecked` as one document. Raises `Refused`."""
    try:
        document = parse(metadata.encode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise Refused(USAGE, f"--metadata is not JSON that can be read back: {error}") from error
    if not isinstance(document, dict):
        raise Refused(USAGE, '--metadata is JSON, but not an object: write it as \'{"actor": "me"}\'')
    for name, option, value in (("partitionKey", "--key", key), ("schemaVersion", "--schema-version", version)):
        if value is None:
            continue
        if document.get(name, value) != value:
            raise Refused(USAGE, f"{option} {value!r} and --metadata's {name} {document[name]!r} differ: give one")
        document[name] = value
    return document | ({UNCHECKED: True} if unchecked else {})
