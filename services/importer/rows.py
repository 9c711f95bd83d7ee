"""Reads the file as typed rows, one at a time. It does not judge whether a row makes sense.

If a row cannot be read at all, the file is damaged or the wrong one. Guessing would put wrong orders into a log that is
never corrected, so reading stops there and names the line.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Final

__all__ = ["COLUMNS", "BrokenFile", "Row", "parse_rows", "read_rows"]

COLUMNS: Final = (
    "InvoiceNo",
    "StockCode",
    "Description",
    "Quantity",
    "InvoiceDate",
    "UnitPrice",
    "CustomerID",
    "Country",
)

# Not int() and Decimal(): they also take "1_000", "NaN" and digits of other scripts.
_WHOLE: Final = re.compile(r"-?[0-9]{1,9}")
_AMOUNT: Final = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,9})?")


class BrokenFile(Exception):
    """The file is damaged or the wrong one. `line` counts from 1, the header."""

    def __init__(self, line: int, problem: str) -> None:
        self.line = line
        super().__init__(f"line {line}: {problem}")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of an invoice, as in the file."""

    line: int
    """Line of the file on which it ends, as an editor counts: the header is line 1."""
    invoice: str
    sku: str
    """The article's code in capitals: `15056bl` and `15056BL` in the file are one article."""
    description: str
    quantity: int
    date: datetime
    """Date and time in UTC, which is British time in December."""
    price: Decimal
    """Pounds, for one piece."""
    customer: str | None
    """None for a guest."""
    country: str


def read_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a file one by one. Raises `BrokenFile`, or `OSError` if it cannot be opened."""
    with path.open("rb") as file:
        yield from parse_rows(file)


def parse_rows(lines: Iterable[bytes]) -> Iterator[Row]:
    """Parse the lines of a file into rows; the first line is the header. Raises `BrokenFile`, which names the line."""
    records = _records(lines)
    _, header = next(records, (1, []))
    places = _places(header)
    for line, fields in records:
        if not fields:
            continue  # an empty line
        if len(fields) != len(header):
            raise BrokenFile(line, f"{len(fields)} fields where the header has {len(header)}")
        yield _row(line, {column: fields[place].strip() for column, place in places.items()})


def _records(lines: Iterable[bytes]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(_decoded(lines), strict=True)
    try:
        for fields in reader:
            yield reader.line_num, fields
    except csv.Error as error:
        raise BrokenFile(reader.line_num, f"not CSV: {error}") from None


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise BrokenFile(
                number, f"not UTF-8 (byte {error.start + 1} of the line); convert the file first"
            ) from None
        yield text


def _places(header: list[str]) -> dict[str, int]:
    names = [name.strip() for name in header]
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        found = f"found {', '.join(names)}" if names else "the file is empty"
        raise BrokenFile(1, f"missing column {', '.join(missing)}; {found}")
    return {column: names.index(column) for column in COLUMNS}


def _row(line: int, fields: dict[str, str]) -> Row:
    for column in ("InvoiceNo", "StockCode", "Country"):
        if not fields[column]:
            raise BrokenFile(line, f"{column} is empty")
    return Row(
        line=line,
        invoice=fields["InvoiceNo"],
        sku=fields["StockCode"].upper(),
        description=fields["Description"],
        quantity=_whole(line, fields["Quantity"]),
        date=_date(line, fields["InvoiceDate"]),
        price=_amount(line, fields["UnitPrice"]),
        customer=fields["CustomerID"] or None,
        country=fields["Country"],
    )


def _whole(line: int, text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise BrokenFile(line, f"Quantity {text!r} is not a whole number")
    return int(text)


def _amount(line: int, text: str) -> Decimal:
    if not _AMOUNT.fullmatch(text):
        raise BrokenFile(line, f"UnitPrice {text!r} is not an amount such as 2.55")
    return Decimal(text)


def _date(line: int, text: str) -> datetime:
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        raise BrokenFile(line, f"InvoiceDate {text!r} is not a date and time such as 2010-12-01T08:26:00") from None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
