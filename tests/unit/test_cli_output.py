"""What reaches a terminal: aligned, whole, and never a control character that somebody else wrote."""

from __future__ import annotations

import json
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.cli._output import columns, event_facts, event_lines, facts, one_line, plain
from tidings.stores import RecordedEvent

IDENTITY = UUID(int=7)


def recorded(
    data: bytes = b"{}",
    *,
    stream: str = "order-1",
    type: str = "OrderCreated",
    metadata: bytes = b"",
    json: bool = True,
) -> RecordedEvent:
    return RecordedEvent(5, stream, 0, type, data, metadata, json, IDENTITY.bytes, 17_000_000_000_000_000)


@given(st.text())
def test_what_is_shown_has_nothing_that_a_terminal_obeys(text: str) -> None:
    assert plain(text).isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("order-1 größe ☃", "order-1 größe ☃"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\u202eevil", r"\u202eevil"),
        ("\x9b31m", r"\x9b31m"),
    ],
)
def test_what_cannot_be_shown_is_escaped_and_the_rest_is_left(text: str, shown: str) -> None:
    assert plain(text) == shown


@given(st.text(), st.text(), st.binary(), st.binary(), st.booleans())
def test_whatever_an_event_holds_is_shown_safely(
    stream: str, type: str, data: bytes, metadata: bytes, json: bool
) -> None:
    event = recorded(data, stream=stream, type=type, metadata=metadata, json=json)
    for line in (*event_lines(event), one_line(event), facts(event_facts(event))):
        assert line.isprintable()


@given(st.dictionaries(st.text(), st.text()))
def test_what_json_holds_is_shown_safely(document: dict[str, str]) -> None:
    event = recorded(json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    for line in (*event_lines(event), one_line(event)):
        assert line.isprintable()


def test_columns_are_aligned_numbers_to_the_right_and_nothing_is_a_dash() -> None:
    lines = columns(("NAME", "COUNT", "WHAT"), [("a", 5, "first thing"), ("wide名", 1000, None)], right=(1,))
    assert lines == ["NAME    COUNT  WHAT", "a           5  first thing", "wide名   1000  -"]


def test_json_tells_bytes_from_documents() -> None:
    assert json.loads(facts(event_facts(recorded(b'{"n": 1}'))))["data"] == {"n": 1}
    assert json.loads(facts(event_facts(recorded(b'{"n": 1}', json=False))))["data"] == {"base64": "eyJuIjogMX0="}
    assert json.loads(facts(event_facts(recorded(b"\xff\x00"))))["data"] == {"base64": "/wA="}


def test_json_that_nests_too_deep_to_be_read_is_shown_all_the_same() -> None:
    deep = b"[" * 100_000
    assert json.loads(facts(event_facts(recorded(deep))))["data"]["base64"]
    assert "[[[" in one_line(recorded(deep))


def test_octets_are_shown_as_text_where_they_are_text_and_in_digits_where_they_are_none() -> None:
    assert "data      two words" in "\n".join(event_lines(recorded(b"two words", json=False)))
    shown = "\n".join(event_lines(recorded(b"\xff" * 100, json=False)))
    assert "ff ff ff" in shown
    assert "(100 bytes; --json shows all)" in shown
