"""The parts of `tidings capture`: values as Python source, expressions over several lines, personal values replaced."""

from __future__ import annotations

import ast
import json
import re
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from tests.unit import captured
from tests.unit.captured import Account, Kind, Line, accounts, bank, withdraw
from tidings.cli._layout import WIDTH, laid_out
from tidings.cli._literals import Imports, NoLiteral, literal, place_of
from tidings.cli._redaction import Redaction
from tidings.operations.capture import repositories_of

# ---- values --------------------------------------------------------------------------

ZONES = st.sampled_from([None, UTC, timezone(timedelta(hours=5, minutes=30))])
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
    st.text(alphabet="'\"\\\n{}\x1b\u202ea"),
    st.binary(),
    st.decimals(allow_nan=False),
    st.uuids(),
    st.dates(),
    st.datetimes(timezones=ZONES),
    st.times(),
    st.timedeltas(),
    st.sampled_from(Kind),
    st.builds(Line, text=st.text()),
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(st.text(), inner),
        st.frozensets(st.integers()),
        st.sets(st.text()),
    ),
    max_leaves=10,
)


def made(text: str, imports: Imports) -> Any:
    return eval(text, imports.namespace())


@given(VALUES)
def test_a_literal_makes_an_equal_value_of_the_same_type(value: Any) -> None:
    imports = Imports()
    text = literal(value, imports)
    again = made(text, imports)
    assert (type(again), again) == (type(value), value)
    assert text.isprintable()
    compile("\n".join(line for block in imports.blocks() for line in block), "imports", "exec")


@given(VALUES, st.integers(0, 40))
def test_an_expression_over_several_lines_is_the_same_expression(value: Any, indent: int) -> None:
    text = literal(value, Imports())
    laid = laid_out(text, indent)
    assert ast.dump(ast.parse(laid, mode="eval")) == ast.dump(ast.parse(text, mode="eval"))
    assert laid == text or len(text) + indent >= WIDTH


class Pair(NamedTuple):
    one: int
    other: str


class Named(BaseModel):
    text: str = Field(alias="theText")


def test_what_is_made_of_parts_is_written_by_their_names() -> None:
    imports = Imports()
    assert literal(Pair(1, "a"), imports) == 'Pair(one=1, other="a")'
    assert made(literal(Named(theText="a"), imports), imports) == Named(theText="a")
    assert literal(Decimal("1.10"), imports) == 'Decimal("1.10")'
    assert literal(datetime(2010, 12, 1, 8, 26, tzinfo=UTC), imports) == "datetime(2010, 12, 1, 8, 26, tzinfo=UTC)"
    assert literal((date(2010, 12, 1), time(8, 26)), imports) == "(date(2010, 12, 1), time(8, 26))"
    assert imports.blocks() == [
        ["from datetime import UTC, date, datetime, time", "from decimal import Decimal"],
        ["from tests.unit.test_capture_parts import Named, Pair"],
    ]


def test_two_classes_of_one_name_are_told_apart() -> None:
    imports = Imports()
    assert imports.of("one", "Line") == "Line"
    assert imports.of("other", "Line") == "Line_2"
    assert imports.of("other", "Line.Kind") == "Line_2.Kind"
    assert imports.blocks() == [["from one import Line", "from other import Line as Line_2"]]


def test_what_cannot_be_imported_is_not_written() -> None:
    class Local(BaseModel):
        """Nobody can import it."""

    for value in (Local(), object(), lambda: 0, float("nan")):
        with pytest.raises(NoLiteral):
            literal(value, Imports())
    with pytest.raises(NoLiteral):
        place_of(Local)
    assert place_of(Account) == ("tests.unit.captured", "Account")


# ---- personal values -----------------------------------------------------------------

DOCUMENTS = st.dictionaries(
    st.sampled_from(["name", "email", "text", "n"]),
    st.recursive(
        st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False)),
        lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.sampled_from(["name", "text"]), inner)),
        max_leaves=8,
    ),
)


