"""Requests and answers of EventStoreDB as messages: filters say there what they say here, errors become the port's."""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tidings.stores.eventstoredb.wire as wire
from tidings.errors import (
    EventTooLarge,
    InvalidStreamName,
    StoreError,
    StoreUnavailable,
    StreamDeleted,
    StreamForbidden,
    WrongExpectedVersion,
)
from tidings.protocol.position import CARRIED
from tidings.stores import ANY, NO_STREAM, STREAM_EXISTS, Appended, EventData, Expected, Filter, RecordedEvent
from tidings.stores.eventstoredb.protos import shared_pb2, streams_pb2

NAMES = st.text(st.sampled_from("ab.$-_*[ (é\n"), min_size=1, max_size=5)
PREFIXES = st.lists(st.text(st.sampled_from("ab.$-*[ (é"), min_size=1, max_size=2), max_size=3).map(tuple)


def passes(filter: Filter, event: RecordedEvent) -> bool:
    """Evaluate a filter as the server does: one expression on the name or the type, either prefixes or a pattern that
    is searched for."""
    options = streams_pb2.ReadReq.FromString(wire.read_all_request(-1, filter)).options
    kind = options.filter.WhichOneof("filter")
    if kind is None:
        return True
    text = event.stream if kind == "stream_identifier" else event.type
    expression = getattr(options.filter, kind)
    if expression.regex:
        return re.search(expression.regex, text) is not None
    return text.startswith(tuple(expression.prefix))


@given(NAMES, NAMES, PREFIXES, PREFIXES, st.lists(NAMES, max_size=2).map(tuple))
def test_the_server_leaves_out_nothing_that_matches(
    stream: str, type: str, included: tuple[str, ...], excluded: tuple[str, ...], types: tuple[str, ...]
) -> None:
    wanted = Filter(types=types, stream_prefixes=included, exclude_stream_prefixes=excluded)
    event = RecordedEvent(8, stream, 0, type, b"", b"", True, bytes(16), 0)
    if wanted.matches(event):
        assert passes(wanted, event)
    elif wire.served(wanted):  # nobody looks again
        assert not passes(wanted, event)


def test_the_relays_filter_is_the_servers_work() -> None:
    assert wire.served(CARRIED)
    event = RecordedEvent(8, "orders", 0, "T", b"", b"", True, bytes(16), 0)
    assert passes(CARRIED, event)
    for stream in ("$$orders", "$ce-x", "tidings_relay-main", "tidings.x"):
        assert not passes(CARRIED, event._replace(stream=stream))


@pytest.mark.parametrize(
    ("expected", "field"),
    [(ANY, "any"), (NO_STREAM, "no_stream"), (STREAM_EXISTS, "stream_exists"), (7, "stream_position")],
)
def test_an_append_says_what_it_expects(expected: Expected, field: str) -> None:
    event = EventData("T", b"d", b"m", "text/plain", UUID(int=5))
    request = streams_pb2.BatchAppendReq.FromString(wire.append_request(9, "s", [event], expected, 3.0))
    assert request.options.WhichOneof("expected_stream_position") == field
    assert (request.options.deadline.seconds, request.is_final) == (3, True)
    [message] = request.proposed_messages
    assert UUID(message.id.string) == event.id
    assert dict(message.metadata) == {"type": "T", "content-type": "text/plain"}
    answer = streams_pb2.BatchAppendResp(correlation_id=request.correlation_id)
    assert wire.number_of(answer) == 9
    answer.correlation_id.string = str(UUID(int=9))
    assert wire.number_of(answer) == 9


def refusal(details: Any, expected: Expected = ANY) -> Appended | StoreError | wire.Undecided:
    answer = streams_pb2.BatchAppendResp()
    answer.error.details.Pack(details)
    return wire.outcome_of(answer, "s", expected, 5)


def test_a_refused_append_becomes_an_error_of_the_port() -> None:
    assert isinstance(refusal(shared_pb2.StreamDeleted()), StreamDeleted)
    large = refusal(shared_pb2.MaximumAppendSizeExceeded(maxAppendSize=4))
    assert isinstance(large, EventTooLarge)
    assert (large.size, large.limit) == (5, 4)
    denied = refusal(shared_pb2.AccessDenied())
    assert isinstance(denied, StreamForbidden)
    assert denied.stream == "s"
    assert "$acl" in str(denied)
    assert isinstance(wire.refused_deletion(AccessDeniedError(), "s", ANY), StreamForbidden)
    assert "no such thing" in str(refusal(shared_pb2.BadRequest(message="no such thing")))


