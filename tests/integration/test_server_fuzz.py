"""Random requests, good and broken, many at a time: the server answers each of them, and its log stays a log."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.server import STREAMS, connected, named, raw
from tidings.server import EventStoreServer
from tidings.server.protocol import persistent, shared, streams
from tidings.stores import RecordedEvent
from tidings.stores.eventstoredb.grpc import Connection
from tidings.stores.eventstoredb.grpc_call import CallFailed, Status
from tidings.stores.eventstoredb.store import open_eventstoredb
from tidings.stores.rules import MAX_VERSION, STREAM_DELETED

GROUPS = "/event_store.client.persistent_subscriptions.PersistentSubscriptions"
NOTHING = shared.Empty()

names = st.sampled_from([b"a", b"b", b"$$a", b"$c", "ж".encode(), b"", b"$$", b"\xff", b"a" * 300])
ids = st.one_of(
    st.integers(0, 6).map(lambda n: shared.UUID(string=str(UUID(int=n)))),
    st.builds(
        lambda high, low: shared.UUID(
            structured=shared.UUID.Structured(most_significant_bits=high, least_significant_bits=low)
        ),
        st.integers(-(2**63), 2**63 - 1),
        st.integers(-1, 3),
    ),
    st.sampled_from(["", "nonsense", "{}"]).map(lambda text: shared.UUID(string=text)),
)
metadata = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["T", "", "$metadata", "$>", "é"]),
        "content-type": st.sampled_from(["application/json", "application/octet-stream", "x"]),
    },
)
payloads = st.one_of(
    st.sampled_from([b"{}", b'{"$tb": 9223372036854775807}', b'{"$maxCount": 1}', b"0@a", b"7@nowhere", b"@"]),
    st.binary(max_size=40),
)


def expected(options: Any, choice: int, field: str) -> Any:
    """Choose an expected version, or none."""
    if choice >= 0:
        setattr(options, field, choice)
    elif choice > -4:
        getattr(options, ("any", "no_stream", "stream_exists")[choice]).SetInParent()
    return options


choices = st.integers(-4, 4)


def proposals(kind: Any) -> Any:
    return st.builds(
        lambda id_, notes, data: kind(id=id_, metadata=notes, data=data, custom_metadata=data), ids, metadata, payloads
    )


@st.composite
def append(draw: Any) -> tuple[str, list[bytes]]:
    options = streams.AppendReq.Options(stream_identifier=named(draw(names)))
    requests = [streams.AppendReq(options=expected(options, draw(choices), "revision"))]
    proposed = draw(st.lists(proposals(streams.AppendReq.ProposedMessage), max_size=3))
    requests += [streams.AppendReq(proposed_message=one) for one in proposed]
    if draw(st.integers(0, 9)) == 0:
        requests.reverse()
    return f"{STREAMS}/Append", [request.SerializeToString() for request in requests]


@st.composite
def batch_append(draw: Any) -> tuple[str, list[bytes]]:
    requests = []
    for _ in range(draw(st.integers(1, 4))):
        request = streams.BatchAppendReq(correlation_id=draw(ids), is_final=draw(st.booleans()))
        if draw(st.integers(0, 5)):
            request.options.stream_identifier.CopyFrom(named(draw(names)))
            expected(request.options, draw(choices), "stream_position")
            if draw(st.booleans()):
                request.options.deadline.seconds = draw(st.integers(-1, 5))
        request.proposed_messages.extend(draw(st.lists(proposals(streams.BatchAppendReq.ProposedMessage), max_size=3)))
        requests.append(request.SerializeToString())
    return f"{STREAMS}/BatchAppend", requests


@st.composite
def closing(draw: Any) -> tuple[str, list[bytes]]:
    kind, method = draw(st.sampled_from([(streams.DeleteReq, "Delete"), (streams.TombstoneReq, "Tombstone")]))
    options = expected(kind.Options(stream_identifier=named(draw(names))), draw(choices), "revision")
    return f"{STREAMS}/{method}", [kind(options=options).SerializeToString()]


@st.composite
def reading(draw: Any) -> tuple[str, list[bytes]]:
    options = streams.ReadReq.Options(
        read_direction=draw(st.integers(0, 1)),
        resolve_links=draw(st.booleans()),
        count=draw(st.sampled_from([0, 1, 9])),
    )
    number = draw(st.sampled_from([None, 0, 1, 9, 17, 2**63 - 1, 2**64 - 1]))
    if draw(st.booleans()):
        options.stream.stream_identifier.CopyFrom(named(draw(names)))
        if number is None:
            options.stream.end.SetInParent()
        else:
            options.stream.revision = number
    elif number is None:
        options.all.end.SetInParent()
    else:
        options.all.position.commit_position = number
    if draw(st.booleans()):
        options.no_filter.SetInParent()
    else:
        options.filter.event_type.regex = draw(st.sampled_from(["", "T", "(", "^(?!T$)", "\\"]))
        if draw(st.integers(0, 4)):
            options.filter.max = draw(st.integers(0, 2**32 - 1))
    if draw(st.integers(0, 4)):
        options.uuid_option.string.SetInParent()
    return f"{STREAMS}/Read", [streams.ReadReq(options=options).SerializeToString()]


@st.composite
def grouping(draw: Any) -> tuple[str, list[bytes]]:
    options = persistent.CreateReq.Options(group_name=draw(st.sampled_from(["", "g"])))
    if draw(st.booleans()):
        options.all.start.SetInParent()
    else:
        options.stream.stream_identifier.CopyFrom(named(draw(names)))
        options.stream.revision = draw(st.sampled_from([0, 3, 2**64 - 1]))
    settings_ = options.settings
    settings_.read_batch_size = draw(st.integers(-1, 3))
    settings_.history_buffer_size = draw(st.integers(-1, 5))
    settings_.message_timeout_ms = draw(st.integers(-1, 1))
    settings_.max_checkpoint_count = draw(st.integers(-1, 1))
    settings_.consumer_strategy = draw(st.sampled_from(["", "Pinned", "Invented"]))
    return f"{GROUPS}/Create", [persistent.CreateReq(options=options).SerializeToString()]


garbage = st.tuples(
    st.sampled_from([f"{STREAMS}/Append", f"{STREAMS}/Read", f"{STREAMS}/BatchAppend", f"{GROUPS}/Read", "/x"]),
    st.lists(st.binary(max_size=30), max_size=3),
)
rounds = st.lists(
    st.lists(st.one_of(append(), batch_append(), closing(), reading(), grouping(), garbage), min_size=1, max_size=5),
    max_size=6,
)


@given(rounds)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_log_stays_a_log_whatever_is_asked(calls: list[list[tuple[str, list[bytes]]]]) -> None:
    asyncio.run(survives(calls))


async def survives(calls: list[list[tuple[str, list[bytes]]]]) -> None:
    async with EventStoreServer() as server:
        acknowledged: list[int] = []
        async with connected(server.port) as connection:
            for together in calls:
                done = await asyncio.gather(*(asked(connection, path, requests) for path, requests in together))
                acknowledged += [position for positions in done for position in positions]
        store = await open_eventstoredb(server.uri)
        events = [event async for event in store.read_all()]
        await store.append("at-the-end", [])
        await store.close()
    is_a_log(events)
    assert set(acknowledged) <= {event.position for event in events}


async def asked(connection: Connection, path: str, requests: list[bytes]) -> list[int]:
    """Return acknowledged positions. Asserts that every call ends, and that the server itself never fails."""
    status, answers = Status.OK, []
    try:
        answers = await raw(connection, path, *requests)
    except CallFailed as error:
        status = error.status
    assert status not in (Status.DEADLINE_EXCEEDED, Status.UNAVAILABLE)
    if path.endswith("/Append") and len(requests) > 1:  # without events it is answered with any position
        answer = streams.AppendResp.FromString(answers[0]) if answers else streams.AppendResp()
        return [answer.success.position.commit_position] if answer.success.HasField("position") else []
    return []


def is_a_log(events: list[RecordedEvent]) -> None:
    """Assert that positions rise, that the versions of each stream count up from 0, and that a tombstone comes last."""
    positions = [event.position for event in events]
    assert positions == sorted(set(positions))
    versions: dict[str, int] = {}
    for event in events:
        last = versions.get(event.stream, -1)
        assert last < MAX_VERSION
        if event.type == STREAM_DELETED and event.version == MAX_VERSION:
            versions[event.stream] = MAX_VERSION
            continue
        assert event.version == last + 1
        versions[event.stream] = event.version
    for stream in versions:
        if not stream.startswith("$$") and versions[stream] == MAX_VERSION:
            assert f"$${stream}" not in versions or versions[f"$${stream}"] < MAX_VERSION
