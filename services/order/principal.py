"""Who sends a request, as far as somebody has proved it. By default nobody does: anybody may do everything.

To let only known callers in, answer with a `Principal` or raise `Problem(401, ...)`, and put that in the place of
`principal_of`, for example in a module of your own that is served instead of `services.order.api`:

    from services.order.api import api
    from services.order.principal import Principal, principal_of

    def by_token(request: Request) -> Principal: ...

    api.dependency_overrides[principal_of] = by_token
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

__all__ = ["ANYBODY", "Principal", "principal_of"]

_NAME: Final = re.compile(r"[!-~]([ -~]{0,98}[!-~])?")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who sends a request. The name stands in the history of orders, and keys belong to it."""

    name: str
    """1 to 100 visible ASCII characters; "" for somebody unknown."""
    speaks_for_others: bool = False
    """Whether it may name another `actor`, as a shop does for its customers."""

    def __post_init__(self) -> None:
        if self.name and not _NAME.fullmatch(self.name):
            raise ValueError("a principal's name has 1 to 100 visible ASCII characters, and no space at its ends")


ANYBODY: Final = Principal("", speaks_for_others=True)


async def principal_of() -> Principal:
    """Return the principal of a request: anybody, unless this is overridden."""
    return ANYBODY
