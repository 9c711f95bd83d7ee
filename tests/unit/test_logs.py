"""Lines are structured, carry the event they are about, never those of a neighbour, and never a secret."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.embedded import QUICK, Happened, embedded, many, tables
from tidings import Context, Service
from tidings.errors import ConfigurationError
from tidings.logs import configure_logging, masked

pytestmark = pytest.mark.lower_bounds

log = structlog.get_logger("shop")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level, classes = root.handlers, root.level, structlog.get_config()
    try:
        yield io.StringIO()
    finally:
        root.handlers = before
        root.setLevel(level)
        logging.captureWarnings(False)
        structlog.reset_defaults()
        if classes:
            structlog.configure(**classes)


def entries(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_lines_of_structlog_and_of_the_standard_library_are_json_in_one_stream(stream: io.StringIO) -> None:
    configure_logging(stream=stream)
    log.info("stock.reserved", count=3)
    logging.getLogger("uvicorn.error").warning("slow %s", "client")
    log.debug("not shown")
    ours, theirs = entries(stream)
    assert (ours["event"], ours["level"], ours["logger"], ours["count"]) == ("stock.reserved", "info", "shop", 3)
    assert ours["timestamp"].endswith("Z")
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("slow client", "warning", "uvicorn.error")


@pytest.mark.parametrize("as_json", [True, False])
def test_no_password_reaches_the_log(stream: io.StringIO, as_json: bool) -> None:
    configure_logging(json=as_json, stream=stream)
    try:
        password = "hidden"
        raise ConnectionError(f"amqp://user:{password}@host is away")
    except ConnectionError:
        log.exception("bus.lost", urls=["postgresql://user:hidden@db/x"])
        logging.getLogger("other").exception("at amqps://user:hidden@host:1/v")
    assert "hidden" not in stream.getvalue()
    assert "user:***@host" in stream.getvalue()


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("at (amqp://u:hush@h:1/v), again", "at (amqp://u:***@h:1/v), again"),
        ("urls='amqp://u:hush@h/v'\n\tnext", "urls='amqp://u:***@h/v'\n\tnext"),
        ("http://first,amqp://u:hu@sh@h/v", "http://first,amqp:***@h/v"),
        ("=://u:hush@h", "=://u:***@h"),
        ("mail me@home about http://plain/x", "mail me@home about http://plain/x"),
    ],
)
def test_passwords_are_masked_wherever_a_url_stands(said: str, shown: str) -> None:
    assert masked(said) == shown


def test_a_megabyte_made_to_take_long_is_masked_at_once() -> None:
    made = "@" + "a://" * 250_000
    assert masked(made) == made, "it has no password; with a pattern that tries each place this test takes minutes"


def test_an_exception_is_structured_in_json(stream: io.StringIO) -> None:
    configure_logging(stream=stream)
    try:
        raise LookupError("gone")
    except LookupError:
        log.exception("failed")
    (told,) = entries(stream)[0]["exception"]
    assert (told["exc_type"], told["exc_value"]) == ("LookupError", "gone")
    assert told["frames"][0]["name"] == "test_an_exception_is_structured_in_json"


def test_an_unknown_level_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match="debug, info"):
        configure_logging(level="loud")


@pytest.mark.parametrize("threaded", [False, True])
async def test_handlers_side_by_side_never_mix_their_keys(tmp_path: Path, stream: io.StringIO, threaded: bool) -> None:
    configure_logging(stream=stream)
    service = Service("audit", concurrency=8)

    def tell(event: Happened, context: Context) -> None:
        log.info("told", key=event.key, of=str(context.event.id), at=context.position)

    async def turns(event: Happened, context: Context) -> None:
        tell(event, context)
        await asyncio.sleep(0.002)
        tell(event, context)

    service.on(Happened, name="tell")(tell if threaded else turns)
    async with embedded(tmp_path, service) as world:
        await world.append(*many(100, 20))
        await world.settled()
        log.info("outside")
    told = [entry for entry in entries(stream) if entry["event"] == "told"]
    assert len(told) == (100 if threaded else 200)
    for entry in told:
        assert entry["event_id"] == entry["of"]
        assert entry["position"] == entry["at"]
        assert entry["stream"] == f"Happened-{entry['key']}"
        assert (entry["service"], entry["handler"], entry["attempt"]) == ("audit", "tell", 1)
        assert entry["correlation_id"]
    (outside,) = [entry for entry in entries(stream) if entry["event"] == "outside"]
    assert "event_id" not in outside


@pytest.mark.parametrize("kind", ["threaded", "free", "session"])
async def test_each_attempt_is_told_from_the_others_before_and_after_it_waits(
    tmp_path: Path, stream: io.StringIO, kind: str
) -> None:
    configure_logging(stream=stream)
    service = Service("audit", tables=tables)

    def threaded(event: Happened, context: Context) -> None:
        log.info("told", at=context.attempt)
        log.info("told", at=context.attempt)
        if context.attempt < 3:
            raise LookupError("again")

    async def free(event: Happened, context: Context) -> None:
        log.info("told", at=context.attempt)
        await asyncio.sleep(0.001)
        log.info("told", at=context.attempt)
        if context.attempt < 3:
            raise LookupError("again")

    async def session(event: Happened, context: Context, session: AsyncSession) -> None:
        await free(event, context)

    handlers: dict[str, Callable[..., Any]] = {"threaded": threaded, "free": free, "session": session}
    service.on(Happened, name="tell", retry=QUICK)(handlers[kind])
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="a"), Happened(key="b"))
        await world.settled()
    told = [entry for entry in entries(stream) if entry["event"] == "told"]
    assert sorted(entry["at"] for entry in told) == sorted([1, 2, 3] * 4)
    for entry in told:
        assert (entry["service"], entry["handler"], entry["attempt"]) == ("audit", "tell", entry["at"])
        assert entry["event_id"]
        assert entry["stream"]


# ---- where the application configured nothing -----------------------------------------

SCRIPT = """
import asyncio, sys
{configure}
from tidings import Event, Runtime, Service
import structlog

