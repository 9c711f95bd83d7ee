"""As KurrentDB 26.1 the server answers appends of records as the real one did, and old clients see what it saw."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from google.protobuf import json_format  # type: ignore[import-untyped]

from tidings.errors import StreamDeleted, StreamNotFound
from tidings.server import EventStoreServer
from tidings.server.http2_stream import trailers_of
from tidings.server.records import _wrong
from tidings.stores import EventData, EventStore, Filter
from tidings.stores.eventstoredb.records_messages import MESSAGES, PACKAGE
from tidings.stores.eventstoredb.store import open_eventstoredb
from tidings.stores.several import NONE
from tidings.stores.sqlite.several import Several, Violation

grpc: Any = pytest.importorskip("grpc", reason="pip install 'tidings[eventstoredb]'")
RECORDED = json.loads((Path(__file__).parent / "kurrentdb_cases.json").read_text(encoding="utf-8"))
_NOBODY: Any = None
NO_STREAM, ANY, EXISTS = -1, -2, -4
A, B, S, NEW, OTHER, GONE, NEVER, X = (f"<p>-{name}" for name in ("a", "b", "s", "new", "other", "gone", "never", "x"))

Case = Callable[["Asking"], Awaitable[Any]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def record(
    n: int = 0,
    stream: str | None = None,
    *,
    id_: str | None = "new",
    type: str = "Happened",
    kind: int = 1,
    data: bytes | None = None,
    properties: dict[str, Any] | None = None,
) -> Any:
    made = MESSAGES["AppendRecord"](data=json.dumps({"n": n}).encode() if data is None else data)
    made.schema.name, made.schema.format = type, kind
    if id_ is not None:
        made.record_id = str(uuid4()) if id_ == "new" else id_
    if stream is not None:
        made.stream = stream
    for key, value in (properties or {}).items():
        entry = made.properties.add(key=key)
        json_format.ParseDict(value, entry.value)
        entry.value.SetInParent()
    return made


def check(stream: str, state: int) -> Any:
    return MESSAGES["ConsistencyCheck"](stream_state={"stream": stream, "expected_state": state})


def request(stream: str, *records: Any, expected: int | None = None) -> Any:
    return MESSAGES["AppendRequest"](stream=stream, records=records, expected_revision=expected)


def plain(message: Any) -> Any:
    """The message as it was recorded: what differs from log to log is a symbol."""

    def normal(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: normal(each) for key, each in value.items()}
        if isinstance(value, list):
            return [normal(each) for each in value]
        if isinstance(value, str):
            return re.sub(r"^\d{4,}$", "<n>", re.sub(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", "<id>", value))
        return "<n>" if type(value) is int and value >= 1000 else value

    return normal(json_format.MessageToDict(message))


class Asking:
    """A server as a case sees it."""

    def __init__(self, channel: Any, store: EventStore) -> None:
        self.store = store
        service = f"/{PACKAGE}.StreamsService"
        self._records = channel.unary_unary(f"{service}/AppendRecords", _packed, _parsed("AppendRecordsResponse"))
        self._session = channel.stream_unary(f"{service}/AppendSession", _packed, _parsed("AppendSessionResponse"))

    async def records(self, *records: Any, checks: Any = ()) -> Any:
        return await self._told(self._records(MESSAGES["AppendRecordsRequest"](records=records, checks=checks)))

    async def session(self, *requests: Any) -> Any:
        return await self._told(self._session(iter(requests)))

    async def _told(self, call: Any) -> Any:
        try:
            return {"ok": plain(await call)}
        except grpc.aio.AioRpcError as error:
            told: dict[str, Any] = {"code": error.code().name}
            for key, value in error.trailing_metadata():
                if key == "grpc-status-details-bin":
                    details = MESSAGES["Status"].FromString(value).details
                    names = [each.type_url.rpartition(".")[2] for each in details]
                    told["details"] = [
                        {name: _without_words(plain(MESSAGES[name].FromString(each.value)))}
                        for name, each in zip(names, details, strict=True)
                    ]
            return told

    async def before(self, stream: str, *numbers: int) -> None:
        await self.store.append(stream, [EventData("Happened", json.dumps({"n": n}).encode()) for n in numbers])

    async def read(self, stream: str) -> Any:
        try:
            found = [event async for event in self.store.read_stream(stream)]
        except (StreamNotFound, StreamDeleted):
            return {"error": "NotFound"}
        return [
            f"{stream}@{event.version} {event.type} {event.content_type} {event.data.decode()} "
            f"{json.dumps(json.loads(event.metadata or b'0'), sort_keys=True)}"
            for event in found
        ]

    async def order(self, *streams: str) -> list[str]:
        log = self.store.read_all(filter=Filter(stream_prefixes=streams))
        return [f"{event.stream}@{event.version}" async for event in log]


def _packed(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _parsed(name: str) -> Any:
    return MESSAGES[name].FromString


def _without_words(details: Any) -> Any:
    for violation in details.get("fieldViolations", ()):
        assert violation.pop("description"), "it says what is wrong"
    return details


# ---- AppendRecords


@case
async def records_to_a_new_stream(ask: Asking) -> Any:
    return [await ask.records(record(0, S), record(1, S)), await ask.read(S)]


@case
async def records_of_two_streams_keep_their_order(ask: Asking) -> Any:
    answer = await ask.records(record(0, A), record(0, B), record(1, A), record(1, B))
    return [answer, await ask.order(A, B), await ask.read(A), await ask.read(B)]


@case
async def records_with_a_check_that_holds(ask: Asking) -> Any:
    await ask.before(S, 0, 1)
    return [await ask.records(record(2, S), checks=[check(S, 1)]), len(await ask.read(S))]


@case
async def records_with_a_check_that_does_not_hold(ask: Asking) -> Any:
    await ask.before(S, 0, 1)
    return [await ask.records(record(2, S), checks=[check(S, state)]) for state in (0, 5, NO_STREAM)]


@case
async def records_with_a_check_of_a_stream_that_is_not_written(ask: Asking) -> Any:
    await ask.before(A, 0, 1)
    answers = [await ask.records(record(state, B), checks=[check(A, state)]) for state in (1, 0)]
    return [*answers, len(await ask.read(B))]


@case
async def records_with_the_named_states(ask: Asking) -> Any:
    await ask.before(A, 0)
    pairs = [(stream, state) for stream in (A, NEW) for state in (NO_STREAM, ANY, EXISTS)]
    return [await ask.records(record(9, OTHER), checks=[check(*pair)]) for pair in pairs]


@case
async def records_with_a_state_that_is_none(ask: Asking) -> Any:
    return [await ask.records(record(0, S), checks=[check(S, state)]) for state in (-3, -5, -100)]


@case
async def no_records(ask: Asking) -> Any:
    await ask.before(S, 0)
    return [await ask.records(checks=checks) for checks in ([], [check(S, 0)], [check(S, 3)])]


@case
async def records_without_a_stream(ask: Asking) -> Any:
    return await ask.records(record(0, ""))


@case
async def records_without_an_id_get_one(ask: Asking) -> Any:
    return [await ask.records(record(0, S, id_=None)), await ask.read(S)]


@case
async def records_with_an_id_that_is_none(ask: Asking) -> Any:
    return [await ask.records(record(0, S, id_=text)) for text in ("", "no id", str(UUID(int=0)))]


@case
async def records_without_a_schema(ask: Asking) -> Any:
    return [await ask.records(record(0, S, type="")), await ask.read(S)]


@case
async def records_of_each_format(ask: Asking) -> Any:
    answers = [await ask.records(record(0, S, kind=kind, data=b"\x00\x01")) for kind in range(5)]
    return [answers, await ask.read(S)]


@case
async def properties_become_metadata(ask: Asking) -> Any:
    properties = {"text": "x", "number": 1.5, "flag": True, "list": [1, "a"], "map": {"k": None}, "none": None}
    return [await ask.records(record(0, S, properties=properties)), await ask.read(S)]


@case
async def records_repeated_without_a_check(ask: Asking) -> Any:
    batch = [record(0, A), record(0, B), record(1, A)]
    return [*[await ask.records(*batch[:count]) for count in (3, 3, 2)], await ask.order(A, B)]


@case
async def records_repeated_with_their_checks(ask: Asking) -> Any:
    batch, checks = [record(0, A), record(0, B)], [check(A, NO_STREAM), check(B, NO_STREAM)]
    return [*[await ask.records(*batch, checks=checks) for _ in range(2)], await ask.order(A, B)]


@case
async def records_to_a_deleted_stream(ask: Asking) -> Any:
    await ask.before(S, 0, 1)
    await ask.store.delete(S)
    states = [await ask.records(record(9, X), checks=[check(S, state)]) for state in (NO_STREAM, EXISTS, 1, ANY)]
    return [states, await ask.records(record(2, S)), await ask.read(S)]


@case
async def a_record_over_the_limit(ask: Asking) -> Any:
    return [await ask.records(record(0, S, data=b"x" * 16_900_000, kind=4)), await ask.read(S)]


# ---- AppendSession


@case
async def session_of_two_streams(ask: Asking) -> Any:
    return [await ask.session(request(A, record(0), record(1)), request(B, record(0))), await ask.order(A, B)]


@case
async def session_is_all_or_nothing(ask: Asking) -> Any:
    await ask.before(B, 0)
    answer = await ask.session(request(A, record(0), expected=NO_STREAM), request(B, record(1), expected=5))
    return [answer, await ask.read(A), len(await ask.read(B))]


@case
async def session_without_requests_or_records(ask: Asking) -> Any:
    return [await ask.session(), await ask.session(request(S)), await ask.session(request("", record(0)))]


@case
async def session_with_the_named_states(ask: Asking) -> Any:
    await ask.before(A, 0)
    old = [await ask.session(request(A, record(1), expected=state)) for state in (NO_STREAM, EXISTS, ANY)]
    return old + [await ask.session(request(NEW, record(0), expected=state)) for state in (0, EXISTS, NO_STREAM)]


@case
async def session_repeated(ask: Asking) -> Any:
    requests = [request(A, record(0), expected=NO_STREAM), request(B, record(0))]
    return [*[await ask.session(*requests) for _ in range(2)], await ask.order(A, B)]


@case
async def session_to_deleted_and_tombstoned_streams(ask: Asking) -> Any:
    for stream in (GONE, NEVER):
        await ask.before(stream, 0)
    await ask.store.delete(GONE)
    await ask.store.tombstone(NEVER)
    answers = [await ask.session(request(NEVER, record(1)))]
    answers += [await ask.session(request(GONE, record(1), expected=state)) for state in (0, EXISTS, NO_STREAM)]
    return [*answers, await ask.read(GONE)]


def test_every_recorded_case_is_asked() -> None:
    assert set(CASES) == set(RECORDED)


@pytest.fixture
async def ask() -> AsyncIterator[Asking]:
    options = [("grpc.max_send_message_length", -1)]
    async with EventStoreServer(release="kurrentdb-26.1") as server:
        store = await open_eventstoredb(server.uri)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel:
            yield Asking(channel, store)
        await store.close()


@pytest.mark.parametrize("name", RECORDED)
async def test_the_answer_is_the_recorded_one(ask: Asking, name: str) -> None:
    async with asyncio.timeout(60):
        assert await CASES[name](ask) == RECORDED[name]


# ---- beyond what was recorded


async def test_eventstoredb_has_no_such_service() -> None:
    async with (
        EventStoreServer() as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        call = channel.unary_unary(f"/{PACKAGE}.StreamsService/AppendRecords")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"")
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_fields_are_those_of_the_protocol(ask: Asking) -> None:
    """Written as bytes, because the server's own declaration could be wrong on both sides of a test."""
    id_, stream = str(uuid4()).encode(), b"raw"
    schema = b"\x08\x01\x12\x01T"  # format = 1, name = 2
    value = b"\x0a\x01k\x12\x03\x1a\x01v"  # key = 1, value = 2 (string_value = 3)
    parts = [(1, id_), (2, value), (3, schema), (4, b"{}"), (5, stream)]
    packed = b"".join(bytes([number << 3 | 2, len(part)]) + part for number, part in parts)
    state = b"\x0a\x03raw\x10\x01"  # stream = 1, expected_state = 2: -1 in zigzag
    wanted = b"\x0a" + bytes([len(packed)]) + packed + b"\x12" + bytes([len(state) + 2, 0x0A, len(state)]) + state
    assert MESSAGES["AppendRecordsRequest"].FromString(wanted).checks[0].stream_state.expected_state == -1
    answer = await ask._told(ask._records(MESSAGES["AppendRecordsRequest"].FromString(wanted)))
    assert answer["ok"]["revisions"] == [{"stream": "raw"}]
    (found,) = [event async for event in ask.store.read_stream("raw")]
    assert (str(found.id).encode(), found.type, found.data) == (id_, "T", b"{}")
    assert json.loads(found.metadata) == {"k": "v", "$schema.name": "T", "$schema.format": "Json"}


