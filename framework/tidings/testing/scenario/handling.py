"""What a handler does with one event, and the checks that a test makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tidings.delivery import attempt
from tidings.errors import ConfigurationError
from tidings.modelling.codec import OWN_KEYS, decode, read_metadata
from tidings.modelling.events import Event
from tidings.modelling.handlers import Handler
from tidings.service import Service
from tidings.stores import RecordedEvent
from tidings.testing.scenario.context import RecordingContext
from tidings.testing.scenario.decided import check_raised
from tidings.testing.scenario.differences import Item, events_differ, rows_differ
from tidings.testing.scenario.finding import aggregates
from tidings.testing.scenario.stage import Stage, stage_of, view_of
from tidings.testing.scenario.stating import Emitted, Expected, Raw, raw, stated
from tidings.testing.scenario.unchecked import checked, unchecked

__all__ = ["Handling", "Task"]

Row = dict[str, Any]


class Task(NamedTuple):
    """What is to be run: a handler, its event, and what was before."""

    service: Service
    handler: Handler
    before: Sequence[tuple[str, Event | Raw] | sa.Executable]
    stream: str
    event: Event | Raw
    metadata: Mapping[str, Any] | None
    resources: Mapping[type, Any]
    attempt: int
    replayed: bool


class Handling:
    """One attempt of a handler, and the checks of what came of it.

    Without a running event loop, the first check or look runs the handler. In an async test, await the last check
    (`await given(...).handling(...).emits(...)`), or enter it with `async with`, which gives a `session`, too.
    """

    def __init__(self, task: Task) -> None:
        self._task: Final = task
        self._checks: list[Callable[[Handling], None]] = []
        self._stack = AsyncExitStack()
        self._stage: Stage | None = None
        self._context: RecordingContext | None = None
        self._session: AsyncSession | None = None
        self._error: BaseException | None = None
        self._emitted: list[Emitted] = []
        self._rows: dict[str, list[Row]] = {}
        self._looked = False
        """The test has looked at the handler's exception, or has been given it."""
        self._number = unchecked(
            f"handler {task.handler.name!r} was never run: 'await given(...).handling(...)' with its checks, or in a "
            "test that is not async, add .emits(...), .nothing() or .raises(...)"
        )

    # ---- checks ------------------------------------------------------------------------

    def emits(self, *events: Expected) -> Self:
        """Compare what was appended because of the handler: by `context.emit`, by `context.change`, by a repository.

        All events are compared, in order and field by field: first those of changes, which are appended at once, then
        the emitted ones. An event may be given with its stream: `("reservation-1", StockReserved(...))`. If the handler
        failed, its exception passes through.
        """
        __tracebackhide__ = True
        return self._check(partial(Handling._compare_events, expected=events))

    def nothing(self) -> Self:
        """Compare: nothing was appended, and the handler did not fail. It may have changed rows: see `leaves`."""
        __tracebackhide__ = True
        return self.emits()

    def leaves(self, table: Any, *rows: Mapping[str, Any]) -> Self:
        """Compare all rows of a table (or declarative class) with these, in any order, column by column. If the handler
        failed, its exception passes through, except after `raises`."""
        __tracebackhide__ = True
        return self._check(partial(Handling._compare_rows, table=table, rows=rows))

    def raises(self, error: type[Exception] | tuple[type[Exception], ...], *, match: str | None = None) -> Self:
        """Compare: the handler failed with this exception, and `match`, a regular expression, is found in its text.
        Another exception passes through. Its effects on the database are undone."""
        __tracebackhide__ = True
        return self._check(partial(Handling._compare_error, error=error, match=match))

    # ---- looking -----------------------------------------------------------------------

    @property
    def emitted(self) -> list[Emitted]:
        """What was appended because of the handler, oldest first."""
        __tracebackhide__ = True
        self._ran_well()
        return self._emitted

    @property
    def error(self) -> BaseException | None:
        """What the handler failed with."""
        self._ran()
        self._looked = True
        return self._error

    @property
    def context(self) -> RecordingContext:
        """The context that the handler was given."""
        __tracebackhide__ = True
        self._ran_well()
        assert self._context is not None
        return self._context

    def rows(self, table: Any) -> list[Row]:
        """Return all rows of a table (or declarative class) of the service, as they were after the handler."""
        __tracebackhide__ = True
        self._ran_well()
        found = getattr(table, "__table__", table)
        if found.key not in self._rows:
            known = ", ".join(self._rows) or "none"
            raise ConfigurationError(
                f"table {found.key!r} is none of service {self._task.service.name!r}, whose tables are: {known}"
            )
        return self._rows[found.key]

    @property
    def session(self) -> AsyncSession:
        """A session on the service's database, within `async with`."""
        if self._stage is None:
            raise ConfigurationError("session is there only within 'async with given(...).handling(...) as handled:'")
        if self._session is None:
            self._session = AsyncSession(self._stage.database.engine, expire_on_commit=False)
            self._stack.push_async_callback(self._session.close)
        return self._session

    # ---- running -----------------------------------------------------------------------

    def __await__(self) -> Generator[Any, None, Self]:
        return self._whole().__await__()

    async def __aenter__(self) -> Self:
        await self._run()
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        __tracebackhide__ = True
        self._stage = None
        await self._stack.aclose()
        if error is None:
            self._pass_on()

    async def _whole(self) -> Self:
        async with self:
            self._look()
        return self

    async def _alone(self) -> None:
        async with self._stack:
            await self._run()

    def _check(self, check: Callable[[Handling], None]) -> Self:
        __tracebackhide__ = True
        if self._context is not None:
            check(self)
            return self
        self._checks.append(check)
        if not _loop_runs():
            self._run_alone()
            self._look()
        return self

    def _run_alone(self) -> None:
        __tracebackhide__ = True
        asyncio.run(self._alone())
        self._stage = None

    def _look(self) -> None:
        __tracebackhide__ = True
        for check in self._checks:
            check(self)

    def _ran(self) -> None:
        """Run the handler, if it has not run and there is no event loop."""
        if self._context is not None:
            return
        if _loop_runs():
            raise ConfigurationError(
                f"handler {self._task.handler.name!r} has not run yet: 'await given(...).handling(...)', or enter it "
                "with 'async with'"
            )
        self._run_alone()

    def _ran_well(self) -> None:
        """Do what `_ran` does. What the handler raises when it is run for this passes through."""
        __tracebackhide__ = True
        if self._context is None:
            self._ran()
            self._pass_on()

    async def _run(self) -> None:
        task = self._task
        checked(self._number)
        if self._context is not None:
            raise ConfigurationError(f"handler {task.handler.name!r} has run: begin again with given(...)")
        try:
            self._stage = stage = await self._stack.enter_async_context(stage_of(task.service, task.resources))
            for one in task.before:
                if not isinstance(one, tuple):
                    await stage.execute(one)
            for one in task.before:
                if isinstance(one, tuple):
                    await stage.append(*one)
                    await stage.catch_up()  # before the next one is there: a handler must not read what came later
            event = await stage.append(task.stream, task.event, task.metadata)
            self._context, error = await stage.attempt(task.handler, event, task.attempt, task.replayed)
            self._error = error and error.with_traceback(_of_handler(error.__traceback__))
            self._emitted = [self._typed(row) for row in await stage.after(event.position)]
            await self._snapshot(stage)
        except BaseException:
            await self._stack.aclose()
            raise

    async def _snapshot(self, stage: Stage) -> None:
        tables = self._task.service.tables
        async with stage.database.reading() as connection:
            for table in () if tables is None else tables.sorted_tables:
                result = await connection.execute(sa.select(table))
                self._rows[table.key] = [dict(row) for row in result.mappings()]

    def _typed(self, row: RecordedEvent) -> Emitted:
        """Return an appended event as its class, by the service, or by an aggregate with this stream."""
        metadata = read_metadata(row)
        own = {name: value for name, value in metadata.items() if not name.startswith("$") and name not in OWN_KEYS}
        category = row.stream.partition("-")[0]
        assert self._context is not None
        noted = [type(each.event) for each in self._context.emitted if isinstance(each.event, Event)]
        for kind in aggregates():
            if kind.__tidings__.category == category:
                noted += kind.__tidings__.evolutions
        view = view_of(noted, row.type) or self._task.service.view(row.type)
        if view is None:
            return Emitted(row.stream, raw(row), own)
        return Emitted(row.stream, decode(row, view, metadata, reader="the test"), own)

    # ---- comparing ---------------------------------------------------------------------

    def _compare_events(self, expected: Sequence[Expected]) -> None:
        __tracebackhide__ = True
        self._pass_on()
        wanted = [Item(one[0] if isinstance(one, tuple) else None, stated(one)[1]) for one in expected]  # type: ignore[arg-type]
        found = [Item(each.stream, each.event) for each in self._emitted]
        if text := events_differ(wanted, found, f"{self._task.handler.name} emitted"):
            raise AssertionError(text)

    def _compare_rows(self, table: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        __tracebackhide__ = True
        self._pass_on()
        found = getattr(table, "__table__", table)
        keys = [column.key for column in found.primary_key]
        if text := rows_differ(found.name, keys, rows, self.rows(table)):
            raise AssertionError(text)

    def _compare_error(self, error: type[Exception] | tuple[type[Exception], ...], match: str | None) -> None:
        __tracebackhide__ = True
        self._looked = True
        emitted = ", ".join(repr(each.event) for each in self._emitted) or "nothing"
        check_raised(self._error, error, match, f"{self._task.handler.name} raised nothing, and emitted {emitted}")

    def _pass_on(self) -> None:
        """Raise what the handler raised, unless the test has looked at it."""
        __tracebackhide__ = True
        if self._error is not None and not self._looked:
            self._looked = True
            raise self._error


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _of_handler(trace: TracebackType | None) -> TracebackType | None:
    """Return the traceback from the handler on, without the frames of the attempt around it."""
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == attempt.__file__:
        trace = trace.tb_next
    return trace
