"""A process that serves until a signal ends it: services, a relay, health answers, and what runs beside them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import structlog

from tidings.hosting.collector import spared_by_the_collector
from tidings.hosting.hosted import Hosted
from tidings.hosting.runtime import Runtime
from tidings.hosting.signals import StopSignals
from tidings.logs import configure_logging
from tidings.relay.refusals import Queues
from tidings.settings import Settings
from tidings.urls import redact

__all__ = ["serve"]

log = structlog.get_logger("tidings.runtime")


async def serve(
    *services: Hosted,
    settings: Settings | None = None,
    relay: bool | str | None = None,
    health: int | str | None = None,
    beside: Sequence[AbstractAsyncContextManager[object]] = (),
    queues: Queues | None = None,
) -> None:
    """Run services until SIGINT or SIGTERM, then drain and return; that takes less than 5 seconds, whatever hangs.

    A second signal ends the process at once, with 130 or 143. `relay` and `queues` as for `Runtime`:
    `serve(relay=True)` is the relay's own process on a networked bus. `health` is a port of 127.0.0.1, or `host:port`,
    that answers `/live` and `/ready` (see `probes`). `beside` are entered after the services and left before them.
    Where structlog is not configured yet, this does it (`tidings.logs`). For the main thread; raises
    `ConfigurationError`, `LogChanged`, `LogBehind`, and `StoreUnavailable` or `DatabaseUnavailable` where waiting does
    not help.
    """
    if not structlog.is_configured():
        configure_logging()
    runtime = Runtime(*services, settings=settings, relay=relay, queues=queues)
    with StopSignals(runtime.unfinished) as signals:
        async with AsyncExitStack() as stack:
            address = None
            if health is not None:
                from tidings.hosting.gathering import Probe
                from tidings.hosting.probes import answering

                address = await stack.enter_async_context(answering(Probe(services, runtime), health))
            _introduce(services, runtime, address)
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout(0 if signals.requested.is_set() else None) as start:
                    signals.on_request = lambda: start.reschedule(loop.time())
                    await stack.enter_async_context(runtime)
                    for other in beside:
                        await stack.enter_async_context(other)
            except TimeoutError:
                if not start.expired():
                    raise
            finally:
                signals.on_request = lambda: None
            with spared_by_the_collector():
                await signals.requested.wait()
    log.info("process.stopped", services=[service.name for service in services])


def _introduce(services: tuple[Hosted, ...], runtime: Runtime, health: str | None) -> None:
    """The one line that says what this process works on; it comes before anything that may have to be waited for."""
    settings = runtime.settings
    if not services:
        following = "events are published as they are appended; Ctrl-C or SIGTERM drains"
    elif runtime.with_relay:
        following = "events are handled as they are appended; Ctrl-C or SIGTERM drains"
    else:
        following = "start a relay of this store and bus if there is none; Ctrl-C or SIGTERM drains"
    log.info(
        "process.starting",
        services=[service.name for service in services],
        relay=runtime.with_relay,
        store=redact(settings.store),
        bus=redact(settings.bus),
        databases=[redact(settings.database_of(service.name)) for service in services],
        health=health,
        next=following,
    )
