"""`python -m services.demo.fleet [--folder DIR] [--data FILE]`: the demo over RabbitMQ. Exit status 1 if something is
wrong, or the demo cannot run.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path

from services.demo.__main__ import DATA, INTERRUPTED, log_to
from services.demo.beside import first_error
from services.demo.fleet.broker import BrokerRefused
from services.demo.fleet.demo import TooFew, perform
from services.demo.fleet.processes import Died, NotReady
from services.demo.fleet.shop import ShopFailed
from services.demo.screen import Screen
from services.importer import BrokenFile
from tidings.errors import TidingsError

STOPPED = (BrokenFile, BrokerRefused, Died, NotReady, OSError, ShopFailed, TidingsError, TooFew)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m services.demo.fleet", description=perform.__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("var/demo-rabbitmq"), help="for a folder per run (%(default)s)"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="orders to import (%(default)s)")
    chosen = parser.parse_args(arguments)
    screen, folder = Screen(), chosen.folder.resolve() / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    try:
        folder.mkdir(parents=True)
        with (folder / "demo.log").open("a", encoding="utf-8") as log:
            log_to(log)
            return 0 if asyncio.run(perform(folder, chosen.data, screen)) else 1
    except KeyboardInterrupt:
        screen.line(
            f"\nInterrupted. All processes were ended; what they left is in {folder}. The next run begins anew."
        )
        return INTERRUPTED
    except (*STOPPED, BaseExceptionGroup) as error:
        cause = first_error(error)
        if not isinstance(cause, STOPPED):
            raise
        screen.line(f"\nStopped: {cause}\nWhat was left is in {folder}. All processes were ended.", style="bold red")
        return 1


if __name__ == "__main__":
    sys.exit(main())
