"""What the demo prints: with a moving bar on a terminal, as plain lines elsewhere. It decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from services.demo.tally import Tally

__all__ = ["Screen", "states"]

_LINES_EVERY: Final = 1.0
_FRAMES_EVERY: Final = 0.1
"""Seconds."""


def states(tally: Tally) -> str:
    """How many orders are where."""
    words = ("placed", "confirmed", "cancelling", "cancelled", "dispatched")
    return " · ".join(f"{tally.count(word)} {word}" for word in words)


class Screen:
    """One demo's output."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)

    def heading(self, text: str) -> None:
        """Begin an act."""
        self._console.print()
        self._console.print(Text(text, style="bold"), soft_wrap=True)

    def line(self, text: str, style: str = "") -> None:
        """One line, or several, as they are."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def table(self, columns: Iterable[str], rows: Iterable[tuple[str, ...]], right: Iterable[int] = ()) -> None:
        """Rows under column titles; the columns whose numbers are in `right` are aligned to the right."""
        to_the_right = frozenset(right)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for number, title in enumerate(columns):
            table.add_column(title, justify="right" if number in to_the_right else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._console.print(table, soft_wrap=True)

    @asynccontextmanager
    async def live(self, what: str, total: int, tally: Tally) -> AsyncIterator[None]:
        """Show how many of `total` orders have reached a final state, while the block runs."""
        show = self._bar(what, total, tally) if self._console.is_terminal else self._lines(what, total, tally)
        task = asyncio.create_task(show)
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _bar(self, what: str, total: int, tally: Tally) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[states]}"),
        )
        with Progress(*columns, console=self._console, auto_refresh=False) as progress:
            bar = progress.add_task(what, total=total, states="")
            try:
                while True:
                    progress.update(bar, completed=_final(tally), states=states(tally), refresh=True)
                    await asyncio.sleep(_FRAMES_EVERY)
            finally:
                progress.update(bar, completed=_final(tally), states=states(tally), refresh=True)

    async def _lines(self, what: str, total: int, tally: Tally) -> None:
        try:
            while True:
                self._line(what, total, tally)
                await asyncio.sleep(_LINES_EVERY)
        finally:
            self._line(what, total, tally)

    def _line(self, what: str, total: int, tally: Tally) -> None:
        self.line(f"{what}: {_final(tally)} of {total} orders done; {states(tally)}; {tally.events:,} events")


def _final(tally: Tally) -> int:
    return tally.count("cancelled") + tally.count("dispatched")
