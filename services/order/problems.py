"""What the API answers when it cannot do what was asked: problem details (RFC 9457). They never show internals.

A problem's `type` ends in a word that programs can rely on; `title` and `detail` are for people. `correlation_id` finds
the request in the logs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match

from services.order.order import OrderRefused
from tidings.errors import (
    Contention,
    DatabaseUnavailable,
    EventTooLarge,
    StoreUnavailable,
    StreamDeleted,
    StreamNotFound,
    TidingsError,
    VersionNotFound,
    WrongExpectedVersion,
)

__all__ = [
    "BODY_LIMIT",
    "HANDLERS",
    "MEDIA_TYPE",
    "Problem",
    "problem_response",
    "too_large",
    "unexpected",
]

log = structlog.get_logger("order.api")

MEDIA_TYPE: Final = "application/problem+json"
SHOWN: Final = 20
"""Mistakes of one request that are listed; a body can have a hundred thousand."""
RETRY_SECONDS: Final = 1
BODY_LIMIT: Final = 1024 * 1024
"""Bytes: no event may be larger, either."""


class Problem(Exception):
    """An answer that is no success. `kind` is the last word of its type."""

    def __init__(
        self, status: int, kind: str, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.headers = dict(headers or {})
        self.members = members


class ProblemResponse(JSONResponse):
    """ASCII only: what it quotes from a request may have characters that UTF-8 cannot express."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def problem_response(scope: Mapping[str, Any], problem: Problem) -> JSONResponse:
    """The answer to the request of this ASGI scope."""
    status = HTTPStatus(problem.status)
    document = {
        "type": f"urn:problem:{problem.kind}" if problem.kind else "about:blank",
        "title": problem.kind.replace("-", " ").capitalize() if problem.kind else status.phrase,
        "status": status.value,
        "detail": problem.detail,
        "instance": (scope.get("raw_path") or b"/").partition(b"?")[0].decode("latin-1")[:200],
        "correlation_id": scope.get("state", {}).get("correlation_id", ""),
        **problem.members,
    }
    headers = dict(problem.headers)
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers.setdefault("Retry-After", str(RETRY_SECONDS))
    return ProblemResponse(document, status.value, headers)


def malformed(where: str = "") -> Problem:
    """The body is no JSON, or JSON that nobody writes: nested thousands of times, numbers of thousands of digits."""
    return Problem(400, "malformed-json", f"The body cannot be read as JSON.{where}")


def too_large() -> Problem:
    """The body is over `BODY_LIMIT`."""
    return Problem(413, "body-too-large", f"The body is over {BODY_LIMIT} bytes.")


def unexpected() -> Problem:
    """A fault of this program. What it was stands in the log, under the correlation id."""
    return Problem(500, "", "Something is wrong here, not with the request. Report it with its correlation id.")


# ---- exceptions and what they mean to whoever asked ------------------------------------


async def _said(request: Request, problem: Exception) -> JSONResponse:
    assert isinstance(problem, Problem)
    return problem_response(request.scope, problem)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    mistakes = error.errors()
    if mistakes[0]["type"] == "json_invalid":
        return problem_response(request.scope, malformed(f" It breaks off at character {mistakes[0]['loc'][-1]}."))
    shown = [_mistake(each) for each in mistakes[:SHOWN]]
    detail = f"{shown[0]['at']}: {shown[0]['detail']}"
    if len(mistakes) > 1:
        detail += f" (and {len(mistakes) - 1} more)"
    return problem_response(request.scope, Problem(422, "invalid-request", detail, errors=shown))


def _mistake(error: Mapping[str, Any]) -> dict[str, str]:
    """One mistake, without the value, which may be large or secret. `at` names a parameter, or points into the body."""
    place, *path = error["loc"]
    if place == "body":
        steps = (str(step).replace("~", "~0").replace("/", "~1")[:100] for step in path)
        at = "#" + "".join(f"/{step}" for step in steps)
    else:
        at = ".".join(map(str, path))
    return {"in": str(place), "at": at, "detail": str(error["msg"]).removeprefix("Value error, ")[:500]}


async def _http(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses by itself: unknown routes and methods, bodies that are too large or no JSON."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(sorted(_methods(request.app.routes, request.scope)))
    match error.status_code:
        case 400:
            problem = malformed()
        case 404:
            problem = Problem(404, "", f"There is nothing at {request.url.path[:200]!r}.")
        case 405:
            problem = Problem(
                405, "", f"{request.method} is not possible here; there is {headers['Allow']}.", headers=headers
            )
        case 413:
            problem = too_large()
        case _:
            problem = Problem(error.status_code, "", str(error.detail), headers=headers)
    return problem_response(request.scope, problem)


def _methods(routes: list[BaseRoute], scope: Any) -> set[str]:
    """Of every route at this path: the framework names those of the first one only."""
    return {
        method
        for route in routes
        if route.matches(scope)[0] is not Match.NONE
        for method in getattr(route, "methods", None) or ()
    }


async def _refused(request: Request, error: Exception) -> JSONResponse:
    return problem_response(request.scope, Problem(409, "order-refused", f"{error}"))


async def _tidings(request: Request, error: Exception) -> JSONResponse:
    """Errors of the framework, in the words of an order."""
    order = f"order {request.path_params.get('order_id', '')}".strip()
    match error:
        case StreamNotFound():
            problem = Problem(404, "unknown-order", f"There is no {order}.")
        case VersionNotFound():
            problem = Problem(404, "unknown-version", f"The {order} has no such version, or did not exist then.")
        case StreamDeleted():
            problem = Problem(410, "order-deleted", f"The {order} was deleted.")
        case WrongExpectedVersion():
            problem = Problem(412, "order-changed", f"The {order} has changed: get it again, and decide again.")
        case Contention():  # nobody sent a version: asking again is all that there is to do
            log.warning("request.contended", error=f"{error}")
            problem = Problem(503, "contention", f"The {order} is being changed by many at once. Ask again.")
        case EventTooLarge():
            problem = Problem(413, "order-too-large", "The order is too large to be kept: split it.")
        case StoreUnavailable() | DatabaseUnavailable():
            log.warning("request.unavailable", error=f"{type(error).__name__}: {error}")
            problem = Problem(503, "unavailable", "A database does not answer at the moment. Ask again.")
        case _:
            log.error("request.failed", error=f"{type(error).__name__}: {error}", exc_info=error)
            problem = unexpected()
    return problem_response(request.scope, problem)


HANDLERS: Final[dict[int | type[Exception], Any]] = {
    Problem: _said,
    RequestValidationError: _invalid,
    HTTPException: _http,
    OrderRefused: _refused,
    TidingsError: _tidings,
}
