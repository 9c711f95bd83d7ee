"""Ids of what handlers and requests cause, made from what caused it. It does no I/O and draws no random numbers.

Whoever can compute an id beforehand can append something else under it first, and the real event is then taken for a
repetition. So ids are made with a secret key of the service, if it has one (`TIDINGS_ID_KEYS`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final, NamedTuple
from uuid import UUID

from tidings.errors import ConfigurationError

__all__ = ["OPEN", "UNKEYED", "IdKey", "IdKeys", "digest", "instead_of"]

OPEN: Final = "open"
"""The word that stands for ids without a key."""
KEYS: Final = 16
"""Keys in one setting, at most."""
_PURPOSE: Final = b"tidings.identity"
"""Keeps these digests apart from those that anything else makes of the same text."""
_NAMING: Final = b"tidings.id.key"
_KEY: Final = re.compile(r"(?P<key>open|(?:[0-9a-fA-F]{2}){16,64})(?:@(?P<upto>[0-9]{1,19}))?")


def digest(*parts: str, secret: bytes = b"") -> UUID:
    """Return the id that stands for these parts in this order, and for no others.

    Each part is preceded by its length, so that no two lists of parts read alike. Only who knows `secret` (at most 64
    bytes) can tell the id beforehand.
    """
    text = "".join(f"{len(part)}:{part}" for part in parts)
    made = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, key=secret, person=_PURPOSE)
    return UUID(bytes=made.digest(), version=5)


def instead_of(identity: UUID) -> UUID:
    """Return the id of an event whose own id somebody else has used for another event."""
    return digest("instead of", str(identity))


class IdKey(NamedTuple):
    """A key, and how long it was in use."""

    secret: bytes
    """Empty for ids without a key."""
    upto: int | None = None
    """Position of the last event whose handlers may have used it; None for a key that may be in use."""

    @property
    def name(self) -> str:
        """What may be shown and stored of the key: `open`, or a digest."""
        return blake2b(self.secret, digest_size=8, person=_NAMING).hexdigest() if self.secret else OPEN


class IdKeys:
    """The keys of a service's ids. The first one makes new ids; ids of the others are recognised."""

    __slots__ = ("_bounded", "_secrets", "keys")

    def __init__(self, keys: Sequence[IdKey]) -> None:
        self.keys = tuple(keys)
        self._bounded = any(key.upto is not None for key in self.keys)
        self._secrets = tuple(key.secret for key in self.keys)

    def __repr__(self) -> str:
        return f"IdKeys({', '.join(key.name for key in self.keys)})"

    def secrets(self, cause: int | None = None) -> tuple[bytes, ...]:
        """Return the key for the ids of what the event at position `cause` leads to, and then all others with which
        they may have been made; those of a request have no cause."""
        if cause is None or not self._bounded:
            return self._secrets
        return tuple(key.secret for key in self.keys if key.upto is None or cause <= key.upto)

    @classmethod
    def read(cls, text: str) -> IdKeys:
        """Read keys that are separated by commas, each hexadecimal or `open`, and perhaps `@` and a position.

        Raises `ConfigurationError`, which shows no key.
        """
        parts = [part.strip() for part in text.split(",")]
        keys = list[IdKey]()
        for number, part in enumerate(parts, 1):
            found = _KEY.fullmatch(part)
            what = f"TIDINGS_ID_KEYS: key {number} of {len(parts)}"
            if found is None:
                raise ConfigurationError(
                    f"{what} is neither 32 to 128 hexadecimal digits nor 'open', perhaps with @POSITION behind it; "
                    "'tidings keys new' makes a key"
                )
            secret = b"" if found["key"] == OPEN else bytes.fromhex(found["key"])
            if any(secret == key.secret for key in keys):
                raise ConfigurationError(f"{what} is there twice: leave one out")
            keys.append(IdKey(secret, None if found["upto"] is None else int(found["upto"])))
        if keys[0].upto is not None:
            raise ConfigurationError(
                "TIDINGS_ID_KEYS: the first key makes new ids, so it has no end: write it without '@', or put the key "
                "that makes ids now before it"
            )
        if len(keys) > KEYS:
            raise ConfigurationError(f"TIDINGS_ID_KEYS has {len(keys)} keys; {KEYS} are possible")
        return cls(keys)


UNKEYED: Final = IdKeys([IdKey(b"")])
"""Ids that everybody can compute who knows what they are made from."""
