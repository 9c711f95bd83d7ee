"""The filter of a read of `$all`, from the message to a `Choice`. It is evaluated elsewhere."""

from __future__ import annotations

import re
from typing import Any, Final

from tidings.server.log import Choice
from tidings.server.wire import Malformed

__all__ = ["choice_of"]

PATTERN_LIMIT: Final = 16 * 1024
"""Characters of a regular expression."""


def choice_of(filter: Any) -> Choice:
    """From `FilterOptions` of a read or of a persistent subscription. Raises `Malformed`.

    EventStoreDB's expressions are .NET's; what clients build (anchors, alternatives, a negative look-ahead) means the
    same here. As there, nothing ends an expression that backtracks without end, such as `(a+)+$`: whoever may read
    `$all` can keep the server busy with one, until somebody kills the process.
    """
    kind = filter.WhichOneof("filter")
    if kind is None:
        raise Malformed("A filter names neither event types nor streams.")
    expression = getattr(filter, kind)
    by_type = kind == "event_type"
    if not expression.regex:
        return Choice(by_type, tuple(expression.prefix))
    if len(expression.regex) > PATTERN_LIMIT:
        raise Malformed("The filter's regular expression is too long.")
    try:
        return Choice(by_type, (), re.compile(expression.regex))
    except (re.error, RecursionError, OverflowError) as error:
        raise Malformed(f"The filter's regular expression cannot be read: {error}") from None
