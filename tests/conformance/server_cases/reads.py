"""Reads, metadata, retention, delete and tombstone."""

from __future__ import annotations

from typing import Any

from tests.conformance.server_cases.probe import ANY, EXISTS, NO, Probe, case, three


@case
def read_missing_stream(p: Probe) -> Any:
    return [p.read(p.stream()), p.version(p.stream())]


@case
def read_from_position(p: Probe) -> Any:
    s = three(p)
    return [p.read(s, stream_position=3), p.read(s, stream_position=5), p.read(s, stream_position=99)]


@case
def read_backwards(p: Probe) -> Any:
    s = three(p)
    return [
        p.read(s, backwards=True),
        p.read(s, backwards=True, stream_position=2),
        p.read(s, backwards=True, stream_position=99),
    ]


@case
def read_limit(p: Probe) -> Any:
    s = three(p)
    return [p.read(s, limit=2), p.read(s, limit=2, backwards=True), p.read(s, limit=0)]


@case
def read_all_is_in_position_order(p: Probe) -> Any:
    for i in range(6):
        p.append(p.stream(str(i % 2)), p.event(i), ANY)
    got = p.read_all()
    positions = [e.commit_position or 0 for e in got]
    return [[p.show(e) for e in got], positions == sorted(positions)]


@case
def read_all_from_position_is_inclusive(p: Probe) -> Any:
    s = three(p)
    at = p.client.get_stream(s)[2].commit_position
    return [
        [p.show(e) for e in p.read_all(commit_position=at)],
        [p.show(e) for e in p.read_all(commit_position=at, backwards=True)],
    ]


@case
def read_all_filter_event_type(p: Probe) -> Any:
    t = p.prefix + "Typed"
    p.append(p.stream(), [p.event(1, type=t), p.event(2, type=t + "Other"), p.event(3)], NO)
    return [
        [p.show(e) for e in p.read_all(filter_include=(t,))],
        [p.show(e) for e in p.read_all(filter_include=(f"{t}.*",), limit=1)],
    ]


@case
def read_all_position_between_records(p: Probe) -> Any:
    s = three(p)
    at = (p.client.get_stream(s)[2].commit_position or 0) + 1
    out = p.do(lambda: len([p.show(e) for e in p.read_all(commit_position=at)]))
    return {"error": out["error"]} if "error" in out else out


@case
def metadata_of_missing_stream(p: Probe) -> Any:
    return p.do(lambda: [p.client.get_stream_metadata(p.stream())[0], str(p.client.get_stream_metadata(p.stream())[1])])


@case
def metadata_set_and_get(p: Probe) -> Any:
    three(p)
    return [
        p.do(lambda: p.client.set_stream_metadata(p.stream(), metadata={"k": 1})),
        p.do(lambda: list(p.client.get_stream_metadata(p.stream()))),
        p.do(lambda: p.client.set_stream_metadata(p.stream(), metadata={"k": 2}, current_version=0)),
        p.do(lambda: list(p.client.get_stream_metadata(p.stream()))),
        p.do(lambda: p.client.set_stream_metadata(p.stream(), metadata={"k": 3}, current_version=0)),
    ]


@case
def metadata_before_stream(p: Probe) -> Any:
    p.client.set_stream_metadata(p.stream(), metadata={"k": 1})
    return [
        p.read(p.stream()),
        p.append(p.stream(), p.event(), EXISTS),
        p.append(p.stream("x"), p.event(), NO),
        p.read(p.stream()),
    ]


@case
def max_count(p: Probe) -> Any:
    s = three(p)
    p.client.set_stream_metadata(s, metadata={"$maxCount": 2})
    return [p.read(s), p.read(s, stream_position=0, limit=1), p.read(s, backwards=True), p.version(s)]


@case
def truncate_before(p: Probe) -> Any:
    s = three(p)
    p.client.set_stream_metadata(s, metadata={"$tb": 3})
    return [p.read(s), p.read(s, backwards=True), p.append(s, p.event(7), 4), p.read(s)]


@case
def truncate_beyond_head(p: Probe) -> Any:
    s = three(p)
    p.client.set_stream_metadata(s, metadata={"$tb": 50})
    return [p.read(s), p.append(s, p.event(7), 4), p.append(s, p.event(8), NO), p.read(s)]


@case
def max_age(p: Probe) -> Any:
    s = three(p)
    p.client.set_stream_metadata(s, metadata={"$maxAge": 1})
    p.until(lambda: p.read(s) == {"ok": []})
    first = p.read(s)
    p.append(s, p.event(9), ANY)
    return [first, p.read(s)]


