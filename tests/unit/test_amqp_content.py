"""Message properties by hand: what is written any AMQP library reads, and what is read, pamqp reads the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pamqp import commands, header

from tidings.buses.rabbitmq.content import Properties, _by_pamqp, body_size, pack, unpack

SHORT = st.none() | st.text(min_size=1, max_size=60)
NAMES = st.text(min_size=1, max_size=30)
VALUES = st.text(max_size=300) | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=100)
OURS = st.builds(Properties, st.dictionaries(NAMES, VALUES, max_size=15), SHORT, SHORT, SHORT, SHORT, SHORT)


@given(properties=OURS, size=st.integers(0, 2**63))
@settings(deadline=None)
def test_what_is_written_is_read_back_by_hand_and_by_pamqp(properties: Properties, size: int) -> None:
    payload = pack(properties, size)
    assert unpack(payload) == properties
    assert _by_pamqp(payload) == properties
    assert body_size(payload) == size


@given(properties=OURS)
@settings(deadline=None)
def test_every_message_is_persistent(properties: Properties) -> None:
    read = header.ContentHeader()
    read.unmarshal(pack(properties, 0))
    assert read.properties.delivery_mode == 2


@given(
    properties=OURS,
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=4),
    cut=st.integers(0, 30),
)
@example(properties=Properties({"a": "b"}), flips=[(20, 0xFF)], cut=0)
@settings(max_examples=500, deadline=None)
def test_broken_properties_are_never_read_otherwise_than_by_pamqp(
    properties: Properties, flips: list[tuple[int, int]], cut: int
) -> None:
    payload = bytearray(pack(properties, 5))
    for at, mask in flips:
        payload[at % len(payload)] ^= mask
    broken = bytes(payload[: len(payload) - cut])
    assert repr(unpack(broken)) == repr(_by_pamqp(broken))  # by text, because it may hold NaN


FOREIGN: list[dict[str, Any]] = [
    {"nothing": None, "yes": True, "half": 0.5, "list": [1, "a"], "table": {"a": 1}},
    {"x-delivery-count": 3, "x-death": [{"count": 1, "queue": "q"}]},
    {"raw": bytearray(b"\xff")},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_foreign_headers_become_texts_integers_and_bytes(headers: dict[str, Any]) -> None:
    theirs = commands.Basic.Properties(headers=headers, priority=3, reply_to="me", message_type="t")
    found = unpack(header.ContentHeader(body_size=1, properties=theirs).marshal())
    assert found is not None
    assert found.type == "t"
    assert found.headers.keys() == headers.keys()
    assert all(type(value) in (str, int, bytes) for value in found.headers.values())


def test_a_text_that_no_short_string_holds_is_left_out() -> None:
    found = unpack(pack(Properties({"type": "é" * 128}, type="é" * 128, message_id="a" * 255), 0))
    assert found == Properties({"type": "é" * 128}, message_id="a" * 255)


def test_a_value_longer_than_its_table_is_left_to_pamqp() -> None:
    payload = pack(Properties({"a": "b"}, message_id="m"), 0)
    broken = payload.replace(b"\x00\x00\x00\x01b", b"\x00\x00\x00\x03b")
    assert broken != payload
    assert unpack(broken) == _by_pamqp(broken)


@pytest.mark.parametrize(
    ("headers", "error"),
    [({"n": 2**63}, ValueError), ({"n": 1.5}, TypeError), ({"n" * 256: 1}, ValueError), ({"n": "\ud800"}, ValueError)],
)
def test_headers_that_no_table_holds_are_refused_when_they_are_written(
    headers: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        pack(Properties(headers), 0)
