"""What the server answers to HTTP without gRPC: whether it lives, who it is. It touches no socket.

Containers, scripts and test tools ask that with HTTP/1.1, on the port that speaks gRPC over HTTP/2. Nobody needs
credentials for it, a connection has one answer, and nothing of the log is in it.
"""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from typing import Final, NamedTuple

from tidings.server.releases import Release

__all__ = ["HEAD", "Answer", "Site", "Spoken", "spoken"]

HEAD: Final = 8 * 1024
"""Bytes of a request with its headers."""
_METHODS: Final = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ", b"PATCH ")
_REQUEST: Final = re.compile(rb"([A-Z]+) ([!-~]+) HTTP/1\.[01]\r?\n")
_ENDS: Final = re.compile(rb"\r?\n\r?\n")
_LIVE_CODE: Final = re.compile(r"(?:^|&)liveCode=(2\d\d)(?:&|$)")

Spoken = bool | None
"""True: HTTP/1. False: something else, which HTTP/2 takes or refuses. None: too little has come to tell."""


def spoken(data: bytes | bytearray) -> Spoken:
    """Return what a client speaks that began with these bytes."""
    if any(data.startswith(method) for method in _METHODS):
        return True
    return None if any(method.startswith(bytes(data[: len(method)])) for method in _METHODS) else False


class Answer(NamedTuple):
    """A status, and a body that is JSON or empty."""

    status: int
    body: bytes = b""


class Site:
    """The answers of one server."""

    def __init__(self, release: Release, users: bool) -> None:
        name = "dbVersion" if release.appends_records else "esVersion"
        about = {
            name: release.version,
            "state": "leader",
            "features": {"projections": True, "userManagement": users, "atomPub": False},
            "authentication": {"type": "internal" if users else "insecure"},
        }
        self._pages = {
            "/info": Answer(200, json.dumps(about).encode()),
            "/ping": Answer(200, b'{"text": "Ping request successfully handled"}'),
            "/health/live": Answer(204),
        }

    def answer(self, method: str, target: str) -> Answer:
        """Answer a request, whatever its headers and body are."""
        path, _, query = target.partition("?")
        page = self._pages.get(path.rstrip("/"))
        if page is None:
            return Answer(404)
        if method not in ("GET", "HEAD"):
            return Answer(405)
        asked = _LIVE_CODE.search(query)
        if asked is not None and path.startswith("/health"):
            page = Answer(int(asked[1]))
        return page

    def respond(self, data: bytes | bytearray) -> bytes | None:
        """Return the answer to a request of HTTP/1; None until its headers have come."""
        if _ENDS.search(data) is None:
            return _packed(Answer(431), "") if len(data) > HEAD else None
        request = _REQUEST.match(data)
        if request is None:
            return _packed(Answer(400), "")
        method = request[1].decode()
        return _packed(self.answer(method, request[2].decode()), method)


def _packed(answer: Answer, method: str) -> bytes:
    known = answer.status in HTTPStatus._value2member_map_
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase if known else 'OK'}", "Connection: close"]
    if answer.status != 204:
        lines.append(f"Content-Length: {len(answer.body)}")
    if answer.body:
        lines.append("Content-Type: application/json")
    head = "\r\n".join([*lines, "", ""]).encode()
    return head if method == "HEAD" else head + answer.body
