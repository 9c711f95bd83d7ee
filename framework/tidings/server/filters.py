"""The filter of a read of `$all`, from the message to a `Choice`. It is evaluated elsewhere."""

from __future__ import annotations

from typing import Any, Final

from tidings.server.expressions import Expression
from tidings.server.log import Choice
from tidings.server.refusals import invalid_argument
from tidings.server.wire import Malformed

__all__ = ["PREFIXES", "PREFIX_CHARACTERS", "choice_of", "choice_of_read"]

PREFIXES: Final = 1000
"""Prefixes of one filter: each event is compared with all of them."""
PREFIX_CHARACTERS: Final = 64 * 1024
"""Characters of all prefixes of one filter."""


def choice_of_read(filter: Any) -> Choice:
    """From `FilterOptions` of a read or of a subscription. Raises as `choice_of` does."""
    if filter.WhichOneof("window") is None:
        raise invalid_argument("The filter names no window: set max or count.")
    return choice_of(filter)


def choice_of(filter: Any) -> Choice:
    """From `FilterOptions` of a read or of a persistent subscription. Raises `Malformed`, and `Refusal` for a filter
    that costs too much."""
    kind = filter.WhichOneof("filter")
    if kind is None:
        raise Malformed("A filter names neither event types nor streams.")
    expression = getattr(filter, kind)
    by_type = kind == "event_type"
    if expression.regex:
        try:
            return Choice(by_type, (), Expression(expression.regex))
        except Malformed as error:
            raise invalid_argument(str(error)) from None
    if len(expression.prefix) > PREFIXES or sum(map(len, expression.prefix)) > PREFIX_CHARACTERS:
        raise invalid_argument(
            f"The filter has more than {PREFIXES} prefixes, or more than {PREFIX_CHARACTERS} characters in them."
        )
    return Choice(by_type, tuple(expression.prefix))
