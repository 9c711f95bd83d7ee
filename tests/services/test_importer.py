"""The importer on the real file, and on files that are broken in every way that we could think of."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from services.importer import BrokenFile, Dropped, Goods, Invoice, Kind, Reason, Report, SetAside, invoices, read_rows
from services.importer.rows import COLUMNS, Row, parse_rows

DATA = Path(__file__).parents[2] / "services" / "data" / "online-retail.csv"
HEADER = ",".join(COLUMNS)
GOOD = "536365,85123A,WHITE HANGING HEART T-LIGHT HOLDER,6,2010-12-01T08:26:00,2.55,17850,United Kingdom"


def csv(*lines: str) -> list[bytes]:
    return [f"{line}\n".encode() for line in (HEADER, *lines)]


def row(line: int = 2, **changes: object) -> Row:
    fields: dict[str, object] = {
        "invoice": "536365",
        "sku": "85123A",
        "description": "HOLDER",
        "quantity": 6,
        "date": datetime(2010, 12, 1, 8, 26, tzinfo=UTC),
        "price": Decimal("2.55"),
        "customer": "17850",
        "country": "United Kingdom",
    }
    return Row(line=line, **{**fields, **changes})  # type: ignore[arg-type]


# ---- the real file -------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> Report:
    report = Report()
    for finding in invoices(read_rows(DATA)):
        report.add(finding)
    return report


def test_every_row_of_the_real_file_is_accounted_for(report: Report) -> None:
    assert report.rows == 10_000
    assert report.lines[Kind.ORDER] + report.lines[Kind.RETURN] + sum(map(len, report.set_aside.values())) == 10_000


def test_every_invoice_of_the_real_file_is_accounted_for(report: Report) -> None:
    assert report.invoices[Kind.RETURN] + len(report.dropped[Kind.RETURN]) == 43
    assert report.invoices[Kind.ORDER] + len(report.dropped[Kind.ORDER]) == 512 - 43


def test_the_real_file_is_sorted_out_as_counted_by_hand(report: Report) -> None:
    assert report.invoices == {Kind.ORDER: 423, Kind.RETURN: 41}
    assert {reason: len(lines) for reason, lines in report.set_aside.items()} == {
        Reason.NOT_GOODS: 38,
        Reason.ORDER_QUANTITY: 30,
        Reason.PRICE: 16,
    }
    assert report.guests == 23
    assert "C536379" in report.dropped[Kind.RETURN], "a discount is no return of goods"
    assert 2408 in report.set_aside[Reason.ORDER_QUANTITY]


def test_the_first_real_order_has_its_seven_lines() -> None:
    first = next(finding for finding in invoices(read_rows(DATA)) if isinstance(finding, Invoice))
    assert (first.number, first.kind, first.customer, first.country) == (
        "536365",
        Kind.ORDER,
        "17850",
        "United Kingdom",
    )
    assert first.date == datetime(2010, 12, 1, 8, 26, tzinfo=UTC)
    assert len(first.goods) == 7
    assert first.goods[0] == Goods("85123A", "WHITE HANGING HEART T-LIGHT HOLDER", 6, Decimal("2.55"))


def test_a_real_return_has_positive_quantities_and_names_no_order() -> None:
    found = {finding.number: finding for finding in invoices(read_rows(DATA)) if isinstance(finding, Invoice)}
    assert found["C536383"].kind is Kind.RETURN
    assert found["C536383"].goods == (Goods("35004C", "SET OF 3 COLOURED  FLYING DUCKS", 1, Decimal("4.65")),)


def test_the_report_says_everything_in_words(report: Report) -> None:
    text = str(report)
    assert "10,000 rows: 9,818 in 423 orders (23 by guests), 98 in 41 returns, 84 set aside" in text
    assert "38 not goods" in text
    assert "46 orders dropped, no valid row left (536414, 536545, 536546, 536547, ...)" in text


# ---- what is set aside ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (row(sku="POST"), Reason.NOT_GOODS),
        (row(sku="BANK CHARGES", price=Decimal(15)), Reason.NOT_GOODS),
        (row(quantity=0), Reason.ORDER_QUANTITY),
        (row(quantity=-6), Reason.ORDER_QUANTITY),
        (row(price=Decimal(0)), Reason.PRICE),
        (row(price=Decimal(-1)), Reason.PRICE),
        (row(invoice="C1", quantity=6), Reason.RETURN_QUANTITY),
        (row(invoice="C1", sku="D", quantity=-1), Reason.NOT_GOODS),
    ],
)
def test_a_row_that_makes_no_sense_is_set_aside_with_its_reason(broken: Row, reason: Reason) -> None:
    set_aside, dropped = invoices([broken])
    assert set_aside == SetAside(2, broken.invoice, reason)
    assert isinstance(dropped, Dropped)
    assert dropped.number == broken.invoice


def test_the_rest_of_an_order_survives_a_bad_row() -> None:
    set_aside, order = invoices([row(2, sku="POST"), row(3)])
    assert isinstance(set_aside, SetAside)
    assert isinstance(order, Invoice)
    assert [goods.sku for goods in order.goods] == ["85123A"]


def test_a_guest_is_no_error() -> None:
    (order,) = invoices([row(customer=None)])
    assert isinstance(order, Invoice)
    assert order.customer is None


def test_an_invoice_whose_rows_are_not_together_is_refused() -> None:
    apart = [row(2), row(3, invoice="536366"), row(4)]
    with pytest.raises(BrokenFile, match="line 4: invoice 536365 continues after others"):
        list(invoices(apart))


def test_rows_are_read_only_as_they_are_asked_for() -> None:
    def lines() -> Iterator[bytes]:
        yield from csv(GOOD, GOOD.replace("536365", "536366", 1))
        raise AssertionError("read too far")

    assert isinstance(next(invoices(parse_rows(lines()))), Invoice)


# ---- what cannot be read -------------------------------------------------------------


def test_a_good_row_is_read_with_its_types() -> None:
    (read,) = parse_rows(csv(GOOD))
    assert read == row(description="WHITE HANGING HEART T-LIGHT HOLDER")


def test_the_same_article_in_small_letters_is_the_same_article() -> None:
    (read,) = parse_rows(csv(GOOD.replace("85123A", "15056bl")))
    assert read.sku == "15056BL"


def test_columns_may_come_in_another_order_with_a_byte_order_mark_and_empty_lines() -> None:
    lines = [("\ufeff" + ",".join(reversed(COLUMNS)) + "\r\n").encode(), b"\r\n", b"UK,,2.5,2010-12-01,1,CUP,X1,1\r\n"]
    (read,) = parse_rows(lines)
    assert (read.invoice, read.sku, read.price, read.customer, read.line) == ("1", "X1", Decimal("2.5"), None, 3)


def test_line_numbers_are_those_of_an_editor_even_after_a_line_break_in_quotes() -> None:
    lines = [HEADER.encode() + b"\n", b'1,X1,"two\n', b'lines",1,2010-12-01,1,,UK\n', GOOD.encode()]
    assert [read.line for read in parse_rows(lines)] == [3, 4]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (GOOD.replace(",6,", ",six,"), "line 3: Quantity 'six' is not a whole number"),
        (GOOD.replace(",6,", ",6.5,"), "line 3: Quantity '6.5' is not a whole number"),
        (GOOD.replace(",6,", ",1_0,"), "line 3: Quantity '1_0' is not a whole number"),
        (GOOD.replace(",6,", ",,"), "line 3: Quantity '' is not a whole number"),
        (GOOD.replace("2.55", "NaN"), "line 3: UnitPrice 'NaN' is not an amount"),
        (GOOD.replace("2.55", "1e9"), "line 3: UnitPrice '1e9' is not an amount"),
        (GOOD.replace("2.55", '"2,55"'), "line 3: UnitPrice '2,55' is not an amount"),
        (GOOD.replace("2010-12-01T08:26:00", "01/12/2010"), "line 3: InvoiceDate '01/12/2010' is not a date"),
        (GOOD.replace("2010-12-01T08:26:00", "2010-02-30"), "line 3: InvoiceDate '2010-02-30' is not a date"),
        (GOOD.replace(",17850", ""), "line 3: 7 fields where the header has 8"),
        (GOOD + ",more", "line 3: 9 fields where the header has 8"),
        (GOOD.replace("85123A", ""), "line 3: StockCode is empty"),
        (GOOD.replace("536365", " ", 1), "line 3: InvoiceNo is empty"),
        (GOOD.replace("United Kingdom", ""), "line 3: Country is empty"),
        (GOOD.replace("WHITE", '"WHITE'), "line 3: not CSV"),
    ],
)
def test_a_row_that_cannot_be_read_stops_the_import_and_is_named(line: str, problem: str) -> None:
    with pytest.raises(BrokenFile) as caught:
        list(parse_rows(csv(GOOD, line)))
    assert str(caught.value).startswith(problem)
    assert caught.value.line == 3


def test_bytes_that_are_not_utf8_are_named() -> None:
    with pytest.raises(BrokenFile, match=r"line 3: not UTF-8 \(byte 15 of the line\)"):
        list(parse_rows([*csv(GOOD), b"536366,85123A,\xa35 NOTE,1,2010-12-01,1,,UK\n"]))


def test_a_missing_column_is_named() -> None:
    with pytest.raises(BrokenFile, match="line 1: missing column UnitPrice; found InvoiceNo, StockCode"):
        list(parse_rows([HEADER.replace("UnitPrice", "Price").encode()]))


def test_an_empty_file_is_no_file_of_orders() -> None:
    with pytest.raises(BrokenFile, match=r"line 1: missing column .*; the file is empty"):
        list(parse_rows([]))
