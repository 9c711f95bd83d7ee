"""Doing a transaction again after another one was in its way: what services do by themselves, for everything else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Final, ParamSpec, TypeVar

from tidings.database.outages import is_contention
from tidings.errors import DatabaseUnavailable

__all__ = ["again_when_contended"]

TIMES: Final = 5
"""Times that it is done, at most. PostgreSQL undoes one of the transactions that wait for each other, so that the
others go on: each deadlock takes one of them out of the way."""

P = ParamSpec("P")
T = TypeVar("T")


def again_when_contended(do: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Wrap a function whose only effect is one transaction: after a deadlock, or when the transaction could not be
    serialized, the function runs again. The last of these errors is raised as it is."""

    @wraps(do)
    async def doing(*args: P.args, **options: P.kwargs) -> T:
        for _ in range(TIMES - 1):
            try:
                return await do(*args, **options)
            except DatabaseUnavailable as error:
                if not is_contention(error):
                    raise
        return await do(*args, **options)

    return doing