async def test_a_part_that_was_written_before_is_a_conflict_and_nothing_is_written(ask: Asking) -> None:
    known, new = record(0, A), record(0, B)
    await ask.records(known)
    assert (await ask.records(known, new))["code"] == "FAILED_PRECONDITION"
    assert (await ask.session(request(A, known), request(B, new)))["code"] == "FAILED_PRECONDITION"
    assert await ask.order(A, B) == [f"{A}@0"]


async def test_an_id_in_two_streams_is_refused_before_it_is_written(ask: Asking) -> None:
    """The log remembers an id for one stream: the same append again would not be known."""
    one, other = record(0, A), record(0, B)
    other.record_id = one.record_id
    answers = [
        await ask.records(one, other),
        await ask.session(request(A, record(0, id_=one.record_id)), request(B, record(0, id_=one.record_id))),
    ]
    for answer in answers:
        assert answer["details"][1] == {"BadRequest": {"fieldViolations": [{"field": "RecordId.Record ID"}]}}
    assert await ask.order(A, B) == []
    assert all(["ok" in await ask.records(one, one) for _ in range(2)])


async def test_a_part_that_was_written_before_is_named(ask: Asking) -> None:
    known = record(0, A)
    await ask.records(known)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask._records(MESSAGES["AppendRecordsRequest"](records=[known, record(0, B)]))
    assert str(refused.value.details()).startswith(f"Stream '{A}', at revision 0, has records of the append")


