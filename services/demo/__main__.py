"""`python -m services.demo [--folder DIR] [--data FILE]`: run the demo. Exit status 1 if an invariant is broken."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Final, TextIO

import structlog

from services.demo.demo import perform
from services.demo.screen import Screen
from services.demo.stage import LEDGER
from services.importer import BrokenFile
from tidings.errors import TidingsError

DATA: Final = Path(__file__).parents[1] / "data" / "online-retail.csv"
INTERRUPTED: Final = 130
"""Exit status of a program that was stopped by Ctrl-C."""


def main(arguments: list[str] | None = None) -> int:
    """Run the demo. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m services.demo", description=perform.__doc__)
    parser.add_argument("--folder", type=Path, default=Path("var/demo"), help="where everything is kept (%(default)s)")
    parser.add_argument("--data", type=Path, default=DATA, help="orders to import (%(default)s)")
    chosen = parser.parse_args(arguments)
    screen, folder = Screen(), chosen.folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["PAYMENT_LEDGER"] = str(folder / LEDGER)
        with (folder / "demo.log").open("a", encoding="utf-8") as log:
            log_to(log)
            return 0 if asyncio.run(perform(folder, chosen.data, screen)) else 1
    except KeyboardInterrupt:
        screen.line(f"\nInterrupted. What was done is kept in {folder}: run it again, and it continues there.")
        return INTERRUPTED
    except (BrokenFile, OSError, TidingsError) as error:
        screen.line(f"\nStopped: {error}\nThe log is {folder / 'demo.log'}.", style="bold red")
        return 1


def log_to(file: TextIO) -> None:
    """Write the services' logs to a file as JSON lines, so that the screen stays readable."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file),
    )


if __name__ == "__main__":
    sys.exit(main())
