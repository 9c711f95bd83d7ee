"""A class whose objects are opened by `async with`: who forgets the `async` is told. It opens nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

__all__ = ["OnlyAsync"]


class OnlyAsync:
    """To be inherited by what has `__aenter__`. Type checkers see nothing of it: they refuse such a `with` already."""

    if not TYPE_CHECKING:

        def __enter__(self) -> NoReturn:
            name = type(self).__name__
            raise TypeError(
                f"with {name}(...): write 'async with {name}(...) as {name.lower()}:', in an async function"
            )

        def __exit__(self, *_: object) -> None:
            """Python asks for it before it calls `__enter__`."""
