"""Streams beyond the recorded cases: pipelining, parts of appends, deadlines, positions, checkpoints, old clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from tests.integration.server import STREAMS, appends, connected, message, named, raw
from tidings.server import EventStoreServer
from tidings.server.protocol import gossip, shared, streams
from tidings.server.wire import OVERHEAD
from tidings.stores.eventstoredb.grpc import Connection
from tidings.stores.eventstoredb.grpc_call import CallFailed, Status

Batch = streams.BatchAppendReq
ReadReq = streams.ReadReq
NOTHING = shared.Empty()
STRING = ReadReq.Options.UUIDOption(string=NOTHING)


@pytest.fixture
async def connection() -> AsyncIterator[Connection]:
    async with EventStoreServer() as server, connected(server.port) as connection:
        yield connection


def append(
    stream: str, *, at: int | None = None, parts: int = 1, final: bool = True, id_: str = "", first: bool = True
) -> Any:
    request = Batch(correlation_id=shared.UUID(string=id_ or str(uuid4())), is_final=final)
    request.proposed_messages.extend(message(Batch.ProposedMessage) for _ in range(parts))
    if first:
        request.options.stream_identifier.CopyFrom(named(stream))
        if at is None:
            request.options.any.SetInParent()
        else:
            request.options.stream_position = at
    return request


async def answers(connection: Connection, *requests: Any) -> list[Any]:
    got = await raw(connection, f"{STREAMS}/BatchAppend", *(request.SerializeToString() for request in requests))
    return [streams.BatchAppendResp.FromString(answer) for answer in got]


async def read(connection: Connection, **options: Any) -> list[Any]:
    parts: dict[str, Any] = {"count": 2**63, "no_filter": NOTHING, "uuid_option": STRING} | options
    request = ReadReq(options=ReadReq.Options(**parts))
    got = await raw(connection, f"{STREAMS}/Read", request.SerializeToString())
    return [streams.ReadResp.FromString(answer) for answer in got]


def of(stream: str, **where: Any) -> Any:
    return ReadReq.Options.StreamOptions(stream_identifier=named(stream), **(where or {"start": NOTHING}))


async def test_appends_of_one_call_are_applied_and_answered_in_order(connection: Connection) -> None:
    first = append("s")
    requests = [first, *(append("s", at=n) for n in range(999))]
    got = await answers(connection, *requests)
    assert [answer.success.current_revision for answer in got] == list(range(1000))
    assert [answer.correlation_id for answer in got] == [request.correlation_id for request in requests]
    assert all(answer.stream_identifier.stream_name == b"s" for answer in got)


async def test_a_refused_append_does_not_disturb_its_neighbours(connection: Connection) -> None:
    got = await answers(connection, append("s"), append("s", at=7), append("s", at=0))
    assert [answer.WhichOneof("result") for answer in got] == ["success", "error", "success"]
    wrong = shared.WrongExpectedVersion()
    assert got[1].error.details.Unpack(wrong)
    assert (wrong.current_stream_revision, wrong.expected_stream_position) == (0, 7)
    assert got[1].error.code == 6


async def test_the_parts_of_an_append_are_one_append(connection: Connection) -> None:
    id_ = str(uuid4())
    got = await answers(
        connection,
        append("s", parts=2, final=False, id_=id_),
        append("other"),
        append("s", parts=3, id_=id_, first=False),
    )
    assert [answer.success.current_revision for answer in got] == [0, 4]


async def test_parts_that_are_too_much_together_are_refused_at_once(connection: Connection) -> None:
    id_ = str(uuid4())
    large = append("s", final=False, id_=id_)
    large.proposed_messages[0].data = b"x" * 600_000
    with await connection.call(f"{STREAMS}/BatchAppend", timeout=20) as call:
        call.send(large.SerializeToString(), large.SerializeToString())
        (answer,) = await call.receive()
        call.send(append("s", id_=id_, first=False).SerializeToString(), append("s").SerializeToString())
        (last,) = await call.receive()
    error = streams.BatchAppendResp.FromString(answer).error
    assert error.details.Is(shared.MaximumAppendSizeExceeded.DESCRIPTOR)
    assert streams.BatchAppendResp.FromString(last).success.current_revision == 0


async def test_only_data_counts_towards_the_limit_but_an_append_has_an_end(connection: Connection) -> None:
    def sized(data: int, metadata: int) -> Any:
        request = append("s", parts=0)
        request.proposed_messages.append(message(Batch.ProposedMessage))
        request.proposed_messages[0].data = b"x" * data
        request.proposed_messages[0].custom_metadata = b"m" * metadata
        return request

    limit = 1_048_576
    got = await answers(connection, sized(limit, 2_000_000), sized(limit + 1, 0), sized(1, 9_000_000), sized(1, 1))
    assert [answer.WhichOneof("result") for answer in got] == ["success", "error", "error", "success"]
    for refused, most in zip(got[1:3], (limit, 8 * limit), strict=True):
        exceeded = shared.MaximumAppendSizeExceeded()
        assert refused.error.details.Unpack(exceeded)
        assert exceeded.maxAppendSize == most
    assert got[1].error.message == f"Maximum Append Size of {limit} Exceeded."
    assert got[2].error.message.startswith(f"Maximum Append Size of {8 * limit} Exceeded, in which metadata")
    assert f"{OVERHEAD} bytes for each event" in got[2].error.message
    assert got[3].success.current_revision == 1


async def test_a_name_that_is_too_long_is_refused_and_its_neighbours_are_not(connection: Connection) -> None:
    got = await answers(connection, append("s"), append("x" * 1025), append("s"))
    assert [answer.WhichOneof("result") for answer in got] == ["success", "error", "success"]
    assert got[1].error.details.Is(shared.BadRequest.DESCRIPTOR)
    assert "has 1025 bytes, and 1024 is the most" in got[1].error.message


async def test_an_event_without_data_counts_too(connection: Connection) -> None:
    """Each takes memory, so 8 MiB are no four million of them."""
    few, many = (append("s", parts=count) for count in (15_000, 17_000))
    got = await answers(connection, many, few)
    assert [answer.WhichOneof("result") for answer in got] == ["error", "success"]
    assert got[0].error.details.Is(shared.MaximumAppendSizeExceeded.DESCRIPTOR)
    assert got[1].success.current_revision == 14_999


async def test_a_repeated_event_that_nobody_can_read_any_more_has_no_position(connection: Connection) -> None:
    first, second = append("s"), append("s")
    (there, *_) = await answers(connection, first, second)
    (again,) = await answers(connection, first)
    assert again.success == there.success
    document = message(Batch.ProposedMessage, b'{"$maxCount": 1}', "$metadata")
    metadata = append("$$s", parts=0)
    metadata.proposed_messages.append(document)
    await answers(connection, metadata)
    (again,) = await answers(connection, first)
    assert again.success.WhichOneof("position_option") == "no_position"
    options = streams.AppendReq.Options(stream_identifier=named("s"), any=NOTHING)
    proposed = streams.AppendReq.ProposedMessage.FromString(first.proposed_messages[0].SerializeToString())
    requests = streams.AppendReq(options=options), streams.AppendReq(proposed_message=proposed)
    (single,) = await raw(connection, f"{STREAMS}/Append", *(request.SerializeToString() for request in requests))
    answer = streams.AppendResp.FromString(single)
    assert (answer.success.current_revision, answer.success.WhichOneof("position_option")) == (0, "no_position")


async def test_an_append_whose_last_part_never_comes_times_out(connection: Connection) -> None:
    request = append("s", final=False)
    request.options.deadline.nanos = 50_000_000
    with await connection.call(f"{STREAMS}/BatchAppend", timeout=20) as call:
        call.send(request.SerializeToString())
        (answer,) = await call.receive()
    assert streams.BatchAppendResp.FromString(answer).error.details.Is(shared.Timeout.DESCRIPTOR)


async def test_an_append_without_time_writes_nothing(connection: Connection) -> None:
    request = append("s")
    request.options.deadline.seconds = 0
    (answer,) = await answers(connection, request)
    assert answer.error.details.Is(shared.Timeout.DESCRIPTOR)
    (missing,) = await read(connection, stream=of("s"))
    assert missing.WhichOneof("content") == "stream_not_found"


async def test_an_id_may_be_structured_both_ways(connection: Connection) -> None:
    await answers(connection, append("s"))
    (text,) = await read(connection, stream=of("s"))
    (numbers,) = await read(connection, stream=of("s"), uuid_option=ReadReq.Options.UUIDOption(structured=NOTHING))
    assert text.event.event.id.string
    assert numbers.event.event.id.WhichOneof("value") == "structured"


async def test_positions_are_those_of_events_and_not_of_what_lies_between(connection: Connection) -> None:
    (answer,) = await answers(connection, append("s", parts=3))
    last = answer.success.position.commit_position
    everything = [item.event.commit_position for item in await read(connection, all=everywhere())]
    assert everything == sorted(set(everything))
    assert everything[-1] == last
    for between in (last - 1, last - 3):
        with pytest.raises(CallFailed) as caught:
            await read(connection, all=everywhere(between))
        assert (caught.value.status, caught.value.details) == (
            Status.UNKNOWN,
            "Unexpected ReadAllResult: InvalidPosition",
        )
    assert await read(connection, all=everywhere(last + 1000)) == []


def everywhere(position: int | None = None) -> Any:
    if position is None:
        return ReadReq.Options.AllOptions(start=NOTHING)
    at = ReadReq.Options.Position(commit_position=position, prepare_position=position)
    return ReadReq.Options.AllOptions(position=at)


async def test_a_log_begins_with_an_event_of_the_servers_own(connection: Connection) -> None:
    await answers(connection, append("s"))
    first, *_, last = await read(connection, all=everywhere())
    assert first.event.event.metadata["type"] == "$metadata"
    assert last.event.event.stream_identifier.stream_name == b"s"


async def test_clients_that_understand_them_are_told_the_edges_of_a_stream(connection: Connection) -> None:
    await answers(connection, append("s", parts=5))
    control = ReadReq.Options.ControlOption(compatibility=1)
    got = await read(connection, stream=of("s", revision=3), control_option=control)
    assert [item.WhichOneof("content") for item in got] == ["event", "event", "last_stream_position"]
    assert got[-1].last_stream_position == 4


@pytest.mark.parametrize(("window", "multiplier"), [(1, 1), (3, 2), (7, 5), (1000, 1)])
async def test_checkpoints_come_after_every_interval_and_never_go_back(
    connection: Connection, window: int, multiplier: int
) -> None:
    for n in range(40):
        await raw(connection, f"{STREAMS}/Append", *appends("wanted" if n % 5 == 0 else "other", b"x"))
    expression = ReadReq.Options.FilterOptions.Expression(prefix=["wanted"])
    chosen = ReadReq.Options.FilterOptions(
        stream_identifier=expression, max=window, checkpointIntervalMultiplier=multiplier
    )
    options = ReadReq.Options(
        all=everywhere(), subscription=ReadReq.Options.SubscriptionOptions(), filter=chosen, uuid_option=STRING
    )
    got: list[Any] = []
    with await connection.call(f"{STREAMS}/Read", timeout=20) as call:
        call.send(ReadReq(options=options).SerializeToString(), end=True)
        while not any(item.HasField("caught_up") for item in got):
            got += [streams.ReadResp.FromString(answer) for answer in await call.receive()]
    everything = [item.event.commit_position for item in await read(connection, all=everywhere())]
    checkpoints = [item.checkpoint.commit_position for item in got if item.HasField("checkpoint")]
    interval = window * multiplier
    expected = everything[interval - 1 :: interval]
    wanted = [item.event.commit_position for item in got if item.HasField("event")]
    # As in EventStoreDB 24.2, history ends with how far whole windows went, or the last event that was sent.
    whole = len(everything) // window * window
    last = max(wanted[-1], everything[whole - 1] if whole else 0)
    assert checkpoints == expected + ([last] if last not in expected else [])
    told = [
        item.event.commit_position or item.checkpoint.commit_position
        for item in got
        if item.HasField("event") or item.HasField("checkpoint")
    ]
    assert told == sorted(told)
    assert sum(item.HasField("event") for item in got) == 8


@pytest.mark.parametrize("matching", [0, 2])
async def test_a_filtered_subscription_that_read_nothing_says_minus_one_as_eventstoredb_does(
    connection: Connection, matching: int
) -> None:
    for _ in range(matching):
        await raw(connection, f"{STREAMS}/Append", *appends("wanted", b"x"))
    expression = ReadReq.Options.FilterOptions.Expression(prefix=["wanted"])
    chosen = ReadReq.Options.FilterOptions(stream_identifier=expression, max=32, checkpointIntervalMultiplier=1)
    options = ReadReq.Options(
        all=everywhere(), subscription=ReadReq.Options.SubscriptionOptions(), filter=chosen, uuid_option=STRING
    )
    got: list[Any] = []
    with await connection.call(f"{STREAMS}/Read", timeout=20) as call:
        call.send(ReadReq(options=options).SerializeToString(), end=True)
        while not any(item.HasField("caught_up") for item in got):
            got += [streams.ReadResp.FromString(answer) for answer in await call.receive()]
    sent = [item.event.commit_position for item in got if item.HasField("event")]
    assert len(sent) == matching
    [checkpoint] = [item.checkpoint for item in got if item.HasField("checkpoint")]
    expected = sent[-1] if sent else 2**64 - 1
    assert (checkpoint.commit_position, checkpoint.prepare_position) == (expected, expected)


async def test_a_filter_without_prefixes_wants_nothing(connection: Connection) -> None:
    await raw(connection, f"{STREAMS}/Append", *appends("s", b"x"))
    nothing = ReadReq.Options.FilterOptions.Expression()
    chosen = ReadReq.Options.FilterOptions(stream_identifier=nothing, max=32, checkpointIntervalMultiplier=1)
    options = ReadReq.Options(all=everywhere(), count=10, filter=chosen, uuid_option=STRING)
    assert await raw(connection, f"{STREAMS}/Read", ReadReq(options=options).SerializeToString()) == []


async def test_a_deadline_ends_a_subscription(connection: Connection) -> None:
    options = ReadReq.Options(
        all=everywhere(),
        subscription=ReadReq.Options.SubscriptionOptions(),
        no_filter=NOTHING,
        uuid_option=STRING,
    )
    with await connection.call(f"{STREAMS}/Read", (("grpc-timeout", "50m"),)) as call:
        call.send(ReadReq(options=options).SerializeToString(), end=True)
        status = None
        try:
            async with asyncio.timeout(20):
                while await call.receive():
                    pass
        except CallFailed as error:
            status = error.status
    assert status is Status.DEADLINE_EXCEEDED


async def test_the_node_says_who_it_is(connection: Connection) -> None:
    (answer,) = await raw(connection, "/event_store.client.gossip.Gossip/Read", b"")
    (member,) = gossip.ClusterInfo.FromString(answer).members
    assert (member.state, member.is_alive) == (gossip.MemberInfo.Leader, True)
    assert member.http_end_point.address == "localhost"
    (features,) = await raw(connection, "/event_store.client.server_features.ServerFeatures/GetSupportedMethods", b"")
    # SupportedMethod: method_name = 1, service_name = 2, features = 3
    for service, method, offered in (
        ("streams.streams", "batchappend", ["deadline_duration"]),
        ("streams.streams", "read", ["position", "events"]),
        ("persistent_subscriptions.persistentsubscriptions", "create", ["stream", "all"]),
    ):
        parts = [(1, method), (2, f"event_store.client.{service}"), *((3, feature) for feature in offered)]
        assert b"".join(bytes([number << 3 | 2, len(text)]) + text.encode() for number, text in parts) in features
    for named_too in (b"server_features.serverfeatures", b"gossip.gossip", b"monitoring.monitoring"):
        assert b"event_store.client." + named_too in features
    assert features.endswith(b"\x12\x0624.2.0")
    assert await raw(connection, "/grpc.health.v1.Health/Check", b"") == [b"\x08\x01"]
    stats = await first_of(connection, "/event_store.client.monitoring.Monitoring/Stats")
    assert b"es-version" in stats


async def first_of(connection: Connection, path: str) -> bytes:
    with await connection.call(path, timeout=20) as call:
        call.send(b"", end=True)
        return (await call.receive())[0]
