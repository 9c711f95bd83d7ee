"""Additions to the OpenAPI document that the code does not imply: problems, headers, and no null where HTTP has
none."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI

from services.order.problems import MEDIA_TYPE

__all__ = ["ETAG", "POSITION", "Api", "headers", "problems"]

ETAG: Final = "The order's version, as an entity tag."
POSITION: Final = "The position of the event in the log: pass it to GET /orders. Absent if nothing had to be done."


class Api(FastAPI):
    """FastAPI, without null for optional parameters: a header or a query cannot be null."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        document = super().openapi()
        for path in document["paths"].values():
            for operation in path.values():
                for parameter in operation.get("parameters", ()):
                    choices = parameter["schema"].pop("anyOf", [])
                    for choice in choices:
                        if choice != {"type": "null"}:
                            parameter["schema"].update(choice)
        return document


def headers(**described: str) -> dict[str, Any]:
    """Describe the headers of a successful answer."""
    described["X-Correlation-ID"] = "The correlation id of the request, or a new one."
    return {
        name.replace("_", "-"): {"schema": {"type": "string"}, "description": what} for name, what in described.items()
    }


_TEXT: Final = {"type": "string"}
_SCHEMA: Final = {
    "title": "Problem",
    "type": "object",
    "required": ["type", "title", "status", "detail", "instance", "correlation_id"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": _TEXT,
        "status": {"type": "integer"},
        "detail": _TEXT,
        "instance": {"type": "string", "format": "uri-reference"},
        "correlation_id": _TEXT,
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["in", "at", "detail"],
                "properties": {"in": _TEXT, "at": _TEXT, "detail": _TEXT},
            },
        },
    },
}
_MEANINGS: Final = {
    400: "The body is not JSON.",
    401: "The caller is not known.",
    403: "The caller may not act in another's name.",
    404: "There is no such order, or no such version of it.",
    409: "The order's state does not allow it, or the log has not reached the given position.",
    410: "The order was deleted.",
    412: "The order has changed since the version in If-Match.",
    413: "The body, or the order, is too large.",
    415: "The body's media type is not application/json.",
    422: "The request is not valid; `errors` says where.",
    500: "An error in this service.",
    503: "A database does not answer, or the list lags behind. Repeat the request.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of an operation with these status codes, and those that every operation has."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in sorted({*statuses, 401, 403, 413, 422, 500, 503}):
        headers = {"X-Correlation-ID": {"schema": _TEXT, "description": "The request's correlation id, or a new one."}}
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers["Retry-After"] = {"schema": {"type": "integer"}, "description": "Seconds to wait."}
        found[status] = {
            "description": _MEANINGS[status],
            "content": {MEDIA_TYPE: {"schema": _SCHEMA}},
            "headers": headers,
        }
    return found
