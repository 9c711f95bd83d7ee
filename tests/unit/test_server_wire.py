"""What the server makes of requests before it looks at the log."""

from __future__ import annotations

import re
from uuid import UUID, uuid4

import pytest

pytest.importorskip("esdbclient", reason="pip install 'tidings[eventstoredb]'")

from tidings.errors import ConfigurationError
from tidings.server import EventStoreServer
from tidings.server.links import category_of
from tidings.server.log import Choice, hidden, target_of
from tidings.server.protocol import shared, streams
from tidings.server.refusals import Refusal, stream_deleted
from tidings.server.wire import Malformed, encoder, event_data, expected_version, stream_name, uuid_of
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
