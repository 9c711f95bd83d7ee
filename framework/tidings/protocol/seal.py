"""The seal: proof that a message was published by somebody who has the key, and was changed by nobody since.

A broker believes whoever may publish. Where that is more than the relays, a keyed digest (BLAKE2b, RFC 7693) over
everything that a service reads of a message keeps out what others send. It hides nothing: bodies stay readable.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from hmac import compare_digest
from typing import Any, Final

from tidings.errors import ConfigurationError

__all__ = ["HEADER", "Seal", "new_key", "read_keys"]

HEADER: Final = "tidings-seal"
"""The header that carries the seal, 32 hexadecimal digits."""
KEY_BYTES: Final = 32
_SIZE: Final = 16
_KEY: Final = re.compile(r"[0-9a-fA-F]{32,128}")


def new_key() -> str:
    """Return a new key, hexadecimal."""
    return secrets.token_hex(KEY_BYTES)


def read_keys(text: str) -> tuple[bytes, ...]:
    """Read keys that are separated by commas. Raises `ConfigurationError`, which shows none of them."""
    keys = [key.strip() for key in text.split(",")]
    for number, key in enumerate(keys, 1):
        if not _KEY.fullmatch(key) or len(key) % 2:
            raise ConfigurationError(
                f"TIDINGS_BUS_KEYS: key {number} of {len(keys)} is not 32 to 128 hexadecimal digits; 'tidings keys "
                "new' makes one"
            )
    if len(keys) > 2:
        raise ConfigurationError(
            f"TIDINGS_BUS_KEYS has {len(keys)} keys: the first seals, and one more is accepted while keys change"
        )
    return tuple(bytes.fromhex(key) for key in keys)


class Seal:
    """Seals with the first of the keys, and accepts a seal of any of them. It is asked for the parts of a message."""

    __slots__ = ("_keyed",)

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keyed = tuple(blake2b(key=key, digest_size=_SIZE) for key in keys)

    def of(self, kind: str, content_type: str, headers: Mapping[str, Any], body: bytes) -> str:
        """Return the seal of a message, for its header `HEADER`; `kind` is the message's type."""
        return _digest(self._keyed[0], kind, content_type, headers, body)

    def holds(self, kind: str, content_type: str, headers: Mapping[str, Any], body: bytes) -> bool:
        """Whether somebody who has a key has published exactly this message."""
        seal = headers.get(HEADER)
        kind = kind or f"{headers.get('cloudEvents_type')}"  # AMQP leaves out a type that is longer than 255 bytes
        if not isinstance(seal, str) or not seal.isascii():
            return False
        return any(compare_digest(seal, _digest(keyed, kind, content_type, headers, body)) for keyed in self._keyed)


def _digest(keyed: blake2b, kind: str, content_type: str, headers: Mapping[str, Any], body: bytes) -> str:
    """Digest everything that `decode` and `Marker.decode` read. Texts come with their lengths, so that no two messages
    give the same bytes."""
    get = headers.get
    log, identity, moment = f"{get('tidings-log')}", f"{get('cloudEvents_id')}", f"{get('cloudEvents_time')}"
    stream, event, partition = (
        f"{get('cloudEvents_subject')}",
        f"{get('cloudEvents_type')}",
        f"{get('cloudEvents_partitionkey')}",
    )
    metadata = get("tidings-metadata") or b""
    if not isinstance(metadata, bytes | bytearray):  # brokers may give bytes back as text; else nobody reads it
        metadata = str(metadata).encode("utf-8", "surrogatepass")
    text = (
        f"{get('tidings-position')!r} {get('tidings-previous')!r} {get('tidings-version')!r} {get('tidings-bucket')!r} "
        f"{len(kind)} {len(content_type)} {len(log)} {len(identity)} {len(moment)} {len(stream)} {len(event)} "
        f"{len(partition)} {len(metadata)} {kind}{content_type}{log}{identity}{moment}{stream}{event}{partition}"
    )
    digest = keyed.copy()
    digest.update(text.encode("utf-8", "surrogatepass"))
    digest.update(metadata)
    digest.update(body)
    return digest.hexdigest()