@pytest.mark.parametrize("name", ["x", "ü", "ї", "日", "😀"])
async def test_the_details_of_a_refusal_are_shorter_than_grpc_takes(name: str) -> None:
    """gRPC's clients refuse longer ones, some of the time."""
    checks = [Violation(number, f"{number}{name * 1000}"[:250], 3, NONE) for number in range(1000)]
    append = Several(_NOBODY, [(checks[0].stream, EventData("T", b""))], {}, [], 0)
    append.violations = checks
    refusal = _wrong(append, checks[0].stream, NONE, session=False)
    assert sum(len(key) + len(value) + 32 for key, value in trailers_of(refusal)) < 8192


async def test_every_violation_is_told_and_long_names_do_not_break_the_answer(ask: Asking) -> None:
    checks = [check(f"{number}{'ї' * 500}", 3) for number in range(50)]
    answer = await ask.records(record(0, S), checks=checks)
    (_, details) = answer["details"]
    violations = details["AppendConsistencyViolationErrorDetails"]["violations"]
    assert [each.get("checkIndex", 0) for each in violations] == list(range(len(violations)))
    assert len(violations) > 1
    assert await ask.read(S) == {"error": "NotFound"}
    answer = await ask.records(record(0, S), checks=[check(f"order-{number}", 3) for number in range(50)])
    (_, details) = answer["details"]
    assert len(details["AppendConsistencyViolationErrorDetails"]["violations"]) == 50


