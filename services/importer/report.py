"""The importer's report: counts and line numbers per reason. It decides nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from services.importer.invoices import Dropped, Finding, Invoice, Kind, Reason

__all__ = ["Report"]

_SHOWN = 4
"""Line numbers that the text shows per reason. `set_aside` has all of them."""


@dataclass(slots=True)
class Report:
    """Counts of findings: call `add` with each, in any order."""

    invoices: Counter[Kind] = field(default_factory=Counter)
    lines: Counter[Kind] = field(default_factory=Counter)
    """Rows that are part of an order or a return."""
    guests: int = 0
    """Orders without a customer id: a guest's orders, not errors."""
    set_aside: dict[Reason, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Line numbers of the file by reason."""
    dropped: dict[Kind, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Invoices of which every row was set aside."""

    def add(self, finding: Finding) -> None:
        """Count one finding."""
        if isinstance(finding, Invoice):
            self.invoices[finding.kind] += 1
            self.lines[finding.kind] += len(finding.goods)
            self.guests += finding.kind is Kind.ORDER and finding.customer is None
        elif isinstance(finding, Dropped):
            self.dropped[finding.kind].append(finding.number)
        else:
            self.set_aside[finding.reason].append(finding.line)

    @property
    def rows(self) -> int:
        """Rows that were read: each is in an order, in a return, or set aside."""
        return self.lines.total() + sum(map(len, self.set_aside.values()))

    def __str__(self) -> str:
        orders, returns = self.invoices[Kind.ORDER], self.invoices[Kind.RETURN]
        summary = (
            f"{self.rows:,} rows: {self.lines[Kind.ORDER]:,} in {orders} orders ({self.guests} by guests), "
            f"{self.lines[Kind.RETURN]:,} in {returns} returns, {sum(map(len, self.set_aside.values()))} set aside:"
        )
        text = [summary]
        for reason, lines in sorted(self.set_aside.items(), key=lambda entry: -len(entry[1])):
            text.append(f"  {len(lines):4} {reason.value} (line {_some(lines)})")
        for kind, numbers in self.dropped.items():
            text.append(f"  {len(numbers):4} {kind.value}s dropped, no valid row left ({_some(numbers)})")
        return "\n".join(text)


def _some(things: list[int] | list[str]) -> str:
    shown = ", ".join(str(thing) for thing in things[:_SHOWN])
    return f"{shown}, ..." if len(things) > _SHOWN else shown
