"""`tidings` with a fault arranged inside of its process, where no signal from outside could meet the moment.

python -m tests.faults.arranged FAULT[=VALUE]... -- ARGUMENTS OF TIDINGS
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Final

import tidings.buses.rabbitmq.bus as rabbitmq
import tidings.delivery.staged as staged
import tidings.relay.relay as relay
from tidings.cli import main

__all__ = ["FAULTS"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_before_acknowledging(after: str) -> None:
    """Kill the process between the commit of a group and its acknowledgement, after this many deliveries."""
    settle = rabbitmq._Consumer.settle_through

    @wraps(settle)
    def settle_or_die(self: rabbitmq._Consumer, tag: int) -> None:
        if tag >= int(after):
            die()
        settle(self, tag)

    rabbitmq._Consumer.settle_through = settle_or_die  # type: ignore[method-assign]


def dies_before_checkpoint(after: str) -> None:
    """Kill the process when events up to a position are published and confirmed, before the checkpoint says so."""
    store = relay.Relay._store_checkpoint

    @wraps(store)
    async def store_or_die(self: relay.Relay, position: int) -> None:
        if position >= int(after):
            die()
        await store(self, position)

    relay.Relay._store_checkpoint = store_or_die  # type: ignore[method-assign]


def confirm_seconds(value: str) -> None:
    """Change the seconds for which the relay waits for a confirm."""
    relay.Relay.__init__ = _with(relay.Relay.__init__, confirm_seconds=float(value))  # type: ignore[method-assign]


def _with(function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    return wraps(function)(lambda *args, **kwargs: function(*args, **(more | kwargs)))


def clock_file(path: str) -> None:
    """Shift the time of day by the seconds in a file, which may change at any time. `time.monotonic` is not
    affected."""
    real, file = time.time_ns, Path(path)

    def shifted() -> int:
        try:
            return real() + int(file.read_text()) * 10**9
        except (OSError, ValueError):  # it is not there yet, or just being written
            return real()

    time.time_ns = shifted
    time.time = lambda: shifted() / 1e9


def trusts_its_database(_: str) -> None:
    """Take events that the database does not know for new, without looking into the log."""
    staged.Stager._is_new_to_log = lambda self, staged: True  # type: ignore[method-assign]


FAULTS: Final[dict[str, Callable[[str], None]]] = {
    "dies-before-acknowledging": dies_before_acknowledging,
    "dies-before-checkpoint": dies_before_checkpoint,
    "confirm-seconds": confirm_seconds,
    "clock-file": clock_file,
    "trusts-its-database": trusts_its_database,
}


def run(arguments: list[str]) -> None:
    end = arguments.index("--")
    for argument in arguments[:end]:
        name, _, value = argument.partition("=")
        FAULTS[name](value)
    sys.argv = ["tidings", *arguments[end + 1 :]]
    main()


if __name__ == "__main__":
    run(sys.argv[1:])
