"""What a request takes in memory once it is parsed, counted before it is. It keeps nothing of the request.

Two bytes on the wire may become a message of a hundred bytes, and compressed ones a thousand times as much.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from tidings.server.budgets import Charge
from tidings.server.refusals import Refusal, Status

__all__ = ["FIELD", "LIGHT", "MESSAGE", "hold_parsed", "malformed", "weights"]

LIGHT: Final = 4 * 1024
"""Bytes of a request that is parsed at once: it cannot become much."""
MESSAGE: Final = 96
"""Bytes that protobuf takes for a message within a message, beside its fields."""
FIELD: Final = 16
"""Bytes that protobuf takes for any other field, beside what it holds."""
STEP: Final = 64 * 1024
"""Bytes of memory that are counted in one turn of the loop."""
_DEEPEST: Final = 100
"""Messages within messages that protobuf takes."""


def malformed() -> Refusal:
    return Refusal(Status.INTERNAL, "Failed to deserialize message")


async def hold_parsed(message: bytes, kind: Any, charge: Charge) -> int:
    """Count for `charge` what the request will take beside its bytes, and return that. Raises `Refusal` where there is
    no room for it, and for bytes that are no message."""
    held = 0
    for weight in weights(message, kind.DESCRIPTOR):
        charge.take(weight)
        held += weight
        await asyncio.sleep(0)
    return held


def weights(data: bytes, descriptor: Any) -> Iterator[int]:
    """Give the bytes that the message will take, in steps. Raises `Refusal` for what protobuf would not take."""
    at, end, inner, weight = 0, len(data), _messages_in(descriptor), 0
    outer: list[tuple[int, dict[int, Any]]] = []
    # Appends come through here: numbers of one byte, which most are, are read in place.
    try:
        while True:
            if at >= end:
                if at > end:
                    raise malformed()
                if not outer:
                    break
                end, inner = outer.pop()
                continue
            tag, at = (byte, at + 1) if (byte := data[at]) < 0x80 else _varint(data, at)
            kind = tag & 7
            if kind == 2:
                size, at = (byte, at + 1) if (byte := data[at]) < 0x80 else _varint(data, at)
                within = inner.get(tag >> 3)
                if within is None:
                    at += size
                    weight += FIELD
                else:
                    if at + size > end or len(outer) == _DEEPEST:
                        raise malformed()
                    outer.append((end, inner))
                    end, inner = at + size, _messages_in(within)
                    weight += MESSAGE
            elif kind == 0:
                at = at + 1 if data[at] < 0x80 else _varint(data, at)[1]
                weight += FIELD
            elif kind in _FIXED:
                at += _FIXED[kind]
                weight += FIELD
            else:
                raise malformed()
            if weight >= STEP:
                yield weight
                weight = 0
    except IndexError:
        raise malformed() from None
    yield weight


_FIXED: Final = {1: 8, 5: 4}
"""Bytes of the kinds of fields that always have as many."""


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins there, and where it ends. Raises `Refusal`, and `IndexError` at the end."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise malformed()


@cache
def _messages_in(descriptor: Any) -> dict[int, Any]:
    """The fields of a message that are messages, by their numbers."""
    return {field.number: field.message_type for field in descriptor.fields if field.message_type is not None}
