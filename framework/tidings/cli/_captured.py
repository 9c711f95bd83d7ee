"""Writes a captured event as a test file: `given` earlier events, `handling` this event, then what came of it.

It writes text and runs nothing. An event is written as a call of its class; if it does not fit the class, as the bytes
that the log holds.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from tidings._support.json_limits import parse
from tidings.cli._culprits import failing_alike
from tidings.cli._exits import NO, USAGE, Refused
from tidings.cli._layout import laid_out
from tidings.cli._literals import Imports, NoLiteral, literal, place_of
from tidings.cli._output import moment, plain
from tidings.cli._redaction import Redaction
from tidings.errors import TidingsError
from tidings.modelling.codec import CAUSATION, check_key, decode, read_metadata
from tidings.modelling.events import Event, wire_name
from tidings.modelling.handlers import Inject
from tidings.stores import RecordedEvent

if TYPE_CHECKING:
    from tidings.operations.capture import Captured, Run

__all__ = ["test_file"]

WIDTH: Final = 120
"""Characters of a line, at most."""
REASON_LINES: Final = 5
"""Lines of an error to write, at most."""
WHAT: Final = (
    "It states what the log shows: the streams that the handler's repositories may have read, and earlier events of "
    "the same partition key, which the service handles first. The service's tables hold only the results of these."
)

_OWN: Final = frozenset({"tidingsHandler", "schemaVersion", "traceparent", "partitionKey"})


def test_file(captured: Captured, redact: Sequence[str], command: str) -> str:
    """Return the text of a test file.

    Raises `Refused` for a field of `redact` that no event has, and for a handler that cannot be imported.
    """
    return _File(captured, Redaction(redact), command).text()


class _File:
    def __init__(self, captured: Captured, redaction: Redaction, command: str) -> None:
        self._captured = captured
        self._command = command
        self._redaction = redaction
        self._imports = Imports()
        self._imports.of("tidings.testing", "given")
        self._imports.reserve("RESOURCES")
        self._classes = _classes(captured)
        self._before = list(_before(captured))
        self._as_bytes: set[int] = set()
        """Positions of events that are written as bytes. Their metadata is written with them."""
        self._learn()

    def text(self) -> str:
        runs = self._captured.runs
        tests = [self._test(run) for run in runs]
        resources = self._resources()
        imports = "\n\n".join("\n".join(block) for block in self._imports.blocks())
        parts = [f'"""{self._story()}"""', imports, *([resources] if resources else [])]
        return "\n\n".join(parts) + "\n\n\n" + "\n\n\n".join(tests) + "\n"

    # ---- what is told ------------------------------------------------------------------

    def _story(self) -> str:
        captured = self._captured
        event = captured.event
        lines = [f"{event.type} at {self._where(event)}, as service {captured.service.name} was given it.", ""]
        lines.append(f"Position {event.position}, id {event.id}, recorded {moment(event.recorded_at)}.")
        for run in captured.runs:
            lines.append(f"Handler {run.handler.name}: {run.state}{':' if run.reason else '.'}")
            for line in self._redaction.text(run.reason).splitlines()[:REASON_LINES]:
                lines += textwrap.wrap(plain(line), WIDTH, initial_indent="    ", subsequent_indent="    ")
        if captured.causes or captured.unknown_cause:
            lines.append("Caused by, the first cause first:")
            lines += [f"    {self._named(cause)}" for cause in captured.causes]
        if captured.unknown_cause is not None:
            lines.append(f"    event {captured.unknown_cause}, which was not found")
        if captured.left_out:
            lines.append(f"Not stated below: {', '.join(map(self._redaction.text, captured.left_out))}.")
        lines += ["", *textwrap.wrap(f"Written by '{self._command}'. {WHAT}", WIDTH)]
        text = "\n".join(plain(line).rstrip() for line in lines)
        return text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"') + "\n"

    def _where(self, event: RecordedEvent) -> str:
        return f"{self._redaction.stream(event.stream)}@{event.version}"

    def _named(self, event: RecordedEvent) -> str:
        return f"{event.type} at {self._where(event)}, position {event.position}"

    # ---- the test ----------------------------------------------------------------------

    def _test(self, run: Run) -> str:
        event = self._captured.event
        try:
            module, name = place_of(run.handler.function)
            handler = self._imports.of(module, name)
        except NoLiteral:
            raise Refused(
                NO,
                f"handler {run.handler.name!r} of service {self._captured.service.name!r} is not a module-level "
                "function, so a test cannot import it: make it one",
            ) from None
        subject = re.sub(r"\W+", "_", f"{run.handler.name}_{event.type}_at_position_{event.position}").lower()
        steps = [*self._given(), *self._handling(handler, run), *self._then(run)]
        lines = [f"def test_{subject}() -> None:"]
        line = f"    {''.join(steps)}"
        if len(line) <= WIDTH and not any("\n" in step or step.startswith("#") for step in steps):
            return "\n".join([*lines, line])
        return "\n".join([*lines, "    (", *(f"        {step}" for step in steps), "    )"])

    def _given(self) -> Iterator[str]:
        lines = []
        for event in self._before:
            stated = self._stated(event)
            if stated is None:
                lines.append(f"            # not stated, because no class was found: {plain(self._named(event))}")
            else:
                lines.append(f"            {laid_out(stated, 12)},")
        yield "\n".join(["given(", *lines, "        )"]) if lines else "given()"

    def _handling(self, handler: str, run: Run) -> Iterator[str]:
        event = self._captured.event
        stated = self._stated(event)
        assert stated is not None
        arguments = [handler, stated]
        own = {
            name: self._redaction.document(value)
            for name, value in read_metadata(event).items()
            if not name.startswith(("$", "tidings_")) and name not in _OWN
        }
        if own and event.position not in self._as_bytes:
            arguments.append(f"metadata={literal(own, self._imports)}")
        if _resources_of(self._captured):
            arguments.append("resources=RESOURCES")
        yield laid_out(f".handling({', '.join(arguments)})", 8, after=0)

    def _then(self, run: Run) -> Iterator[str]:
        if run.state != "settled":
            yield "# It has not succeeded yet. Say here what it should emit."
        emitted = run.emitted if run.state == "settled" else ()
        stated = [(event, self._stated(event)) for event in emitted]
        for event, text in stated:
            if text is None:
                yield f"# It also emitted this, but no class was found for it: {plain(self._named(event))}"
        texts = [text for _, text in stated if text is not None]
        yield laid_out(f".emits({', '.join(texts)})", 8, after=0) if texts else ".nothing()"

    def _resources(self) -> str:
        wanted = _resources_of(self._captured)
        if not wanted:
            return ""
        fake = self._imports.of("unittest.mock", "create_autospec")
        lines = ["# The service's lifespan is not run here. Say what the methods of these mocks return."]
        lines.append(f"RESOURCES: dict[type, {self._imports.of('typing', 'Any')}] = {{")
        for kind in wanted:
            name = self._imports.of(*place_of(kind))
            lines.append(f"    {name}: {fake}({name}, instance=True),")
        lines.append("}")
        redacted = self._redaction.text
        failing = [line for run in self._captured.runs for line in failing_alike(run, self._imports, redacted)]
        return "\n".join([*lines, *dict.fromkeys(failing)])

    # ---- events ------------------------------------------------------------------------

    def _learn(self) -> None:
        """Find the values to replace, before anything is written."""
        captured = self._captured
        emitted = [event for run in captured.runs for event in run.emitted]
        for event in (captured.event, *self._before, *captured.causes, *emitted):
            for content in (event.data, event.metadata):
                self._redaction.learn(_document(content))
        if missing := self._redaction.missing:
            raise Refused(
                USAGE,
                f"--redact {missing[0]}: none of these events has this field, so nothing was written: a personal value "
                "could have stayed in the file. Name a field as it is in the event's JSON, at any depth",
            )

    def _stated(self, event: RecordedEvent) -> str | None:
        """Return an expression for an event and its stream; None if no class was found."""
        shown = self._redacted(event)
        kind = self._classes.get(event.type)
        if kind is None:
            return None
        text = self._by_class(shown, kind)
        if text is None and shown != event and self._by_class(event, kind) is not None:
            raise Refused(
                USAGE,
                f"--redact: with other values, {self._named(event)} no longer fits {kind.__name__}, so no test could "
                "state it; nothing was written. Leave out the field whose values the class checks",
            )
        return f"({literal(shown.stream, self._imports)}, {text or self._by_bytes(shown)})"

    def _by_class(self, event: RecordedEvent, kind: type[Event]) -> str | None:
        view = self._captured.service.view(event.type)
        try:
            metadata = read_metadata(event)
            if view is not None:
                check_key(event, decode(event, view, metadata), metadata)
            value = decode(event, kind, metadata)
            alone = Imports()
            if _makes(literal(value, alone), alone, value):
                return literal(value, self._imports)
        except (TidingsError, NoLiteral):
            pass
        return None

    def _by_bytes(self, event: RecordedEvent) -> str:
        metadata = {name: value for name, value in read_metadata(event).items() if name != CAUSATION}
        metadata.pop("tidingsHandler", None)
        packed = json.dumps(metadata).encode() if metadata else event.metadata
        self._as_bytes.add(event.position)
        name = self._imports.of("tidings", "EventData")
        return f"{name}({literal(event.type, self._imports)}, {event.data!r}, {packed!r})"

    def _redacted(self, event: RecordedEvent) -> RecordedEvent:
        data, metadata = (self._redacted_bytes(content) for content in (event.data, event.metadata))
        return event._replace(stream=self._redaction.stream(event.stream), data=data, metadata=metadata)

    def _redacted_bytes(self, content: bytes) -> bytes:
        document = _document(content)
        shown = self._redaction.document(document)
        return content if shown == document else json.dumps(shown, ensure_ascii=False).encode()


def _document(content: bytes) -> Any:
    try:
        return parse(content)
    except ValueError:
        return None


def _makes(text: str, imports: Imports, value: Event) -> bool:
    """Return whether an expression makes an equal event: a validator may have changed the values."""
    try:
        # The text comes from `literal`: calls of classes, with values as Python's own repr writes them.
        made = eval(text, imports.namespace())  # nosec B307
    except Exception:
        return False
    return type(made) is type(value) and made == value


def _before(captured: Captured) -> Iterable[RecordedEvent]:
    """Yield the events to state as given, in the order of the log.

    Leave out what the service itself emitted because of a given event: it emits that again.
    """
    found = {event.position: event for event in (*captured.causes, *captured.read, *captured.earlier)}
    found.pop(captured.event.position, None)
    given: set[str] = set()
    service = captured.service
    for position in sorted(found):
        event = found[position]
        metadata = read_metadata(event)
        emitter = str(metadata.get("tidingsHandler", "")).rpartition(".")
        by_itself = emitter[0] == service.name and emitter[2] in service.names
        handled = bool(service.handlers_of(event.type)) and event.position not in captured.failed
        if by_itself and str(metadata.get(CAUSATION)) in given:
            if handled:
                given.add(str(event.id))
            continue
        if handled:
            given.add(str(event.id))
        yield event


def _classes(captured: Captured) -> dict[str, type[Event]]:
    """Return the class with which to write each wire name.

    The first choice is an aggregate's class, because it needs all fields of its stream. The next is the service's view,
    and then a class in the handlers' modules or packages, such as those of events that they emit.
    """
    found: dict[str, type[Event]] = {}
    modules = {str(run.handler.function.__module__) for run in captured.runs}
    packages = {module.rpartition(".")[0] or module for module in modules}
    known = list(_subclasses(Event))
    beside = [kind for kind in known if kind.__module__.rpartition(".")[0] in packages or kind.__module__ in packages]
    for kind in (*(kind for kind in known if kind.__module__ in modules), *beside):
        found.setdefault(wire_name(kind), kind)
    for handler in captured.service.named.values():
        found |= {wire_name(kind): kind for kind in handler.events}
    for repository in captured.repositories:
        for kind in repository.aggregate.__tidings__.evolutions:
            found[wire_name(kind)] = kind
    return found


def _subclasses(kind: type[Event]) -> Iterator[type[Event]]:
    for one in kind.__subclasses__():
        yield one
        yield from _subclasses(one)


def _resources_of(captured: Captured) -> list[type]:
    """Return the resources from the lifespan that any handler of the service asks for."""
    wanted = {
        kind
        for handler in captured.service.named.values()
        for _, kind in handler.parameters
        if not isinstance(kind, Inject)
    }
    return sorted(wanted, key=lambda kind: (kind.__module__, kind.__qualname__))
