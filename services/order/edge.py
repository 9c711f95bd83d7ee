"""ASGI middleware for every request: correlation ids and a size limit. It knows HTTP, and nothing of orders.

Every request has a correlation id, which appears in its answer, its events and every log line that it causes. It is the
caller's `X-Correlation-ID`, or the trace id of its `traceparent` (W3C Trace Context), or a new one.
"""

from __future__ import annotations

import re
from typing import Final
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from services.order.problems import BODY_LIMIT, problem_response, too_large, unexpected

__all__ = ["CORRELATION_ID", "Correlated", "Limited", "traceparent_of"]

log = structlog.get_logger("order.api")

CORRELATION_ID: Final = r"^[!-~]{1,128}$"
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def traceparent_of(headers: Headers) -> str | None:
    """Return the caller's trace context, or None if it is malformed, as the standard demands."""
    value = headers.get("traceparent", "")
    return value if _TRACEPARENT.fullmatch(value) and len(value) <= 128 else None


class Correlated:
    """ASGI middleware that sets the correlation id, and answers 500 to an unexpected exception."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        correlation_id = _correlation_of(Headers(scope=scope))
        scope.setdefault("state", {})["correlation_id"] = correlation_id
        answering = False

        async def answer(message: Message) -> None:
            nonlocal answering
            if message["type"] == "http.response.start":
                answering = True
                MutableHeaders(scope=message)["X-Correlation-ID"] = correlation_id
            await send(message)

        with bound_contextvars(correlation_id=correlation_id):
            try:
                await self.app(scope, receive, answer)
            except Exception:
                log.exception("request.failed", method=scope["method"], path=scope["path"])
                if answering:
                    raise  # the answer has begun: the server cuts it off
                await problem_response(scope, unexpected())(scope, receive, answer)


def _correlation_of(headers: Headers) -> str:
    given = headers.get("x-correlation-id", "")
    if re.fullmatch(CORRELATION_ID, given):
        return given
    trace = traceparent_of(headers)
    return trace.split("-")[1] if trace else str(uuid4())


class Limited:
    """ASGI middleware that refuses a body over `BODY_LIMIT`: at once if the request names its size, else when it is
    over."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > BODY_LIMIT:
            await problem_response(scope, too_large())(scope, receive, send)
            return
        size = 0

        async def measured() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > BODY_LIMIT:
                raise HTTPException(413)
            return message

        await self.app(scope, measured, send)
