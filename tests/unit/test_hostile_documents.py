"""Data that is not JSON, or is made to harm its parser, is refused before it is parsed; every other document is read
correctly."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings._support.json_limits import DEPTH, check, parse
from tidings.cli._output import event_facts, facts
from tidings.errors import SchemaError
from tidings.modelling.codec import decode, read_metadata
from tidings.modelling.events import Event, upcaster
from tidings.protocol.position import partition_key
from tidings.stores import RecordedEvent

texts = st.text() | st.sampled_from(['"', "\\", '\\"', "[", "{", "]", "NaN", "Infinity", '"NaN"', "[" * 300, "\\\\"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


class Free(Event, name="Free"):
    anything: Any = None


class Lifted(Event, name="Free", version=2):
    anything: Any = None

    @staticmethod
    @upcaster(1)
    def same(data: dict[str, Any]) -> dict[str, Any]:
        return data


def recorded(data: bytes, metadata: bytes = b"") -> RecordedEvent:
    return RecordedEvent(7, "order-1", 3, "Free", data, metadata, True, bytes(16), 0)


def nested(depth: int, inside: bytes = b"1", *, objects: bool = False) -> bytes:
    return b'{"a":' * depth + inside + b"}" * depth if objects else b"[" * depth + inside + b"]" * depth


@given(json_values, st.booleans(), st.booleans())
def test_every_document_that_is_json_is_what_it_says(value: Any, ascii_only: bool, indented: bool) -> None:
    document = json.dumps(value, ensure_ascii=ascii_only, indent=2 if indented else None)
    assert parse(document.encode("utf-8", "replace")) == json.loads(document.encode("utf-8", "replace"))


@given(texts, st.integers(0, 400))
def test_brackets_and_constants_within_texts_count_for_nothing(text: str, depth: int) -> None:
    many = json.dumps([text] * 3 + ["[{" * depth, "NaN", "-Infinity"], ensure_ascii=False).encode("utf-8", "replace")
    assert parse(many) == json.loads(many)


@pytest.mark.parametrize("objects", [False, True])
def test_the_depth_is_counted_exactly(objects: bool) -> None:
    beside = b'{"text":"[[[[{{{{","list":[' + b"[],{}," * 300 + b"0]}"
    assert parse(nested(DEPTH - 3, beside, objects=objects))
    for inside in (b"[]", b"{}", b"[[1]]", b'["\\\\"]'):
        with pytest.raises(ValueError, match=f"more than {DEPTH}"):
            check(nested(DEPTH, inside, objects=objects))


@pytest.mark.parametrize(
    "document",
    [b"NaN", b"[1,NaN]", b'{"a":-Infinity}', b'["\\\\",NaN]', b'["NaN",Infinity]', b"[1e400]", b"-1e999", b"9" * 5_000],
)
def test_numbers_that_could_not_be_written_again_are_refused(document: bytes) -> None:
    with pytest.raises(ValueError, match=r"JSON does not have|beyond what|digits"):
        parse(document)


@pytest.mark.parametrize("document", [b'{"anything":NaN}', b'{"more":[-Infinity]}', b'{"more":' + nested(250) + b"}"])
def test_an_event_whose_data_is_no_json_is_refused_in_whatever_field_it_is(document: bytes) -> None:
    """Undeclared fields are checked, too: pydantic alone would ignore them."""
    for view in (Free, Lifted):
        with pytest.raises(SchemaError, match=r"order-1@3 .* its data cannot be read: it (has NaN|nests more)"):
            decode(recorded(document), view)


BOMBS = {
    "lists": b"[" * 2_000_000,
    "objects": b'{"a":' * 500_000,
    "lists in metadata's place": b'{"partitionKey":' + b"[" * 1_000_000,
    "escaped quotes without an end": b"[" * 201 + b'"' + b'\\"' * 1_000_000,
    "backslashes without an end": b"[" * 201 + b'"' + b"\\" * 2_000_000,
    "quotes": b"[" * 201 + b'""' * 1_000_000,
    "flat": b"[" + b"[]," * 700_000 + b"NaN]",
    "constants in texts": b'["' + b"NaN" * 700_000,
    "nothing": b"",
    "no UTF-8": b'{"a":"\xff"}',
    "half a text": b'{"a":"',
    "digits": b"1" * 2_000_000,
    "zeros": b"[" + b"0" * 1_000_000 + b"]",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.timeout(20)
def test_bombs_are_refused_everywhere_with_the_error_that_is_documented(bomb: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(bomb)
    for view in (Free, Lifted):
        with pytest.raises(SchemaError, match="order-1@3") as refused:
            decode(recorded(bomb), view)
        assert len(str(refused.value)) < 600
    assert read_metadata(recorded(b"{}", bomb)) == {}
    assert partition_key(recorded(b"{}", bomb)) == "order-1"
    assert json.loads(facts(event_facts(recorded(bomb, bomb))))["position"] == 7


@given(json_values)
def test_old_and_new_versions_of_an_event_are_read_alike(value: Any) -> None:
    """Parse the same document with pydantic's parser and with Python's."""
    document = json.dumps({"anything": value}).encode()
    direct, lifted = (
        decode(recorded(document, b'{"schemaVersion":%d}' % version), Lifted).anything for version in (2, 1)
    )
    assert direct == lifted


@pytest.mark.parametrize("document", [b'{"anything":1,"anything":2}', b'{"anything":{"a":1,"a":2}}'])
def test_of_a_key_that_comes_twice_the_last_one_counts_for_every_reader(document: bytes) -> None:
    found = decode(recorded(document), Free).anything, decode(recorded(document), Lifted).anything
    assert found[0] == found[1] == json.loads(document)["anything"]
    metadata = b'{"partitionKey":"first","partitionKey":"last"}'
    assert (
        partition_key(recorded(b"{}", metadata)) == read_metadata(recorded(b"{}", metadata))["partitionKey"] == "last"
    )


@given(st.floats())
def test_json_that_the_command_line_prints_can_be_read_by_others(number: float) -> None:
    document = json.dumps({"number": number}).encode()
    line = facts(event_facts(recorded(document)))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(line, parse_constant=refuse)["data"]
    assert found == ({"number": number} if math.isfinite(number) else {"base64": found.get("base64")})
