"""The demo's output: a progress bar on a terminal, plain lines elsewhere. It decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from services.demo.tally import Tally

__all__ = ["Screen", "states"]

_LINES_EVERY: Final = 1.0
"""Seconds between two lines of progress."""
_FRAMES_EVERY: Final = 0.1
"""Seconds between two frames of the progress bar."""


def states(tally: Tally) -> str:
    """Return how many orders are in each state, as text."""
    words = ("placed", "confirmed", "cancelling", "cancelled", "dispatched")
    return " · ".join(f"{tally.count(word)} {word}" for word in words)


class Screen:
    """The output of one demo."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)

    def heading(self, text: str) -> None:
        """Print the heading of an act."""
        self._console.print()
        self._console.print(Text(text, style="bold"), soft_wrap=True)

    def line(self, text: str, style: str = "") -> None:
        """Print one or several lines as they are."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def table(
        self, rows: Sequence[tuple[str, ...]], *, titles: tuple[str, ...] = (), right: Sequence[int] = ()
    ) -> None:
        """Print rows in columns that are as wide as necessary. Columns whose numbers are in `right` are aligned
        right."""
        everything = [titles, *rows] if titles else list(rows)
        widths = [max(map(len, column)) for column in zip(*everything, strict=True)]
        for row in everything:
            places = zip(row, widths, strict=True)
            cells = (cell.rjust(n) if i in right else cell.ljust(n) for i, (cell, n) in enumerate(places))
            self.line("  ".join(cells).rstrip(), style="dim" if row is titles else "")

    @asynccontextmanager
    async def live(self, what: str, total: int, tally: Tally) -> AsyncIterator[None]:
        """Show how many of `total` orders have reached a final state while the block runs."""
        show = self._bar(what, total, tally) if self._console.is_terminal else self._lines(what, total, tally)
        task = asyncio.create_task(show)
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _bar(self, what: str, total: int, tally: Tally) -> None:
        progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        task = progress.add_task(what, total=total)

        def frame() -> Group:
            progress.update(task, completed=_final(tally))
            return Group(progress, Text(states(tally), style="dim"))

        with Live(frame(), console=self._console, auto_refresh=False) as live:
            try:
                while True:
                    live.update(frame(), refresh=True)
                    await asyncio.sleep(_FRAMES_EVERY)
            finally:
                live.update(frame(), refresh=True)

    async def _lines(self, what: str, total: int, tally: Tally) -> None:
        said = ""
        try:
            while True:
                said = self._news(said, f"{what}: {_final(tally)} of {total} orders done; {states(tally)}")
                await asyncio.sleep(_LINES_EVERY)
        finally:
            self._news(said, f"{what}: {_final(tally)} of {total} orders done; {states(tally)}")

    def _news(self, said: str, text: str) -> str:
        if text != said:
            self.line(text)
        return text


def _final(tally: Tally) -> int:
    return tally.count("cancelled") + tally.count("dispatched")
