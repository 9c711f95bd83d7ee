"""Which server this one answers as: version, limits, protocols. It answers nothing itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from tidings.errors import ConfigurationError
from tidings.server.budgets import Limits

__all__ = ["EVENTSTOREDB", "KURRENTDB", "RELEASES", "Release", "release_of"]

MIB: Final = 1024 * 1024
COPIES: Final = 3
"""How many times the largest append may be in memory: as it came, as it is stored, as it waits for its commit."""


@dataclass(frozen=True, slots=True)
class Release:
    """A server whose answers were recorded."""

    name: str
    version: str
    data: int
    """Bytes of data that one append may have. Its metadata and types do not count."""
    whole: int
    """Bytes that one append may have with its metadata, types and what each event takes besides: a limit of this
    server's own, which bounds memory."""
    limits: Limits = field(default_factory=Limits)
    """The budgets that it has by default."""
    stride: int = 8
    """Distance of positions: as in a file of events, the next number is not one."""
    appends_records: bool = False
    """It has KurrentDB's second protocol, too."""

    def check(self, limits: Limits) -> None:
        """Raise `ConfigurationError` for budgets in which the largest append could not be written and read again."""
        if limits.connection_bytes < COPIES * self.whole:
            raise ConfigurationError(
                f"the server's limit connection_bytes is {limits.connection_bytes}: as {self.name} it takes appends "
                f"for which that must be {COPIES * self.whole} or more"
            )


EVENTSTOREDB: Final = Release("eventstoredb-24.2", "24.2.0", data=MIB, whole=8 * MIB)
KURRENTDB: Final = Release(
    "kurrentdb-26.1",
    "26.1.0",
    data=16 * MIB,
    whole=20 * MIB,
    limits=Limits(connection_bytes=64 * MIB, user_bytes=128 * MIB, process_bytes=256 * MIB),
    stride=512,
    appends_records=True,
)

RELEASES: Final = {release.name: release for release in (EVENTSTOREDB, KURRENTDB)}


def release_of(name: str) -> Release:
    """Return the release with this name. Raises `ConfigurationError`."""
    try:
        return RELEASES[name]
    except KeyError:
        raise ConfigurationError(
            f"the server cannot answer as {name!r}: name one of {', '.join(RELEASES)}, or leave it out"
        ) from None
