"""Answers to requests that fail: problem details (RFC 9457). They never show internals.

The last word of a problem's `type` is for programs; `title` and `detail` are for people. `correlation_id` leads to the
request in the logs.
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
"""Mistakes that are listed for one request. A body can have a hundred thousand."""
RETRY_SECONDS: Final = 1
BODY_LIMIT: Final = 1024 * 1024
"""Bytes in a request's body. No event may be larger, either."""


class Problem(Exception):
    """An error that becomes an answer. `kind` is the last word of its type."""

    def __init__(
        self, status: int, kind: str, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.headers = dict(headers or {})
        self.members = members


class ProblemResponse(JSONResponse):
    """A JSON answer in ASCII, because quotes from a request may have characters that UTF-8 cannot express."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        """Encode a document as JSON in ASCII."""
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def problem_response(scope: Mapping[str, Any], problem: Problem) -> JSONResponse:
    """Return the answer to the request of this ASGI scope."""
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
    """Return the problem of a body that is not JSON, or is nested too deeply, or has numbers with too many digits."""
    return Problem(400, "malformed-json", f"The body is not valid JSON.{where}")


def too_large() -> Problem:
    """Return the problem of a body over `BODY_LIMIT`."""
    return Problem(413, "body-too-large", f"The body is over {BODY_LIMIT} bytes.")


def unexpected() -> Problem:
    """Return the problem of a bug in this program. The log has the details under the correlation id."""
    return Problem(500, "", "The service has an error; the request is fine. Report it with its correlation id.")


# ---- exceptions and their answers --------------------------------------------------------


async def _said(request: Request, problem: Exception) -> JSONResponse:
    assert isinstance(problem, Problem)
    return problem_response(request.scope, problem)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    mistakes = error.errors()
    if mistakes[0]["type"] == "json_invalid":
        return problem_response(request.scope, malformed(f" The error is at character {mistakes[0]['loc'][-1]}."))
    shown = [_mistake(each) for each in mistakes[:SHOWN]]
    detail = f"{shown[0]['at']}: {shown[0]['detail']}"
    if len(mistakes) > 1:
        detail += f" (and {len(mistakes) - 1} more)"
    return problem_response(request.scope, Problem(422, "invalid-request", detail, errors=shown))


def _mistake(error: Mapping[str, Any]) -> dict[str, str]:
    """Describe one mistake without its value, which may be large or secret. `at` is a parameter or a path in the
    body."""
    place, *path = error["loc"]
    if place == "body":
        steps = (str(step).replace("~", "~0").replace("/", "~1")[:100] for step in path)
        at = "#" + "".join(f"/{step}" for step in steps)
    else:
        at = ".".join(map(str, path))
    return {"in": str(place), "at": at, "detail": str(error["msg"]).removeprefix("Value error, ")[:500]}


async def _http(request: Request, error: Exception) -> JSONResponse:
    """Answer what FastAPI refuses by itself: unknown routes and methods, bodies that are too large or not JSON."""
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
                405, "", f"{request.method} is not possible here; use {headers['Allow']}.", headers=headers
            )
        case 413:
            problem = too_large()
        case _:
            problem = Problem(error.status_code, "", str(error.detail), headers=headers)
    return problem_response(request.scope, problem)


def _methods(routes: list[BaseRoute], scope: Any) -> set[str]:
    """Return the methods of every route at this path. FastAPI names only those of the first one."""
    return {
        method
        for route in routes
        if route.matches(scope)[0] is not Match.NONE
        for method in getattr(route, "methods", None) or ()
    }


async def _refused(request: Request, error: Exception) -> JSONResponse:
    return problem_response(request.scope, Problem(409, "order-refused", f"{error}"))


async def _tidings(request: Request, error: Exception) -> JSONResponse:
    """Answer Tidings' errors, in words about orders."""
    order = f"order {request.path_params.get('order_id', '')}".strip()
    match error:
        case StreamNotFound():
            problem = Problem(404, "unknown-order", f"There is no {order}.")
        case VersionNotFound():
            problem = Problem(404, "unknown-version", f"The {order} has no such version, or did not exist then.")
        case StreamDeleted():
            problem = Problem(410, "order-deleted", f"The {order} was deleted.")
        case WrongExpectedVersion():
            problem = Problem(412, "order-changed", f"The {order} has changed: read it again, and decide again.")
        case Contention():  # the client sent no version, so it can only ask again
            log.warning("request.contended", error=f"{error}")
            problem = Problem(503, "contention", f"The {order} is changed by many requests at once. Repeat this one.")
        case EventTooLarge():
            problem = Problem(413, "order-too-large", "The order is too large to be stored: split it.")
        case StoreUnavailable() | DatabaseUnavailable():
            log.warning("request.unavailable", error=f"{type(error).__name__}: {error}")
            problem = Problem(503, "unavailable", "A database does not answer at the moment. Repeat the request.")
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