@case
def all_still_shows_truncated(p: Probe) -> Any:
    s = three(p)
    p.client.set_stream_metadata(s, metadata={"$maxCount": 1})
    return [p.show(e) for e in p.read_all()]


@case
def delete_then_read_and_append(p: Probe) -> Any:
    s = three(p)
    d = p.do(lambda: p.client.delete_stream(s, current_version=4) and "position")
    return [d, p.read(s), p.version(s), p.append(s, p.event(9), NO), p.read(s), p.version(s)]


@case
def delete_then_append_any(p: Probe) -> Any:
    s = three(p)
    p.client.delete_stream(s, current_version=ANY)
    return [p.append(s, [p.event(9)], ANY), p.read(s), p.do(lambda: list(p.client.get_stream_metadata(s)))]


@case
def delete_then_append_version(p: Probe) -> Any:
    s = three(p)
    p.client.delete_stream(s, current_version=ANY)
    return [
        p.append(s, p.event(9), 2),
        p.append(s, p.event(9), EXISTS),
        p.append(s, [p.event(9)], EXISTS),
        p.append(s, p.event(9), 4),
        p.read(s),
    ]


@case
def delete_wrong_version(p: Probe) -> Any:
    s = three(p)
    return [
        p.do(lambda: p.client.delete_stream(s, current_version=1)),
        p.do(lambda: p.client.delete_stream(p.stream("none"), current_version=1)),
        p.do(lambda: p.client.delete_stream(p.stream("none"), current_version=ANY)),
        p.do(lambda: p.client.delete_stream(p.stream("none"), current_version=EXISTS)),
    ]


@case
def delete_twice(p: Probe) -> Any:
    s = three(p)
    return [
        p.do(lambda: p.client.delete_stream(s, current_version=ANY) and "position"),
        p.do(lambda: p.client.delete_stream(s, current_version=ANY) and "position"),
        p.do(lambda: p.client.delete_stream(s, current_version=4) and "position"),
    ]


@case
def tombstone_then_everything(p: Probe) -> Any:
    s = three(p)
    return [
        p.do(lambda: p.client.tombstone_stream(s, current_version=4) and "position"),
        p.read(s),
        p.append(s, p.event(), ANY),
        p.append(s, [p.event()], ANY),
        p.append(s, p.event(), NO),
        p.do(lambda: p.client.delete_stream(s, current_version=ANY)),
        p.do(lambda: p.client.tombstone_stream(s, current_version=ANY)),
        p.version(s),
        p.do(lambda: p.client.get_stream_metadata(s)),
    ]


@case
def tombstone_missing(p: Probe) -> Any:
    return [
        p.do(lambda: p.client.tombstone_stream(p.stream("a"), current_version=ANY) and "position"),
        p.do(lambda: p.client.tombstone_stream(p.stream("b"), current_version=NO) and "position"),
        p.do(lambda: p.client.tombstone_stream(p.stream("c"), current_version=3)),
        p.do(lambda: p.client.tombstone_stream(p.stream("d"), current_version=EXISTS)),
    ]


@case
def all_shows_tombstone(p: Probe) -> Any:
    s = three(p, n=1)
    p.client.tombstone_stream(s, current_version=ANY)
    return [
        p.show(e)
        for e in p.read_all(
            filter_exclude=(), filter_include=(r"\$?\$?" + p.prefix + ".*",), filter_by_stream_name=True
        )
    ]


@case
def all_shows_soft_delete(p: Probe) -> Any:
    s = three(p, n=1)
    p.client.delete_stream(s, current_version=ANY)
    p.append(s, p.event(5), ANY)
    return [
        p.show(e)
        for e in p.read_all(
            filter_include=(r"\$?\$?" + p.prefix + ".*",), filter_exclude=(), filter_by_stream_name=True
        )
    ]


@case
def all_backwards_from_beyond_the_end(p: Probe) -> Any:
    end = p.client.append_to_stream(p.stream(), current_version=NO, events=[p.event()])
    return p.do(lambda: list(p.client.read_all(commit_position=end + 1_000_000, backwards=True, limit=1)))


@case
def category_has_what_is_no_json(p: Probe) -> Any:
    stream, category = f"{p.prefix}raw-1", f"$ce-{p.prefix}raw"
    p.append(stream, p.event(data=b"\x00", content_type="application/octet-stream"), NO)
    p.append(stream, p.event(1, type="$mine"), ANY)
    p.until(lambda: len(p.read(category).get("ok", ())) == 2)
    return p.read(category, resolve_links=True)
