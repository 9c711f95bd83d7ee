"""Writes results as text and as JSON. Foreign text reaches a terminal only with its control characters escaped.

Into a pipe, it writes plain text: no colours, no boxes, no wrapping, and no spaces within a column except the last one.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TextIO
from uuid import UUID

import typer

from tidings._support.escaping import plain
from tidings._support.json_limits import parse
from tidings.stores import RecordedEvent

__all__ = ["Json", "columns", "event_facts", "event_lines", "facts", "moment", "one_line", "paint", "plain", "say"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]

BOLD: Final = "1"
DIM: Final = "2"
RED: Final = "31"
GREEN: Final = "32"
YELLOW: Final = "33"


def colours(stream: TextIO) -> bool:
    """Return whether to write colours to a stream (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str) -> str:
    """Return text, which must be escaped already, in an ANSI style if standard output shows colours."""
    return f"\x1b[{style}m{text}\x1b[0m" if style and colours(sys.stdout) else text


def say(line: str) -> None:
    """Print a line, which must be escaped already."""
    print(line)


def columns(titles: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> list[str]:
    """Return aligned columns under their titles, with '-' for None and "". The columns in `right` are numbers."""
    from rich.cells import cell_len

    cells = [["-" if value is None or value == "" else plain(str(value)) for value in row] for row in rows]
    widths = [max(cell_len(row[at]) for row in [list(titles), *cells]) for at in range(len(titles))]
    numbers = set(right)

    def line(row: Sequence[str]) -> str:
        padded = []
        for at, (text, width) in enumerate(zip(row, widths, strict=True)):
            gap = " " * (width - cell_len(text))
            padded.append(gap + text if at in numbers else text + gap)
        return "  ".join(padded).rstrip()

    return [paint(line(titles), BOLD), *map(line, cells)]


# ---- JSON ----------------------------------------------------------------------------


def facts(value: object) -> str:
    """Return one line of JSON. It is pure ASCII, so that it is safe to print."""
    return json.dumps(value, default=_simple)


def _simple(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, datetime):
        return moment(value)
    if isinstance(value, bytes):
        return _document(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _document(content: bytes) -> object:
    """Return parsed JSON; bytes that are not JSON as {"base64": ...}."""
    try:
        return parse(content)
    except ValueError:
        return {"base64": base64.b64encode(content).decode("ascii")}


def event_facts(event: RecordedEvent) -> Mapping[str, Any]:
    """Return a recorded event for `facts`."""
    return {
        "position": event.position,
        "stream": event.stream,
        "version": event.version,
        "type": event.type,
        "id": event.id,
        "recorded_at": event.recorded_at,
        "content_type": event.content_type,
        "data": _document(event.data) if event.is_json else {"base64": base64.b64encode(event.data).decode("ascii")},
        "metadata": _document(event.metadata) if event.metadata else None,
    }


# ---- text ----------------------------------------------------------------------------


def moment(when: datetime) -> str:
    """Format a time in UTC to the millisecond, ISO 8601, without a space."""
    return when.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def event_lines(event: RecordedEvent) -> list[str]:
    """Return a whole event on several lines."""
    where = plain(f"{event.stream}@{event.version}")
    when = moment(event.recorded_at)
    lines = [f"{paint(where, BOLD)}  {plain(event.type)}  {when}  position {event.position}  id {event.id}"]
    for name, content, is_json in (("data", event.data, event.is_json), ("metadata", event.metadata, True)):
        if content:
            lines += document_lines(name, content, is_json=is_json)
    return lines


def document_lines(name: str, content: bytes, *, is_json: bool = True) -> list[str]:
    """Return JSON indented, other text as it is, and of other bytes the first 64 in hexadecimal digits."""
    shown = _text(content, is_json)
    return [f"  {name:<9} {shown[0]}", *(f"  {'':<9} {line}" for line in shown[1:])]


def _text(content: bytes, is_json: bool) -> list[str]:
    if is_json:
        try:
            document = json.dumps(parse(content), indent=2, ensure_ascii=False)
            return [plain(line) for line in document.split("\n")]
        except ValueError:
            pass
    try:
        return [plain(line) for line in content.decode().split("\n")]
    except UnicodeDecodeError:
        more = f" ... ({len(content)} bytes; --json shows all)" if len(content) > 64 else f" ({len(content)} bytes)"
        return [content[:64].hex(" ") + more]


def one_line(event: RecordedEvent) -> str:
    """Return an event on one line: position, time, stream and version, type, data."""
    where = plain(f"{event.stream}@{event.version}")
    data = " ".join(text.strip() for text in _text(event.data, event.is_json)) if event.data else "-"
    return f"{event.position:>8}  {moment(event.recorded_at)}  {where}  {plain(event.type)}  {paint(data, DIM)}"