@given(st.lists(DOCUMENTS, max_size=4))
def test_a_redacted_document_has_the_same_shape_and_the_same_value_is_replaced_alike(documents: list[Any]) -> None:
    redaction = Redaction(["name", "email"])
    for document in documents:
        redaction.learn(document)
    replaced = [redaction.document(document) for document in documents]
    found: dict[Any, Any] = {}

    def compare(one: Any, other: Any, personal: bool) -> None:
        assert type(one) is type(other)
        if isinstance(one, dict):
            assert list(one) == list(other)
            for name in one:
                compare(one[name], other[name], personal or name in ("name", "email"))
        elif isinstance(one, list):
            assert len(one) == len(other)
            for pair in zip(one, other, strict=True):
                compare(*pair, personal)
        elif personal:
            assert found.setdefault((type(one), one), other) == other
            if isinstance(one, str):
                assert len(one) == len(other)
        elif not isinstance(one, str):
            assert one == other

    for pair in zip(documents, replaced, strict=True):
        compare(*pair, personal=False)
    json.dumps(replaced)


def test_ids_keep_their_shape() -> None:
    values: dict[str, Any] = {
        "id": "0926cbe4-0d54-5d17-ac2f-ee6220e2711d",
        "mail": "Jane.Doe42@example.org",
        "number": 4471,
        "born": "1999-12-31",
        "at": "2010-12-01T08:26:00Z",
        "price": 2.55,
        "plain": "C-0042",
    }
    redaction = Redaction(list(values))
    redaction.learn(values)
    shown = redaction.document(values)
    assert not {name for name in values if shown[name] == values[name]}
    assert UUID(shown["id"]).version == 5
    assert UUID(shown["id"]).variant == UUID(values["id"]).variant
    assert re.fullmatch(r"[A-Z][a-z]{3}\.[A-Z][a-z]{2}[1-9]\d@[a-z]{7}\.[a-z]{3}", shown["mail"])
    assert 1000 <= shown["number"] <= 9999
    assert date.fromisoformat(shown["born"])
    assert shown["at"].endswith("T08:26:00Z")
    assert isinstance(shown["price"], float)
    assert re.fullmatch(r"[A-Z]-0\d{3}", shown["plain"])


def test_a_personal_value_is_replaced_in_other_texts_and_in_streams() -> None:
    redaction = Redaction(["customer", "order"])
    redaction.learn([{"customer": "jane"}, {"order": "7"}, {"order": 12345}])
    jane, seven = redaction.text("jane"), redaction.text("7")
    assert redaction.text("to jane, of Janet: 7") == f"to {jane}, of Janet: 7", "7 is too short to be sure"
    assert redaction.stream("customer-jane") == f"customer-{jane}"
    assert redaction.stream("order-7") == f"order-{seven}"
    assert redaction.stream("jane-7") == f"jane-{seven}", "a category names no one"
    assert "12345" not in redaction.text("order 12345 is late") + redaction.stream("order-12345")


def test_a_field_that_is_not_there_is_named() -> None:
    redaction = Redaction(["name", "nmae"])
    redaction.learn({"deep": [{"name": None}]})
    assert redaction.missing == ["nmae"]


# ---- what a handler reads ------------------------------------------------------------


def test_the_repositories_are_found_that_a_handler_uses_itself_or_through_a_function() -> None:
    assert repositories_of(withdraw) == [accounts]
    assert repositories_of(bank.named["once"].function) == []
    assert repositories_of(lambda: [accounts for _ in range(3)]) == [accounts]


def test_a_repository_is_found_in_a_closure_an_object_and_a_module() -> None:
    own = bank.repository(Account)

    async def closed() -> None:
        await own.load("1")

    async def through_module() -> None:
        await captured.accounts.load("1")

    class Called:
        def __init__(self) -> None:
            self.repository = own

        async def __call__(self) -> None:
            await self.repository.load("1")

    assert repositories_of(closed) == [own]
    assert repositories_of(Called()) == [own]
    assert repositories_of(through_module) == [accounts]
