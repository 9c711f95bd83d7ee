"""Ids of what handlers cause, made from what caused it. It does no I/O and draws no random numbers."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final
from uuid import UUID

__all__ = ["digest"]

_PURPOSE: Final = b"tidings.identity"
"""Keeps these digests apart from those that anything else makes of the same text."""


def digest(*parts: str, secret: bytes = b"") -> UUID:
    """Return the id that stands for these parts in this order, and for no others.

    Each part is preceded by its length, so that no two lists of parts read alike. Only who knows `secret` (at most 64
    bytes) can tell the id beforehand.
    """
    text = "".join(f"{len(part)}:{part}" for part in parts)
    made = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, key=secret, person=_PURPOSE)
    return UUID(bytes=made.digest(), version=5)