@pytest.mark.parametrize("state", [-5, -6])
async def test_a_stream_may_be_asked_to_be_gone(ask: Asking, state: int) -> None:
    await ask.before(A, 0)
    assert (await ask.records(record(0, X), checks=[check(A, state)]))["code"] == "FAILED_PRECONDITION"
    await (ask.store.delete(A) if state == -5 else ask.store.tombstone(A))
    assert "ok" in await ask.records(record(0, X), checks=[check(A, state)])
    assert (await ask.records(record(0, X), checks=[check(A, -11 - state)]))["code"] == "FAILED_PRECONDITION"


async def test_a_session_has_each_stream_once(ask: Asking) -> None:
    answer = await ask.session(request(A, record(0)), request(B, record(0)), request(A, record(1)))
    assert answer["details"][0]["ErrorInfo"]["reason"] == "STREAM_ALREADY_IN_APPEND_SESSION"
    assert await ask.order(A, B) == []


async def test_an_append_over_the_limit_of_all_records_is_refused_whole(ask: Asking) -> None:
    parts = [request(f"{S}-{number}", record(number, data=b"x" * 7_000_000)) for number in range(3)]
    answer = await ask.session(*parts)
    assert answer["details"][0]["ErrorInfo"]["reason"] == "APPEND_TRANSACTION_SIZE_EXCEEDED"
    assert await ask.read(f"{S}-0") == {"error": "NotFound"}


