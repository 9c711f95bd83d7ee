"""One process of a test: services whose handler hangs as its argument says, served with health probes on a free port.

python -m tests.integration.stoppable quick|hang|deaf|thread|block [relay|bare]
"""

from __future__ import annotations

import asyncio
import sys
import time

import structlog

from tidings import Event, Runtime, Service
from tidings.errors import ConfigurationError
from tidings.hosting.serve import serve

log = structlog.get_logger("stoppable")


class Begun(Event, key="key"):
    key: str


def service(name: str, kind: str) -> Service:
    service = Service(name)

    async def hang(event: Begun) -> None:
        log.info("handler.began")
        while kind != "quick":
            if kind == "block":
                time.sleep(600)  # noqa: ASYNC251 - a handler that blocks its loop is what is tested
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                if kind == "hang":
                    raise

    def hang_in_thread(event: Begun) -> None:
        log.info("handler.began")
        time.sleep(600)

    service.on(Begun, name="hang")(hang_in_thread if kind == "thread" else hang)
    return service


async def append(services: list[Service]) -> None:
    while True:
        try:
            for service in reversed(services):  # a start that is interrupted drains nothing
                assert service.running_now is not None
            await services[0].append("begun-1", Begun(key="a"))
            return
        except ConfigurationError:  # not running yet
            await asyncio.sleep(0.02)


async def main(kind: str, relay: bool | None) -> None:
    services = [service(name, kind) for name in ("one", "two")]
    async with asyncio.TaskGroup() as tasks:
        appending = tasks.create_task(append(services))
        await serve(*services, relay=relay, health=0)
        appending.cancel()


async def bare(kind: str) -> None:
    """A script with a runtime that does not handle signals."""
    async with Runtime(service("one", kind)):
        log.info("handler.began")
        await asyncio.sleep(600)


if __name__ == "__main__":
    if sys.argv[2:] == ["bare"]:
        asyncio.run(bare(sys.argv[1]))
    else:
        asyncio.run(main(sys.argv[1], True if sys.argv[2:] == ["relay"] else None))
