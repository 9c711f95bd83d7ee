"""Requests that a client has compressed, unpacked within the budgets of its call. It knows no frames.

A few kilobytes may unpack to a thousand times as much, so that is counted step by step, and others have their turns.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import Final

from tidings.server.budgets import Charge
from tidings.server.refusals import Refusal, Status, shown

__all__ = ["ACCEPTED", "Compressed", "unpacked"]

_FORMATS: Final = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
"""Names in `grpc-encoding` to what zlib calls them; gRPC's deflate is zlib's format."""
ACCEPTED: Final = ",".join(["identity", *_FORMATS])
"""What a client may use, as `grpc-accept-encoding` says it."""
STEP: Final = 64 * 1024
"""Bytes that are unpacked in one turn of the loop."""


class Compressed(bytes):
    """A request as it came, which is to be unpacked."""


async def unpacked(message: Compressed, encoding: str, longest: int, charge: Charge) -> bytes:
    """Return the request. It counts against the budgets of `charge` until the caller gives its bytes back.

    Raises `Refusal` for an encoding that is not known, for one that is larger than `longest` bytes or than there is
    room for, and for bytes that are not what they are said to be.
    """
    if encoding not in _FORMATS:
        if encoding in ("", "identity"):
            raise Refusal(Status.INTERNAL, "Request did not include grpc-encoding value with compressed message.")
        raise Refusal(
            Status.UNIMPLEMENTED,
            f"Unsupported grpc-encoding value '{shown(encoding)}'. Supported encodings: {ACCEPTED}",
            grpc_accept_encoding=ACCEPTED,
        )
    unpacking, rest, parts = zlib.decompressobj(_FORMATS[encoding]), b"", []
    at = size = 0
    try:
        while not unpacking.eof:
            if not rest:
                rest = message[at : at + STEP]
                at += len(rest)
            part = unpacking.decompress(rest, STEP)
            if not (part or rest or unpacking.eof):
                raise zlib.error("it ends too early")
            rest = unpacking.unconsumed_tail
            size += len(part)
            if size > longest:
                details = f"Received message larger than max ({size} vs. {longest})"
                raise Refusal(Status.RESOURCE_EXHAUSTED, details)
            charge.take(len(part))
            parts.append(part)
            await asyncio.sleep(0)
    except zlib.error as error:
        raise Refusal(Status.INTERNAL, f"The request is not {encoding}: {error}") from None
    if unpacking.unused_data or at < len(message):
        raise Refusal(Status.INTERNAL, f"The request has bytes behind its {encoding}")
    return b"".join(parts)