class AccessDeniedError(Exception):
    """Return an error as EventStoreDB's client raises it."""


def test_what_the_server_cannot_say_is_undecided() -> None:
    for unknown in (shared_pb2.Timeout(), shared_pb2.Unknown(), shared_pb2.Empty()):
        assert isinstance(refusal(unknown), wire.Undecided)


BIGGEST = 2**63 - 1


@pytest.mark.parametrize(("sent", "meant"), [(0, 0), (7, 7), (BIGGEST, BIGGEST), (2**64 - 1, -1)])
def test_a_number_travels_unsigned_and_the_largest_is_minus_one(sent: int, meant: int) -> None:
    assert wire.signed(sent) == meant


@given(st.integers(2**63, 2**64 - 2))
def test_a_number_that_no_log_has_goes_no_further(number: int) -> None:
    with pytest.raises(StoreUnavailable, match=str(number)):
        wire.signed(number)
    kind = streams_pb2.ReadResp.ReadEvent.RecordedEvent
    for record in (kind(commit_position=number), kind(stream_revision=number)):
        with pytest.raises(StoreUnavailable, match=str(number)):
            wire.recorded(record)
    answer = wire.Answer()
    answer.success.current_revision = number
    assert isinstance(wire.outcome_of(answer, "s", ANY, 1), StoreUnavailable)
    answer.success.current_revision = 1
    answer.success.position.commit_position = number
    assert isinstance(wire.outcome_of(answer, "s", ANY, 1), StoreUnavailable)


def test_a_refusal_that_counts_from_minus_one_unsigned_says_minus_one() -> None:
    answer = wire.Answer()
    answer.error.details.Pack(shared_pb2.WrongExpectedVersion(current_stream_revision=2**64 - 1))
    refused = wire.outcome_of(answer, "s", 3, 1)
    assert isinstance(refused, WrongExpectedVersion)
    assert refused.actual == -1


def test_an_empty_append_that_succeeds_on_a_tombstoned_stream_is_refused() -> None:
    """Return an error as KurrentDB 26.1 answers it."""
    answer = wire.Answer()
    answer.success.current_revision = BIGGEST
    assert isinstance(wire.outcome_of(answer, "s", ANY, 0), StreamDeleted)


def test_a_time_out_is_told_from_what_concerns_the_whole_call() -> None:
    answer = wire.Answer()
    answer.error.details.Pack(shared_pb2.Timeout())
    assert isinstance(wire.outcome_of(answer, "s", ANY, 1), wire.TimedOut)
    answer.error.details.Pack(shared_pb2.Unknown())
    outcome = wire.outcome_of(answer, "s", ANY, 1)
    assert isinstance(outcome, wire.Undecided)
    assert not isinstance(outcome, wire.TimedOut)


def test_what_would_end_the_call_of_all_appends_is_not_sent() -> None:
    with pytest.raises(EventTooLarge):
        wire.check_events("s", [EventData("T", b"x" * (wire.EVENT_LIMIT + 1))])
    for stream, event in (("\ud800", EventData("T", b"")), ("s", EventData("\ud800", b""))):
        with pytest.raises(InvalidStreamName):
            wire.check_events(stream, [event])
    with pytest.raises(TypeError):
        wire.check_events("s", [EventData("T", "text")])  # type: ignore[arg-type]


def test_positions_and_versions_beyond_what_there_can_be_are_sent_as_the_last() -> None:
    for request in (
        wire.read_all_request(2**70, Filter()),
        wire.read_stream_request("s", 2**70),
        wire.append_request(1, "s", [], 2**70, 1.0),
    ):
        assert request


def test_what_is_no_place_where_a_subscription_caught_up_is_none() -> None:
    kind = streams_pb2.ReadResp.CaughtUp
    assert wire.caught_up_at(kind()) is None
    assert wire.caught_up_at(kind.FromString(b"\x1a\x02\x08\x07")) == 7, "the position's commit position"
    assert wire.caught_up_at(kind.FromString(b"\x10\x07")) is None, "a stream's revision"
    if "position" not in kind.DESCRIPTOR.fields_by_name:  # else protobuf itself refuses it
        assert wire.caught_up_at(kind.FromString(b"\x1a\x02\xff\xff")) is None
