"""What may be written to metadata streams: every store refuses what would end the process of an EventStoreDB server.

Measured on EventStoreDB 24.2, whose process ends at each of these. They are refused before anything is sent. No I/O.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final

from tidings.errors import InvalidMetadata, InvalidStreamName
from tidings.stores import EventData

__all__ = ["MAX_AGE_LIMIT", "check_closing", "check_metadata_write", "is_metadata_stream"]

MAX_AGE_LIMIT: Final = 60_000_000_000
"""Seconds: the most that `$maxAge` may be. Now minus more than that is before the year 1."""

_MAX_AGE: Final = "$maxAge"
_NAMED: Final = re.compile(rb"maxAge|\\u", re.IGNORECASE)


def is_metadata_stream(stream: str) -> bool:
    """Whether the stream holds the metadata of another one."""
    return stream.startswith("$$")


def check_metadata_write(stream: str, events: Sequence[EventData]) -> None:
    """Raise `InvalidMetadata` for a document with a number that the server cannot calculate with."""
    if stream.startswith("$$"):
        for event in events:
            _check_document(stream.removeprefix("$$"), event.data)


def _check_document(stream: str, document: bytes) -> None:
    try:
        pairs = json.loads(document, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        if _NAMED.search(document):  # the server's reader takes more than JSON: comments, other quotes
            raise InvalidMetadata(stream, "the document names $maxAge and is not JSON") from None
        return
    for key, value in pairs if isinstance(pairs, _Pairs) else ():
        if key == _MAX_AGE and isinstance(value, int | float) and not -MAX_AGE_LIMIT <= value <= MAX_AGE_LIMIT:
            raise InvalidMetadata(stream, f"$maxAge is {value}, and the most that it may be is {MAX_AGE_LIMIT} seconds")


class _Pairs(list[tuple[str, Any]]):
    """An object's keys and values, each as often as it stands there."""


def check_closing(stream: str) -> None:
    """Raise `InvalidStreamName` for deleting or tombstoning a metadata stream."""
    if stream.startswith("$$"):
        original = stream.removeprefix("$$")
        raise InvalidStreamName(
            f"{stream!r} holds the metadata of stream {original!r} and cannot be deleted: the process of an "
            f"EventStoreDB server can end over it. To empty it:  await store.set_metadata({original!r}, {{}})"
        )
