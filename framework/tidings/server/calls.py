"""What a service and a transport agree on: methods, calls, how they are refused. It knows no events and no sockets.

A handler is a coroutine function that takes the requests and a `Call`. One that answers once returns the message. One
that answers with a stream sends batches: lists of messages that are already bytes, so that the transport may put many
into a frame. `send` returns when the batch has left, so that a client that does not read on stops its handler.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tidings.server.budgets import Charge

__all__ = ["FRAME_LIMIT", "PUBLIC_LIMIT", "Call", "Method", "Send"]

FRAME_LIMIT: Final = 16 * 1024 * 1024
"""Bytes of a request message; a longer one is RESOURCE_EXHAUSTED."""
PUBLIC_LIMIT: Final = 4 * 1024
"""Bytes of a request message that comes without credentials."""

Unary = Callable[[Any, "Call"], Coroutine[Any, Any, Any]]
Send = Callable[[list[bytes]], Awaitable[None]]
Streaming = Callable[[Any, "Call", Send], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Call:
    """Who calls, and what the call carried beside its messages."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    peer: str = ""
    user: str = ""
    """Empty: nobody in particular, because the server does not ask."""
    charge: Charge | None = None
    """What the call costs the server; None where nobody counts."""

    @property
    def connection_name(self) -> str:
        return self.metadata.get("connection-name", "")


@dataclass(frozen=True, slots=True)
class Method:
    """A method of a service. Exactly one of the two handlers is given."""

    path: str
    """`/package.Service/Method`."""
    request: Any
    """The class of its request messages."""
    unary: Unary | None = None
    streaming: Streaming | None = None
    requests_stream: bool = False
    """The handler receives an asynchronous iterator of requests instead of the one."""
    endless: bool = False
    """It may go on for ever: a server that ends does not wait for it."""
    public: bool = False
    """It answers callers without credentials, too."""
    most: int = FRAME_LIMIT
    """Bytes of its longest request, if callers have credentials."""

    @property
    def longest(self) -> int:
        """Bytes of its longest request."""
        return PUBLIC_LIMIT if self.public else self.most