class Noted(Event):
    text: str

notes = Service("notes")

@notes.on(Noted)
async def keep(event: Noted) -> None:
    structlog.get_logger("app").debug("app.debugged")
    structlog.get_logger("app").info("app.told", secret="amqp://u:hush@host")

async def main():
    async with Runtime(notes) as runtime:
        await notes.append("n-1", Noted(text="x"))
        await runtime.settled()
        print("the answer")

asyncio.run(main())
"""


def _run(folder: Path, configure: str = "") -> tuple[str, str]:
    """Return standard output and error of a script that runs a service."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}
    script = SCRIPT.replace("{configure}", configure)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout, done.stderr


def test_a_script_that_configures_nothing_keeps_its_standard_output_to_itself(tmp_path: Path) -> None:
    out, err = _run(tmp_path)
    assert out == "the answer\n"
    told = [json.loads(line) for line in err.splitlines()]
    assert {"service.joined", "app.told"} <= {entry["event"] for entry in told}
    assert {entry["level"] for entry in told} <= {"info", "warning"}
    assert "hush" not in err
    (app,) = [entry for entry in told if entry["event"] == "app.told"]
    assert app["handler"] == "keep"


def test_an_application_that_configured_logging_has_the_lines_there(tmp_path: Path) -> None:
    configure = "import logging; logging.basicConfig(level='WARNING', format='%(name)s|%(message)s')"
    out, err = _run(tmp_path, configure)
    assert (out, err) == ("the answer\n", "")
    out, err = _run(tmp_path, configure.replace("WARNING", "DEBUG"))
    assert out == "the answer\n"
    assert "tidings.partition|" in err or "tidings.running|" in err
    assert "app|" in err
    assert "service.joined" in err
    assert "app.debugged" in err
    assert "hush" not in err


def test_an_application_that_configured_structlog_keeps_its_own(tmp_path: Path) -> None:
    configure = (
        "import structlog; structlog.configure(processors=[structlog.processors.JSONRenderer()], "
        "logger_factory=structlog.PrintLoggerFactory(sys.stdout))"
    )
    out, err = _run(tmp_path, configure)
    assert err == ""
    assert "service.joined" in out
    assert "app.debugged" in out
