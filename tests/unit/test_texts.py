"""Every text can be kept by every database, reads back equal, and stays as it is where it can."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.database.tables import metadata
from tidings.database.texts import BASE64, ESCAPED, Text, decoded, encoded
from tidings.modelling.handlers import NAME_LENGTH

CODECS = ("utf-8", "latin-1", "ascii")
SURROGATES = st.characters(categories=["Cs"])
PARTS = st.sampled_from(["\0", "\\", "\\u{0}", "\\\\", ESCAPED, BASE64, "ü", "€", "😀", "\ud800", "\x7f", "\x85", "a"])
TEXTS = st.lists(st.one_of(PARTS, st.characters(), SURROGATES, st.text())).map("".join)

OUR_OWN = {"service", "log", "active", "asked", "event_id", "kind", "code", "process", "receipt"}
OUR_OWN |= {"tidings_id_keys.name"}
"""Columns whose texts Tidings makes itself, from letters, digits, dashes and spaces."""


@given(TEXTS, st.sampled_from(CODECS))
def test_any_text_reads_back_equal_from_a_database_of_any_encoding(text: str, codec: str) -> None:
    kept = encoded(text, codec)
    assert "\0" not in kept
    kept.encode(codec)
    assert decoded(kept) == text


@given(TEXTS, TEXTS, st.sampled_from(CODECS))
def test_no_two_texts_are_kept_alike(one: str, two: str, codec: str) -> None:
    assert (encoded(one, codec) == encoded(two, codec)) == (one == two)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_what_can_be_kept_stays_as_it_is(text: str) -> None:
    assert encoded(text) == text


@pytest.mark.parametrize(
    "strange", [ESCAPED + "\\", ESCAPED + "\\u{110000}", BASE64 + "=", BASE64 + "_w==", BASE64 + "ü"]
)
def test_what_somebody_else_wrote_is_shown_as_it_is(strange: str) -> None:
    assert decoded(strange) == strange


def test_an_operator_can_read_what_is_escaped() -> None:
    assert encoded("order-\0-7 \\ 😀") == ESCAPED + "order-\\u{0}-7 \\\\ 😀"
    assert encoded("order-😀 ü", "latin-1") == ESCAPED + "order-\\u{1f600} ü"


@given(st.text(st.characters(min_codepoint=0x10000), min_size=1, max_size=NAME_LENGTH))
def test_a_long_name_does_not_grow_beyond_what_an_index_takes(name: str) -> None:
    assert len(encoded(name, "ascii")) <= max(1000, len(BASE64) + 4 * (4 * len(name) + 2) // 3 + 4)
    assert len(encoded("😀" * 250, "ascii")) < 1400


def test_every_text_column_of_ours_takes_every_text() -> None:
    texts = [
        (f"{table.name}.{column.name}", column)
        for table in metadata.tables.values()
        for column in table.columns
        if getattr(column.type, "impl_instance", column.type).python_type is str
    ]
    assert len(texts) > 20
    plain = [name for name, column in texts if not isinstance(column.type, Text) and not OUR_OWN & {name, column.name}]
    assert not plain, "use tidings.database.texts.Text: what comes from outside may hold what a database refuses"
