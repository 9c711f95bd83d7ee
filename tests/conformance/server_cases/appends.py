"""Appends: expected versions, idempotency, sizes, names."""

from __future__ import annotations

from typing import Any

from esdbclient import NewEvent

from tests.conformance.server_cases.probe import ANY, EXISTS, NO, Probe, case


@case
def append_to_new_stream(p: Probe) -> Any:
    return [p.append(p.stream(), p.event(), NO), p.version(p.stream()), p.read(p.stream())]


@case
def append_list_of_one(p: Probe) -> Any:
    return [p.append(p.stream(), [p.event()], NO), p.read(p.stream())]


@case
def append_batch_is_contiguous(p: Probe) -> Any:
    return [p.append(p.stream(), [p.event(i) for i in range(5)], NO), p.read(p.stream())]


@case
def append_no_stream_twice(p: Probe) -> Any:
    return [
        p.append(p.stream(), p.event(1), NO),
        p.append(p.stream(), p.event(2), NO),
        p.append(p.stream(), [p.event(3)], NO),
    ]


@case
def append_wrong_version_too_high(p: Probe) -> Any:
    p.append(p.stream(), p.event(), NO)
    return [p.append(p.stream(), p.event(), 7), p.append(p.stream(), [p.event()], 7)]


@case
def append_wrong_version_too_low(p: Probe) -> Any:
    p.append(p.stream(), [p.event(i) for i in range(3)], NO)
    return [p.append(p.stream(), p.event(9), 0), p.append(p.stream(), [p.event(9)], 0)]


@case
def append_exists_on_missing(p: Probe) -> Any:
    return [p.append(p.stream(), p.event(), EXISTS), p.append(p.stream(), [p.event()], EXISTS)]


@case
def append_version_on_missing(p: Probe) -> Any:
    return [p.append(p.stream(), p.event(), 0), p.append(p.stream(), [p.event()], 0)]


@case
def append_any_then_exists(p: Probe) -> Any:
    return [p.append(p.stream(), p.event(1), ANY), p.append(p.stream(), p.event(2), EXISTS), p.read(p.stream())]


@case
def append_empty_list(p: Probe) -> Any:
    return [p.append(p.stream(), [], NO), p.append(p.stream(), [], ANY), p.version(p.stream())]


@case
def append_empty_list_to_existing(p: Probe) -> Any:
    p.append(p.stream(), p.event(), NO)
    return [
        p.append(p.stream(), [], 0),
        p.append(p.stream(), [], ANY),
        p.append(p.stream(), [], NO),
        p.version(p.stream()),
    ]


@case
def append_same_id_twice_no_stream(p: Probe) -> Any:
    e = p.event(1)
    a = p.client.append_to_stream(p.stream(), current_version=NO, events=e)
    b = p.client.append_to_stream(p.stream(), current_version=NO, events=e)
    return [a == b, p.read(p.stream())]


@case
def append_same_id_twice_any(p: Probe) -> Any:
    e = p.event(1)
    a = p.client.append_to_stream(p.stream(), current_version=ANY, events=e)
    b = p.client.append_to_stream(p.stream(), current_version=ANY, events=e)
    return [a == b, p.read(p.stream())]


@case
def append_same_id_at_head_version(p: Probe) -> Any:
    e = p.event(1)
    return [p.append(p.stream(), e, NO), p.append(p.stream(), e, 0), p.read(p.stream())]


@case
def append_same_batch_twice(p: Probe) -> Any:
    b = [p.event(i) for i in range(3)]
    return [p.append(p.stream(), b, NO), p.append(p.stream(), b, NO), p.append(p.stream(), b, ANY), p.read(p.stream())]


@case
def append_batch_longer_than_recorded(p: Probe) -> Any:
    b = [p.event(i) for i in range(4)]
    return [
        p.append(p.stream(), b[:2], NO),
        p.append(p.stream(), b, NO),
        p.append(p.stream(), b, ANY),
        p.version(p.stream()),
    ]


@case
def append_batch_prefix_of_recorded(p: Probe) -> Any:
    b = [p.event(i) for i in range(4)]
    return [
        p.append(p.stream(), b, NO),
        p.append(p.stream(), b[:2], NO),
        p.append(p.stream(), b[:2], ANY),
        p.version(p.stream()),
    ]


