"""How soon events get through again after the broker was restarted: several restarts, the worst counts.

    python -m tests.benchmarks.bench_recovery

Relay and service are processes, as users start them, and events are appended all the time. The clock starts when the
broker's port takes a client again, and stops at the first effect after it.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import pytest

from tests.benchmarks.path import quiet
from tests.faults.broker_night import answers_again, first_effect
from tests.faults.stage import Stage
from tidings.testing.brokers import RabbitMQNode, node_for_tests

RESTARTS, LIMIT = 4, 3.0
EVENTS = 100
"""Effects before each restart."""


async def measure(node: RabbitMQNode, folder: Path) -> int:
    found = []
    async with node.isolated() as url:
        with Stage(folder, url) as stage:
            stage.relay()
            stage.service()
            async with stage.traffic():
                for _ in range(RESTARTS):
                    await stage.handles(EVENTS)
                    await asyncio.to_thread(node.stop)
                    found.append(await first_effect(stage, await answers_again(node)))
            events = await stage.keeps_promises()
    shown = ", ".join(f"{seconds:.2f}" for seconds in found)
    print(
        f"broker restarted {RESTARTS} times under {events:,} events: first one handled {shown} s after it answered, "
        f"worst {max(found):.2f} s (limit {LIMIT:g}) {'ok' if max(found) <= LIMIT else 'MISSED'}"
    )
    return int(max(found) > LIMIT)


def main() -> int:
    """Run the benchmark. Return exit status 1 when the limit is missed."""
    quiet()
    try:
        with node_for_tests() as node, tempfile.TemporaryDirectory() as folder:
            return asyncio.run(measure(node, Path(folder)))
    except (pytest.skip.Exception, pytest.fail.Exception) as missing:
        print(f"NOT MEASURED: {missing}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