async def test_a_name_counts_with_each_record_and_has_an_end(ask: Asking) -> None:
    long = "s" * 1024
    answers = [
        await ask.records(record(0, f"{long}x")),
        await ask.session(request(f"{long}x", record(0))),
        await ask.records(record(0, X), checks=[check(f"{long}x", NO_STREAM)]),
    ]
    fields = [answer["details"][1]["BadRequest"]["fieldViolations"][0]["field"] for answer in answers]
    assert fields == ["Stream.Stream", "Stream.Stream", "Checks[0].StreamState.Stream"]
    answers = [await ask.session(request(stream, *(record(0) for _ in range(18_000)))) for stream in (long, X)]
    assert answers[0]["details"][0]["ErrorInfo"]["reason"] == "APPEND_TRANSACTION_SIZE_EXCEEDED"
    assert "ok" in answers[1]
    assert await ask.read(long) == {"error": "NotFound"}


async def test_a_session_is_refused_with_the_first_stream_too_many(ask: Asking) -> None:
    sent = 0

    async def requests() -> AsyncIterator[Any]:
        nonlocal sent
        for sent in range(1001):
            yield request(f"s-{sent}", record(0))
        await asyncio.Event().wait()  # the session stays open

    async with asyncio.timeout(30):
        answer = await ask._told(ask._session(requests()))
    assert answer["details"][1] == {"BadRequest": {"fieldViolations": [{"field": "Records"}]}}
    assert sent == 1000
    assert await ask.order("s-") == []


async def test_more_checks_or_streams_than_may_be_looked_up_are_refused(ask: Asking) -> None:
    answers = [
        await ask.records(record(0, S), checks=[check(S, 0)] * 1001),
        await ask.records(*(record(0, f"s-{number}") for number in range(1001))),
    ]
    assert [answer["code"] for answer in answers] == ["INVALID_ARGUMENT"] * 2
    assert await ask.order("s-", S) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_a_property_that_is_no_json_is_refused(ask: Asking, value: float) -> None:
    wrong = record(0, S)
    wrong.properties.add(key="k").value.number_value = value
    answer = await ask.records(wrong)
    assert answer["details"][1] == {"BadRequest": {"fieldViolations": [{"field": "Properties"}]}}


async def test_more_properties_than_may_be_looked_at_are_refused(ask: Asking) -> None:
    few, many = ({f"k{number}": number for number in range(count)} for count in (2_000, 20_000))
    assert "ok" in await ask.records(record(0, S, properties=few))
    answer = await ask.records(record(0, S, properties=many))
    assert answer["details"][1] == {"BadRequest": {"fieldViolations": [{"field": "Properties"}]}}


async def test_names_that_no_store_takes_are_refused(ask: Asking) -> None:
    for name in ("$$", " "):
        answer = await ask.records(record(0, name))
        assert answer["details"][1] == {"BadRequest": {"fieldViolations": [{"field": "Stream.Stream"}]}}


async def test_two_appends_at_once_do_not_both_hold_for_the_same_check(ask: Asking) -> None:
    answers = await asyncio.gather(
        *(ask.records(record(n, f"{S}-{n}"), record(n, A), checks=[check(A, NO_STREAM)]) for n in range(8))
    )
    assert sum("ok" in answer for answer in answers) == 1
    assert len(await ask.order(S, A)) == 2
