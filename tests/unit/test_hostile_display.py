"""Whatever stands in an event, no command and no line of the log lets it steer a terminal or forge a line."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import structlog
import typer
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.command_line import Ended, invoke
from tidings import Context, EventData, Runtime, Service, Settings, open_store
from tidings._support.escaping import plain_lines
from tidings.buses import Subscription, TopologyItem
from tidings.cli._app import app
from tidings.errors import StoreUnavailable
from tidings.logs import configure_logging
from tidings.modelling.events import Event, wire_name
from tidings.modelling.handlers import Hold, Retry
from tidings.stores import ANY

EVIL: Final = (
    "\x1b]0;owned\x07\x1b[2J\x1b[31m\r\n2026-01-01T00:00:00Z [info] forged\x9b1A\x85\u202eeslaf\u2066\u2028\x08\x7f"
)
"""Text that sets a title, clears, colours, forges a line, moves up (C1), breaks lines, reverses, isolates and
deletes."""
JSON_OF_EVIL: Final = json.dumps({"text": EVIL, EVIL: [EVIL]}, ensure_ascii=False).encode()
OBEYED: Final = "\x1b\x07\r\x9b\x85\u202e\u2066\u2028\x08\x7f"


class Dies(Event, name=f"Dies{EVIL}"):
    pass


class Waits(Event, name=f"Waits{EVIL}"):
    pass


class Unhandled(Event, name=f"Unhandled{EVIL}"):
    pass


shop = Service("shop")


@shop.on(Dies, retry=Retry(attempts=1, hold=None, permanent=(ValueError,)))
async def die(event: Dies) -> None:
    raise ValueError(EVIL)


@shop.on(Waits, retry=Retry(attempts=1, hold=Hold(delay=10_000)))
async def wait(event: Waits, context: Context) -> None:
    structlog.get_logger("shop").warning(EVIL, said=EVIL, of=context.metadata)
    raise ValueError(EVIL)


class EvilBus:
    """A broker's message about a queue may quote arguments that somebody else gave it."""

    async def inspect(self, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        names = [("exchange", "tidings.events"), *(("queue", wanted.queue) for wanted in subscriptions)]
        return [TopologyItem("queue" if kind == "queue" else "exchange", name, "differs", EVIL) for kind, name in names]

    async def provision(self, subscription: Subscription) -> None:
        """Return the text unchanged."""


@asynccontextmanager
async def evil_bus(url: str) -> AsyncIterator[EvilBus]:
    yield EvilBus()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose log, dead letters and held events are full of hostile text."""
    folder = tmp_path_factory.mktemp("evil")
    settings = Settings(
        store=f"sqlite:///{folder}/tidings.db", bus="memory://evil", database=f"sqlite:///{folder}/{{service}}.db"
    )

    async def work() -> None:
        async with Runtime(shop, settings=settings) as runtime:
            metadata = JSON_OF_EVIL[:-1] + b',"partitionKey":' + json.dumps(EVIL, ensure_ascii=False).encode() + b"}"
            for kind in (Dies, Waits, Unhandled):
                for data in (b'{"text":' + json.dumps(EVIL).encode() + b"}", JSON_OF_EVIL, EVIL.encode()):
                    event = EventData(wire_name(kind), data, metadata if kind is Unhandled else b"")
                    await runtime.store.append(f"order-{kind.__name__}{EVIL}", [event], expected=ANY)
            async with asyncio.timeout(30):
                while (report := await runtime.verify()).services[0].pending_count:
                    await asyncio.sleep(0.01)
            assert report.services[0].dead_count
            assert report.services[0].held_count

    with structlog.testing.capture_logs():
        asyncio.run(work())

    async def afterwards() -> None:
        async with open_store(settings.store) as store:  # what status and verify call pending, and late
            await store.append(f"order-Dies{EVIL}", [EventData(wire_name(Dies), JSON_OF_EVIL)], expected=ANY)

    asyncio.run(afterwards())
    return folder


@pytest.fixture(autouse=True)
def inside(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STORE", "BUS", "DATABASE", "DEBUG"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.setenv("TIDINGS_SERVICES", f"{__name__}:shop")
    monkeypatch.chdir(world)


SHOWN: Final[dict[str, list[list[str]]]] = {
    "streams list": [["--category=order"], []],
    "streams show": [[f"order-{name}{EVIL}"] for name in ("Dies", "Waits", "Unhandled")],
    "streams tail": [[], [f"order-Unhandled{EVIL}"]],
    "dead list": [[]],
    "dead show": [["1"]],
    "held list": [[], ["--error=forged", "--limit=1"]],
    "held show": [[f"order-Waits{EVIL}@0"]],
    "skip": [[f"order-{name}{EVIL}@0", "--dry-run"] for name in ("Dies", "Waits")],
    "status": [[]],
    "verify": [[], ["--deep"]],
    "why": [[f"order-{name}{EVIL}@1"] for name in ("Dies", "Waits", "Unhandled")],
    "replay": [["shop", "--from=0", "--dry-run"]],
    "topology plan": [[]],
    "topology diff": [[]],
    "topology apply": [[]],
}
"""Commands that show events, or texts about them."""
SILENT: Final = {
    "run",
    "relay",
    "dev",
    "server",
    "keys new",
    "keys names",
    "keys forget",
    "streams append",
    "dead retry",
    "dead drop",
    "held retry",
    "held skip",
    "held drop",
    "log show",
    "log renew-identity",
    "log adopt",
    "backup",
    "restore",
    "topology export",
    "partitions",
    "simulate",
    "new",
    "add service",
    "capture",
}
"""Commands that show only numbers of events. Other tests look at the logs of commands that serve, and at `capture`,
which prints Python."""


def commands(of: Any, name: str = "") -> Iterator[str]:
    if not hasattr(of, "commands"):
        yield name
        return
    for part, inner in of.commands.items():
        yield from commands(inner, f"{name} {part}".strip())


def test_of_every_command_it_is_known_whether_it_shows_events() -> None:
    found = set(commands(typer.main.get_command(app)))
    assert found == SHOWN.keys() | SILENT, "a new command: show it evil events here, or say that it shows none"


def safe(ended: Ended) -> None:
    for said in (ended.out, ended.err):
        assert not set(OBEYED) & set(said)
        assert all(line.isprintable() for line in said.split("\n"))
        assert not any(line.startswith("2026-01-01T00:00:00Z [info] forged") for line in said.split("\n"))


@pytest.mark.parametrize("json_too", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize(
    ("command", "arguments"),
    [(command, arguments) for command, variants in SHOWN.items() for arguments in variants],
    ids=lambda value: value if isinstance(value, str) else ascii("".join(value))[1:12],
)
def test_a_command_escapes_what_events_hold(
    command: str, arguments: list[str], json_too: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command.startswith("topology") or command == "status":
        monkeypatch.setenv("TIDINGS_BUS", "amqp://host")
        monkeypatch.setenv("TIDINGS_DATABASE", "sqlite:///{service}.db")
        monkeypatch.setattr(f"tidings.cli.{command.split()[0]}.open_bus", evil_bus)
    ended = invoke(*command.split(), *json_too, *arguments)
    safe(ended)
    assert "forged" in ended.out, "it is shown, escaped"
    assert ended.code in (0, 1)


@pytest.mark.parametrize("name", ["Dies", "Waits"])
def test_a_captured_test_escapes_what_events_hold(name: str) -> None:
    ended = invoke("capture", f"order-{name}{EVIL}@1")
    safe(ended)
    assert "forged" in ended.out, "it is stated, escaped"
    assert ended.code == 0
    compile(ended.out, "test_it.py", "exec")


@pytest.mark.parametrize(
    "arguments",
    [
        ["streams", "show", f"nothing{EVIL}"],
        ["streams", "append", "order-1", "T", "{}", f"--expected={EVIL}"],
        ["streams", "append", f"tidings_{EVIL}", "T"],
        ["dead", "list", f"{EVIL}:shop"],
        ["run", f"tidings:{EVIL}"],
        ["verify", EVIL],
        ["relay", f"--name={EVIL}"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]).encode("ascii", "ignore").decode()[:14],
)
@pytest.mark.parametrize("debug", ["", "1"], ids=["plain", "debug"])
def test_errors_quote_safely_with_tracebacks_too(
    arguments: list[str], debug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if debug:
        monkeypatch.setenv("TIDINGS_DEBUG", debug)
    ended = invoke(*arguments)
    assert ended.code in (1, 2, 3)
    assert ended.err
    safe(ended)


@pytest.mark.parametrize(
    "error", [StoreUnavailable(EVIL), KeyError(EVIL), RuntimeError(EVIL)], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("debug", ["", "1"], ids=["plain", "debug"])
def test_an_error_that_repeats_what_a_peer_said_is_shown_safely(
    error: Exception, debug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: Settings) -> None:
        raise error

    monkeypatch.setattr("tidings.cli.streams.existing_store", fail)
    if debug:
        monkeypatch.setenv("TIDINGS_DEBUG", debug)
    ended = invoke("streams", "list")
    assert ended.code == (3 if isinstance(error, StoreUnavailable) else 70)
    assert ("Traceback" in ended.err) == bool(debug)
    safe(ended)


# ---- the log -------------------------------------------------------------------------


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = root.handlers, root.level
    try:
        yield io.StringIO()
    finally:
        root.handlers = before
        root.setLevel(level)
        logging.captureWarnings(False)
        structlog.reset_defaults()


def everything(text: str) -> None:
    """Each way in which a text can get into the log."""
    log = structlog.get_logger("shop")
    log.warning(
        text, said=text, many=[text, {text: text}], raw=text.encode("utf-8", "surrogatepass"), error=OSError(text)
    )
    log.warning("named", **{f"key{text}": 1})
    logging.getLogger("theirs").warning("they say %s", text)
    logging.getLogger(f"theirs{text}").warning("named")
    try:
        raise ValueError(text) from OSError(text)
    except ValueError as error:
        error.add_note(text)
        log.exception("failed")
        logging.getLogger("theirs").exception(text)


@pytest.mark.parametrize("as_json", [True, False])
def test_no_line_of_the_log_obeys_what_it_quotes(stream: io.StringIO, as_json: bool) -> None:
    configure_logging(json=as_json, stream=stream)
    everything(EVIL)
    lines = stream.getvalue().split("\n")
    assert "forged" in stream.getvalue()
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith("2026-01-01T00:00:00Z [info] forged") for line in lines)


@given(text=st.text(st.characters(codec=None), min_size=1))
def test_whatever_is_logged_each_line_is_printable_and_begins_as_an_entry_or_is_moved_right(text: str) -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    before, level = root.handlers, root.level
    root.handlers = []  # pytest's would show the text as it is
    try:
        configure_logging(json=False, stream=stream)
        everything(text)
    finally:
        root.handlers = before
        root.setLevel(level)
        logging.captureWarnings(False)
        structlog.reset_defaults()
    for line in stream.getvalue().split("\n"):
        assert line.isprintable()
        assert not line or line.startswith(("  ", "Traceback", "20", "tidings.", "OSError")), line


@given(st.text())
def test_only_lines_survive_in_what_has_lines(text: str) -> None:
    shown = plain_lines(text)
    assert shown.count("\n") == text.count("\n")
    assert all(line.isprintable() for line in shown.split("\n"))
    assert all(line.startswith("  ") for line in shown.split("\n")[1:])
