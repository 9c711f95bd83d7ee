"""What the server makes of requests before it looks at the log."""

from __future__ import annotations

import re
import resource
import sys
from functools import partial
from uuid import UUID, uuid4

import pytest

pytest.importorskip("esdbclient", reason="pip install 'tidings[eventstoredb]'")

from tidings.errors import ConfigurationError
from tidings.server import EventStoreServer
from tidings.server.links import category_of
from tidings.server.log import Choice, hidden, target_of
from tidings.server.protocol import persistent, shared, streams
from tidings.server.refusals import Refusal, stream_deleted
from tidings.server.wire import Malformed, encoder, event_data, expected_version, group_encoder, stream_name, uuid_of
from tidings.stores import ANY, JSON, OCTETS, RecordedEvent


def recorded(stream: str = "s", type: str = "T", data: bytes = b"{}", id_: UUID | None = None) -> RecordedEvent:
    return RecordedEvent(9, stream, 0, type, data, b"", True, (id_ or uuid4()).bytes, 17)


def proposed(**metadata: str) -> streams.AppendReq.ProposedMessage:
    names = {name.replace("_", "-"): value for name, value in metadata.items()}
    return streams.AppendReq.ProposedMessage(id=shared.UUID(string=str(uuid4())), metadata=names, data=b"x")


@pytest.mark.parametrize("id_", [UUID(int=1), UUID(int=2**128 - 1), UUID("f0000000-0000-0000-8000-000000000001")])
def test_an_identifier_may_be_two_signed_numbers(id_: UUID) -> None:
    answer = streams.ReadResp.FromString(encoder(True)((recorded(id_=id_), None)))
    assert answer.event.event.id.WhichOneof("value") == "structured"
    assert uuid_of(answer.event.event.id) == id_


def test_an_identifier_is_text_when_that_was_asked_for() -> None:
    id_ = uuid4()
    answer = streams.ReadResp.FromString(encoder(False)((recorded(id_=id_), None)))
    assert answer.event.event.id.string == str(id_)


def test_a_link_without_its_target_is_sent_alone() -> None:
    answer = streams.ReadResp.FromString(encoder(False)((None, recorded(type="$>"))))
    assert not answer.event.HasField("event")
    assert answer.event.HasField("link")
    assert answer.event.commit_position == 9


@pytest.mark.parametrize("structured", [True, False])
def test_an_answer_holds_nothing_of_the_one_before(structured: bool) -> None:
    encode, alone = encoder(structured), partial(encoder, structured)
    long = RecordedEvent(2**40, "a" * 99, 2**40, "Long", b"x" * 99, b"y" * 99, False, uuid4().bytes, 2**50)
    short, link = RecordedEvent(0, "s", 0, "T", b"", b"", True, uuid4().bytes, 0), recorded(type="$>")
    for resolved in [(long, None), (short, None), (long, link), (None, link), (short, None), (long, None)]:
        sent, expected = (streams.ReadResp.FromString(each(resolved)) for each in (encode, alone()))
        assert sent == expected
        assert sent.event.HasField("event") == (resolved[0] is not None)
        assert sent.event.HasField("link") == (resolved[1] is not None)
        for message, event in ((sent.event.event, resolved[0]), (sent.event.link, resolved[1])):
            if event is not None:
                assert (message.data, message.custom_metadata) == (event.data, event.metadata)
                assert message.metadata["type"] == event.type
                assert message.stream_identifier.stream_name == event.stream.encode()


def test_how_often_an_event_was_retried_is_said_of_that_event_alone() -> None:
    encode = group_encoder(False)
    said = [persistent.ReadResp.FromString(encode((recorded(), None), retries)) for retries in (3, 0, 1)]
    assert [answer.event.retry_count for answer in said] == [3, 0, 1]


def test_answers_leave_no_memory_behind() -> None:
    encode, event = encoder(False), recorded(data=b"x" * 4_000)
    encode((event, None))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20_000):  # 80 MB in all
        encode((event, None))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < (20 << 20 if sys.platform == "darwin" else 20 << 10)