@case
def append_batch_new_first_then_known(p: Probe) -> Any:
    known, new = p.event(1), p.event(2)
    return [p.append(p.stream(), known, NO), p.append(p.stream(), [new, known], ANY), p.read(p.stream())]


@case
def append_middle_of_stream_again(p: Probe) -> Any:
    b = [p.event(i) for i in range(4)]
    p.append(p.stream(), b, NO)
    return [
        p.append(p.stream(), b[1:3], 0),
        p.append(p.stream(), [b[2], b[1]], 0),
        p.append(p.stream(), b[2:], 1),
        p.version(p.stream()),
    ]


@case
def append_same_id_other_stream(p: Probe) -> Any:
    e = p.event(1)
    return [p.append(p.stream("a"), e, NO), p.append(p.stream("b"), e, NO), p.read(p.stream("b"))]


@case
def append_octet_stream(p: Probe) -> Any:
    e = NewEvent(type="Bin", data=b"\x00\xff", metadata=b"\x01", content_type="application/octet-stream")
    p.append(p.stream(), e, NO)
    r = p.client.get_stream(p.stream())[0]
    return [r.content_type, list(r.data), list(r.metadata)]


@case
def append_json_that_is_not_json(p: Probe) -> Any:
    return [p.append(p.stream(), p.event(data=b"{nope"), NO), p.read(p.stream())]


@case
def append_empty_data_and_metadata(p: Probe) -> Any:
    p.append(p.stream(), p.event(data=b"", metadata=b""), NO)
    r = p.client.get_stream(p.stream())[0]
    return [r.data == b"", r.metadata == b"", r.content_type]


@case
def append_empty_type(p: Probe) -> Any:
    return [p.append(p.stream(), p.event(type=""), NO), p.append(p.stream(), [p.event(type="")], NO)]


@case
def append_unicode_everywhere(p: Probe) -> Any:
    stream = p.stream("наказ 订单 ✓ a/b?c#d")
    return [p.append(stream, p.event(type="Замовлено✓", data='{"ключ": "値"}'.encode()), NO), p.read(stream)]


@case
def append_under_size_limit(p: Probe) -> Any:
    return p.append(p.stream(), p.event(data=b"x" * 1_000_000), NO)


@case
def append_over_size_limit(p: Probe) -> Any:
    big = p.event(data=b"x" * 1_100_000)
    return [
        p.append(p.stream("a"), big, NO),
        p.append(p.stream("b"), [big], NO),
        p.append(p.stream("c"), [p.event(data=b"x" * 600_000), p.event(data=b"x" * 600_000)], NO),
    ]


@case
def size_limit_counts_data_only(p: Probe) -> Any:
    limit, octets = 1_048_576, "application/octet-stream"
    fits = p.event(data=b"x" * limit, content_type=octets, metadata=b"m" * 5_000)
    over = p.event(data=b"x" * (limit + 1), content_type=octets)
    return [p.append(p.stream(), fits, NO), p.append(p.stream("over"), over, NO)]


@case
def same_id_in_two_streams_is_remembered_for_the_first(p: Probe) -> Any:
    e, a, b = p.event(1), p.stream("a"), p.stream("b")
    answers = [p.append(stream, e, ANY) for stream in (a, b, a, b)]
    return [*answers, len(p.read(a)["ok"]), len(p.read(b)["ok"])]


@case
def append_positions_increase(p: Probe) -> Any:
    a = [p.client.append_to_stream(p.stream(str(i % 3)), current_version=ANY, events=p.event(i)) for i in range(9)]
    return a == sorted(set(a))


@case
def append_returns_position_of_last_event(p: Probe) -> Any:
    c = p.client.append_to_stream(p.stream(), current_version=NO, events=[p.event(i) for i in range(3)])
    return [e.commit_position == c for e in p.client.get_stream(p.stream())]


@case
def append_reserved_names(p: Probe) -> Any:
    return [
        p.append("$" + p.stream(), p.event(), NO),
        p.append("$$" + p.stream(), p.event(), NO),
        p.append("", p.event(), NO),
        p.append("", [p.event()], NO),
    ]
