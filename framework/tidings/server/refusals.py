"""What the server answers when it refuses: gRPC status codes, EventStoreDB's words and trailers. It decides nothing.

The texts are EventStoreDB's own, because clients tell errors apart by them.
"""

from __future__ import annotations

from typing import Final

from tidings.errors import EventTooLarge, StoreError, StoreUnavailable, StreamDeleted
from tidings.stores.eventstoredb.grpc_call import Status

__all__ = [
    "Status",
    "Refusal",
    "WholeTooLarge",
    "access_denied",
    "exceeded",
    "exhausted",
    "group_dropped",
    "group_exists",
    "group_failed",
    "group_full",
    "group_missing",
    "invalid_argument",
    "let_go",
    "missing_metadata",
    "of_store_error",
    "shown",
    "stream_deleted",
    "thrown",
    "too_large",
    "unimplemented",
    "unknown",
    "wrong_version",
]


SHOWN: Final = 512
"""Bytes of a caller's text that an answer repeats: a header is compressed in time that grows with its square."""


def shown(text: str) -> str:
    """A name that the caller gave, as it may stand in an answer: a long one is cut."""
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= SHOWN:
        return text
    return f"{data[:SHOWN].decode('utf-8', 'ignore')}... ({len(data)} bytes)"


def let_go(error: BaseException) -> None:
    """Let an error go of the frames that it came through, and of the errors that it came from.

    A frame may hold the error that came through it: both would stay, with the whole request, until Python looks for
    circles.
    """
    errors: list[BaseException | None] = [error]
    seen: set[int] = set()
    while errors:
        each = errors.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        errors += [each.__context__, each.__cause__]
        if isinstance(each, BaseExceptionGroup):
            errors += each.exceptions
        each.__traceback__ = each.__context__ = each.__cause__ = None


class Refusal(Exception):
    """Ends a call with a status other than OK. Trailers are sent as ASCII; what is not becomes escapes. Texts that the
    caller gave come through `shown`."""

    def __init__(self, code: Status, details: str, **trailers: str | int) -> None:
        self.code = code
        self.details = details
        self.trailers = [
            (name.replace("_", "-"), shown(str(value)).encode("ascii", "backslashreplace").decode())
            for name, value in trailers.items()
        ]
        super().__init__(f"{code.name}: {details}")


def thrown() -> Refusal:
    """The answer to a request that makes no sense: EventStoreDB's handler throws, and says no more than that."""
    return Refusal(Status.UNKNOWN, "Exception was thrown by handler.")


def unknown(kind: str, result: str) -> Refusal:
    return Refusal(Status.UNKNOWN, f"Unexpected {kind}: {result}")


def invalid_argument(details: str) -> Refusal:
    return Refusal(Status.INVALID_ARGUMENT, details)


def exhausted(details: str) -> Refusal:
    """The answer to whoever has used up a budget of the server."""
    return Refusal(Status.RESOURCE_EXHAUSTED, details)


def unimplemented(what: str) -> Refusal:
    return Refusal(Status.UNIMPLEMENTED, f"{shown(what)} is not supported by the Tidings server")


def access_denied() -> Refusal:
    return Refusal(Status.PERMISSION_DENIED, "Access Denied", exception="access-denied")


# ---- streams -----------------------------------------------------------------------


def stream_deleted(stream: str) -> Refusal:
    return Refusal(
        Status.FAILED_PRECONDITION,
        f"Event stream '{shown(stream)}' is deleted.",
        exception="stream-deleted",
        stream_name=stream,
    )


def wrong_version(operation: str, stream: str, expected: int, actual: int) -> Refusal:
    """`expected` as EventStoreDB numbers it: -1 no stream, -2 any, -4 an existing stream."""
    return Refusal(
        Status.FAILED_PRECONDITION,
        f"{operation} failed due to WrongExpectedVersion. "
        f"Stream: {shown(stream)}, Expected version: {expected}, Actual version: {actual}",
        exception="wrong-expected-version",
        stream_name=stream,
        expected_version=expected,
        actual_version=actual,
    )


class WholeTooLarge(EventTooLarge):
    """An append whose data is within the limit of data, and which is over the server's own limit of all that it has."""


def exceeded(limit: int, *, whole: bool) -> str:
    """What is said of an append that is over the limit of its data; or, as a whole, over that of all that it has."""
    if whole:
        return f"Maximum Append Size of {limit} Exceeded, in which metadata, types and 512 bytes for each event count."
    return f"Maximum Append Size of {limit} Exceeded."


def too_large(limit: int, *, whole: bool = False) -> Refusal:
    return Refusal(
        Status.INVALID_ARGUMENT,
        exceeded(limit, whole=whole),
        exception="maximum-append-size-exceeded",
        maximum_append_size=limit,
    )


def missing_metadata(name: str) -> Refusal:
    return Refusal(
        Status.INVALID_ARGUMENT,
        f"Required Metadata Property '{name}' is missing",
        exception="missing-required-metadata-property",
        required_metadata_properties="type,content-type",
    )


def of_store_error(error: StoreError) -> Refusal:
    """What a failure of the store that the caller has no rule of its own for becomes on the wire."""
    if isinstance(error, StreamDeleted):
        return stream_deleted(error.stream)
    if isinstance(error, StoreUnavailable):
        return Refusal(Status.UNAVAILABLE, str(error))
    return thrown()


# ---- persistent subscriptions ------------------------------------------------------


def _group(code: Status, details: str, exception: str, stream: str, group: str, **more: str) -> Refusal:
    return Refusal(
        code, details, exception=f"persistent-subscription-{exception}", stream_name=stream, group_name=group, **more
    )


def group_missing(stream: str, group: str) -> Refusal:
    details = f"Subscription group {shown(group)} on stream {shown(stream)} does not exist."
    return _group(Status.NOT_FOUND, details, "does-not-exist", stream, group)


def group_exists(stream: str, group: str) -> Refusal:
    details = f"Subscription group {shown(group)} on stream {shown(stream)} exists."
    return _group(Status.ALREADY_EXISTS, details, "exists", stream, group)


def group_failed(stream: str, group: str, reason: str) -> Refusal:
    details = f"Subscription group {shown(group)} on stream {shown(stream)} failed: '{shown(reason)}'"
    return _group(Status.INTERNAL, details, "failed", stream, group, reason=reason)


def group_dropped(stream: str, group: str) -> Refusal:
    details = f"Subscription group {shown(group)} on stream {shown(stream)} was dropped."
    return _group(Status.CANCELLED, details, "dropped", stream, group)


def group_full(stream: str, group: str) -> Refusal:
    return Refusal(
        Status.FAILED_PRECONDITION,
        f"Maximum subscriptions reached for subscription group {shown(group)} on stream {shown(stream)}.",
        exception="maximum-subscribers-reached",
        stream_name=stream,
        group_name=group,
    )
