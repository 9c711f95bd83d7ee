"""`tidings run`, `relay`, `dev`: serve until Ctrl-C or SIGTERM, then drain. A second Ctrl-C ends them at once."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final

import structlog
import typer

from tidings._support.escaping import plain_lines
from tidings._support.tasks import leading, supervised
from tidings.buses import Subscription
from tidings.cli._exits import DEFECT, INTERRUPTED, OK, USAGE, Refused, answering, code_of, complain
from tidings.cli._find import find, find_service, find_services, is_application
from tidings.service import Service
from tidings.settings import DEBUG, OTHER_VARIABLES, Settings
from tidings.urls import redact

__all__ = ["dev", "relay", "run"]

PARTING_SECONDS: Final = 0.25
"""Seconds that a drained process has to end by itself."""

Level = Annotated[str, typer.Option("--log-level", help="debug, info, warning, error.")]
Health = Annotated[
    str | None,
    typer.Option(
        "--health", metavar="[HOST:]PORT", help="Answer /live and /ready there; by default, HOST is 127.0.0.1."
    ),
]
Leash = Annotated[bool, typer.Option("--leash", hidden=True, help="End when standard input ends.")]


@answering
def run(
    target: Annotated[str, typer.Argument(metavar="MODULE:SERVICE", help="A Service, or an ASGI application.")],
    reload: Annotated[bool, typer.Option("--reload", help="Start again when a .py file below here changes.")] = False,
    host: Annotated[str, typer.Option(help="Address of an ASGI application.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of an ASGI application.")] = 8000,
    health: Health = None,
    level: Level = "info",
    leash: Leash = False,
) -> int:
    """Run a service, or a web application around one, until Ctrl-C or SIGTERM.

    MODULE alone is enough if it has exactly one Service. With an embedded bus, the relay runs here, too. Over a
    network, it is a process of its own: tidings relay.
    """
    if reload:
        from tidings.cli._reload import serve_with_reload

        options = [f"--host={host}", f"--port={port}", f"--log-level={level}"]
        options += [] if health is None else [f"--health={health}"]
        return serve_with_reload(["run", *options, "--", target])
    _begin(level, leash)
    found = find(target)
    if isinstance(found, Service):
        from tidings.hosting.serve import serve

        return _serve(serve(found, settings=Settings(), health=_port(health)))
    if not is_application(found):
        find_service(target)  # raises an error with what it is, and the services that there are
        raise Refused(USAGE, f"{target!r} is neither a tidings.Service nor an ASGI application")
    if health is not None:
        raise Refused(
            USAGE,
            f"--health is for services. Add the routes of tidings.health_routes to the application {target!r}",
        )
    from tidings.cli._web import serve_application

    return _serve(serve_application(found, host, port))


@answering
def relay(
    name: Annotated[
        str, typer.Option(help="Relays with one name take turns; each name has its own checkpoint.")
    ] = "main",
    health: Health = None,
    level: Level = "info",
) -> int:
    """Carry events from the log to the bus until Ctrl-C or SIGTERM. A second relay with the same name stands by."""
    _begin(level, False)
    settings = Settings()
    if settings.embedded_bus:
        raise Refused(
            USAGE,
            f"TIDINGS_BUS is {redact(settings.bus)}: it does not reach other processes, so the relay runs where the "
            "services run. Set TIDINGS_BUS=amqp://user:password@host:5672/vhost to run it by itself",
        )
    return _serve(_relaying(settings, name, _port(health)))


async def _relaying(settings: Settings, name: str, health: int | str | None) -> None:
    from tidings.cli._acquainted import compare_logs
    from tidings.hosting.serve import serve

    async def queues() -> list[Subscription]:
        from tidings.operations.looking import subscriptions_of

        try:
            services = await asyncio.to_thread(find_services, (), settings, needed=False)
        except Exception as error:  # the services' code need not be installed here
            structlog.get_logger("tidings.relay").debug("relay.services_unknown", error=str(error))
            return []
        return [part for service in services.values() for part in await subscriptions_of(settings, service)]

    async with supervised(compare_logs(settings, name)):
        await serve(settings=settings, relay=name, health=health, queues=queues)


@answering
def dev(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODULE:SERVICE|APPLICATION", help="Services and web applications; by default TIDINGS_SERVICES."
        ),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where log and databases are kept.", file_okay=False)] = Path(),
    reload: Annotated[bool, typer.Option(help="Start again when a .py file below here changes.")] = True,
    host: Annotated[str, typer.Option(help="Address of web applications.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the first web application; others get the next ports.")
    ] = 8000,
    health: Health = None,
    level: Level = "info",
    leash: Leash = False,
) -> int:
    """Run services, web applications and the relay in one process, embedded, and start again when a .py file changes.

    Nothing needs to be installed: TIDINGS_STORE, TIDINGS_BUS and TIDINGS_DATABASE are ignored. A web application with
    a service's lifespan starts that service itself: do not name it again.
    """
    if reload:
        from tidings.cli._reload import serve_with_reload

        options = [f"--folder={folder}", "--no-reload", f"--host={host}", f"--port={port}", f"--log-level={level}"]
        options += [] if health is None else [f"--health={health}"]
        return serve_with_reload(["dev", *options, "--", *(targets or ())])
    _begin(level, leash)
    from tidings.hosting.serve import serve

    named = Settings().services
    here = folder.absolute()
    here.mkdir(parents=True, exist_ok=True)
    settings = _embedded(here, named)
    applications: dict[str, object] = {}
    services: list[str] = []
    for target in targets or settings.service_names:
        found = find(target)
        if isinstance(found, Service) or not is_application(found):
            services.append(target)
        else:
            applications[target] = found
    chosen = find_services(services, settings) if services or not applications else {}
    beside = []
    if applications:
        from tidings.cli._web import application_beside

        for nth, application in enumerate(applications.values()):
            beside.append(application_beside(application, host, port and port + nth))
    return _serve(serve(*chosen.values(), settings=settings, health=_port(health), beside=beside))


def _embedded(folder: Path, services: str | None) -> Settings:
    """Return the settings of everything in this process. Web applications find the same in the environment."""
    kept = {"TIDINGS_SERVICES", DEBUG}
    for name in [name for name in os.environ if name.startswith("TIDINGS_") and name not in kept]:
        if not name.startswith(OTHER_VARIABLES):
            del os.environ[name]
    os.environ["TIDINGS_STORE"] = f"sqlite:///{folder / 'tidings.db'}"
    os.environ["TIDINGS_DATABASE"] = f"sqlite:///{folder}/{{service}}.db"
    return Settings(services=services)


def _port(health: str | None) -> int | str | None:
    return int(health) if health is not None and health.isdecimal() else health


def _begin(level: str, leash: bool) -> None:
    from tidings.logs import configure_logging

    configure_logging(level=level)
    logging.getLogger().addHandler(_HasLogged())
    if leash:
        threading.Thread(target=_hold_on, name="leash", daemon=True).start()


def _hold_on() -> None:
    """End this process when the one that started it has ended: then its standard input ends, too."""
    # Do not read sys.stdin: its lock, if held here, would abort the interpreter at its end.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


class _HasLogged(logging.Handler):
    """A handler that notes whether the process has logged anything: then its end is logged, too."""

    anything = False

    def emit(self, record: logging.LogRecord) -> None:
        _HasLogged.anything = True


def _end(error: BaseException) -> int:
    """Tell why the process ends, and return the exit code.

    If the process has logged before, this is a line of the log. An unexpected error comes with its traceback.
    """
    cause = leading(error)
    code = code_of(cause)
    if sys.stderr.isatty() or code == INTERRUPTED or (code != DEFECT and not _HasLogged.anything):
        if code == DEFECT:
            print(plain_lines("".join(traceback.format_exception(cause)).rstrip()), file=sys.stderr)
        return complain(error)
    facts: dict[str, Any] = {"error": f"{type(cause).__name__}: {cause}", "exit_code": code}
    if code == DEFECT or os.environ.get(DEBUG):
        facts["exception"] = "".join(traceback.format_exception(cause))[-20_000:]
    structlog.get_logger("tidings.process").critical("process.failed", **facts)
    return code


def _serve(work: Coroutine[Any, Any, None]) -> int:
    """Run to the end, and return the exit code."""
    code = OK
    runner = asyncio.Runner()
    try:
        runner.run(work)
    except (Exception, KeyboardInterrupt) as error:
        code = _end(error)
    # Everything is drained, or abandoned and named in the log; or a service has died. A handler that catches every
    # cancellation, or blocks its thread, could still keep the process from ending: end it without waiting for that.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    last_resort = threading.Timer(PARTING_SECONDS, os._exit, (code,))
    last_resort.daemon = True
    last_resort.start()
    runner.close()
    return code
