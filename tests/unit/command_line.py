"""The command line in this process, for tests: what a command printed and how it ended, with logging left as it was."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from typer.testing import CliRunner

from tests.integration.databases import database_url
from tidings import Context, Event, Service, Settings
from tidings.cli._app import app
from tidings.hosting.runtime import Runtime
from tidings.modelling.handlers import Hold, Retry

__all__ = [
    "Ended",
    "OrderCreated",
    "Poisoned",
    "Unlucky",
    "holding",
    "invoke",
    "other",
    "pytest_in",
    "run_holding",
    "run_shop",
    "shop",
]

ROOT = Path(__file__).parents[2]


def pytest_in(folder: Path) -> str:
    """Run the tests in a folder, which may import this project's. Return what pytest prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TIDINGS_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "-W", "error", "."],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    return done.stdout


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@contextmanager
def _logging_kept() -> Iterator[None]:
    root, configured, config = logging.getLogger(), structlog.is_configured(), structlog.get_config()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers, root.level = handlers, level
        if configured:
            structlog.configure(**config)
        else:
            structlog.reset_defaults()


def _runner() -> CliRunner:
    """Return a runner. Click before 8.2 mixes standard error into the output unless told otherwise."""
    options: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
    return CliRunner(**options)


def invoke(*arguments: str, input: str | bytes | None = None) -> Ended:
    """Run `tidings ARGUMENTS` without a terminal."""
    with _logging_kept():
        result = _runner().invoke(app, list(arguments), input=input, prog_name="tidings")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


# ---- services that the tests name as tests.unit.command_line:shop ------------------------


class OrderCreated(Event):
    order_id: str


class Poisoned(Event):
    pass


shop = Service("shop")
other = Service("other")


@shop.on(OrderCreated)
async def take(event: OrderCreated, context: Context) -> None:
    """Do nothing, successfully."""


@shop.on(Poisoned, retry=Retry(attempts=1, permanent=(ValueError,)))
async def die(event: Poisoned) -> None:
    """Fail, so that the event becomes a dead letter."""
    raise ValueError("it is \x1b[31mpoison")


def run_shop(folder: Path, *events: tuple[str, Event]) -> None:
    """Run `shop` embedded in a folder until these events are settled, too."""

    async def work() -> None:
        settings = Settings(store=f"sqlite:///{folder}/tidings.db", bus="memory://", database=database_url(folder))
        async with Runtime(shop, settings=settings) as runtime:
            for stream, event in events:
                await shop.append(stream, event)
            await runtime.settled()

    _run(work())


def _run(work: Coroutine[Any, Any, None]) -> None:
    with structlog.testing.capture_logs():
        asyncio.run(work)


class Unlucky(Event, key="name"):
    name: str
    error: str = ""


holding = Service("holding")


@holding.on(Unlucky, retry=Retry(attempts=1, hold=Hold(delay=3600.0, maximum=3600.0)))
async def try_it(event: Unlucky) -> None:
    if event.error:
        raise {"value": ValueError, "key": KeyError}[event.error](f"{event.name} \x1b[31mis unlucky")


def run_holding(folder: Path, *events: tuple[str, Event], held: int) -> None:
    """Run `holding` embedded in a folder until it holds this many events and has nothing else to do."""

    async def work() -> None:
        settings = Settings(store=f"sqlite:///{folder}/tidings.db", bus="memory://", database=database_url(folder))
        async with asyncio.timeout(30), Runtime(holding, settings=settings) as runtime:
            for stream, event in events:
                await holding.append(stream, event)
            while True:
                (report,) = (await runtime.verify()).services
                if report.held_count == held and not report.pending_count and report.unmarked < 0:
                    break
                await asyncio.sleep(0.02)

    _run(work())
