"""The filter of a read of `$all`, from the message to a `Choice`. It is evaluated elsewhere."""

from __future__ import annotations

from typing import Any

from tidings.server.expressions import Expression
from tidings.server.log import Choice
from tidings.server.wire import Malformed

__all__ = ["choice_of"]


def choice_of(filter: Any) -> Choice:
    """From `FilterOptions` of a read or of a persistent subscription. Raises `Malformed`."""
    kind = filter.WhichOneof("filter")
    if kind is None:
        raise Malformed("A filter names neither event types nor streams.")
    expression = getattr(filter, kind)
    by_type = kind == "event_type"
    if not expression.regex:
        return Choice(by_type, tuple(expression.prefix))
    return Choice(by_type, (), Expression(expression.regex))