@pytest.mark.parametrize("name", [b"", b"\xff\xfe", b"a\xc3"])
def test_a_stream_name_must_be_text(name: bytes) -> None:
    with pytest.raises(Malformed):
        stream_name(shared.StreamIdentifier(stream_name=name))


def test_an_expected_version_must_be_given_and_reachable() -> None:
    with pytest.raises(Malformed):
        expected_version(streams.AppendReq.Options())
    with pytest.raises(Malformed):
        expected_version(streams.AppendReq.Options(revision=2**63))
    assert expected_version(streams.AppendReq.Options(revision=0)) == 0
    assert expected_version(streams.AppendReq.Options(any=shared.Empty())) is ANY


def test_an_event_needs_type_and_content_type() -> None:
    assert event_data(proposed(type="T", content_type=JSON)).content_type == JSON
    assert event_data(proposed(type="T", content_type="text/plain")).content_type == OCTETS
    for metadata in ({"type": "T"}, {"content_type": JSON}):
        with pytest.raises(Refusal, match="Required Metadata Property"):
            event_data(proposed(**metadata))
    with pytest.raises(Malformed, match="eventType"):
        event_data(proposed(type="", content_type=JSON))


def test_an_event_needs_an_identifier() -> None:
    for id_ in (shared.UUID(), shared.UUID(string="nonsense"), shared.UUID(string=str(UUID(int=0)))):
        with pytest.raises(Malformed):
            event_data(streams.AppendReq.ProposedMessage(id=id_, metadata={"type": "T", "content-type": JSON}))


@pytest.mark.parametrize(
    ("data", "target"),
    [
        (b"3@a@b", (3, "a@b")),
        (b"0@s", (0, "s")),
        (b"@s", None),
        (b"3@", None),
        (b"x@s", None),
        (b"-1@s", None),
        (b"9999999999999999999@s", None),
        (b"1@\xff", None),
        (b"", None),
    ],
)
def test_what_a_link_names(data: bytes, target: tuple[int, str] | None) -> None:
    assert target_of(recorded(type="$>", data=data)) == target


def test_expressions_are_searched_for_and_prefixes_are_alternatives() -> None:
    assert Choice(False, (), re.compile("b|^c$")).wants(recorded("abc"))
    assert not Choice(False, (), re.compile("^b|^c$")).wants(recorded("abc"))
    assert Choice(True, ("X", "T")).wants(recorded())
    assert not Choice(False, ("x",)).wants(recorded())
    assert not Choice(False, ()).wants(recorded())


def test_the_stores_own_bookkeeping_is_hidden_and_that_of_others_is_not() -> None:
    assert hidden(recorded("$persistentsubscription-$all::g-checkpoint"))
    assert hidden(recorded("$persistentsubscription-$all::g-parked"))
    assert hidden(recorded("tidings_log"))
    assert not hidden(recorded("tidings_relay-1"))
    assert not hidden(recorded("$persistentsubscription-s::g-parked"))
    assert not hidden(recorded("s"))


def test_a_category_stands_before_the_first_dash() -> None:
    assert (category_of("order-1-2"), category_of("order"), category_of("-1")) == ("order", "", "")


def test_trailers_are_ascii_whatever_the_stream_is_called() -> None:
    trailers = dict(stream_deleted("наказ").trailers)
    assert trailers["exception"] == "stream-deleted"
    assert trailers["stream-name"].isascii()


@pytest.mark.parametrize(
    "options",
    [
        {"host": "0.0.0.0"},
        {"host": "example.org"},
        {"certificate": "only.crt"},
        {"users": {"admin": "secret"}},
        {"tls": True, "insecure": True},
    ],
)
def test_options_that_let_strangers_in_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        EventStoreServer(**options)  # type: ignore[arg-type]


def test_listening_elsewhere_is_allowed_to_who_says_insecure() -> None:
    assert EventStoreServer(host="0.0.0.0", insecure=True).host == "0.0.0.0"
