"""How a case asks a server, and how an answer is written down so that two servers' answers can be compared.

Stream names lose their random prefix; identifiers and positions in the log become symbols.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol
from uuid import uuid4

from esdbclient import EventStoreDBClient, NewEvent, RecordedEvent, StreamState

NO, ANY, EXISTS = StreamState.NO_STREAM, StreamState.ANY, StreamState.EXISTS

Case = Callable[["Probe"], Any]
CASES: dict[str, Case] = {}

_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_NUMBER = re.compile(r"\(\d{4,}\)|\b\d{4,}\b")


def case(function: Case) -> Case:
    """The name of the recorded answer."""
    CASES[function.__name__] = function
    return function


class Subscription(Protocol):
    def __iter__(self) -> Any: ...
    def stop(self) -> None: ...


class Probe:
    """A server as one case sees it, with streams of its own."""

    def __init__(self, client: EventStoreDBClient) -> None:
        self.client = client
        self.prefix = "p" + uuid4().hex[:10]

    def stream(self, name: str = "s") -> str:
        return f"{self.prefix}-{name}"

    def event(self, n: int = 0, type: str = "Happened", data: bytes | None = None, **more: Any) -> NewEvent:
        return NewEvent(type=type, data=json.dumps({"n": n}).encode() if data is None else data, **more)

    def normalise(self, text: str) -> str:
        return _NUMBER.sub("<n>", _ID.sub("<id>", text.replace(self.prefix, "<p>")))[:300]

    def do(self, function: Callable[[], Any]) -> Any:
        """Return the outcome of a call: a value, or the class of the error and its text."""
        try:
            return {"ok": function()}
        except Exception as error:
            says = str(error)
            details = re.search(r'details = "(.*?)"\n', says)
            code = re.search(r"StatusCode\.(\w+)", says)
            outcome = {"error": type(error).__name__}
            if code:
                outcome["code"] = code.group(1)
            return outcome | {"says": self.normalise(details.group(1) if details else says)}

    def append(self, stream: str, events: NewEvent | Iterable[NewEvent], at: Any) -> Any:
        out = self.do(lambda: self.client.append_to_stream(stream, current_version=at, events=events, timeout=20))
        if isinstance(out.get("ok"), int):
            out = {"ok": "position" if out["ok"] > 0 else out["ok"]}
        return out

    def read(self, stream: str, **options: Any) -> Any:
        return self.do(lambda: [self.show(event) for event in self.client.get_stream(stream, timeout=20, **options)])

    def read_all(self, **options: Any) -> list[RecordedEvent]:
        """Subscribe to this case's streams only, unless a filter is given."""
        options.setdefault("filter_by_stream_name", "filter_include" not in options)
        options.setdefault("filter_include", (f"{self.prefix}.*",))
        return list(self.client.read_all(timeout=20, **options))

    def show(self, event: RecordedEvent) -> str:
        data = event.data.decode("utf-8", "backslashreplace")
        return self.normalise(f"{event.stream_name}@{event.stream_position} {event.type} {data}")

    def version(self, stream: str) -> Any:
        return self.do(lambda: str(self.client.get_current_version(stream, timeout=20)))

    def take(self, subscription: Subscription, count: int, seconds: float = 10.0) -> list[str]:
        """Return the first `count` items of a subscription, or those that came within `seconds`."""
        got: list[str] = []

        def run() -> None:
            try:
                for item in subscription:
                    got.append(self.show(item) if type(item) is RecordedEvent else type(item).__name__)
                    if len(got) >= count:
                        break
            except Exception as error:
                got.append(f"error {type(error).__name__}")

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(seconds)
        subscription.stop()
        thread.join(3)
        return got

    def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for something that the server does by itself."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it never came about"
            time.sleep(0.05)


def three(p: Probe, name: str = "s", n: int = 5) -> str:
    """Create a stream with some events."""
    p.append(p.stream(name), [p.event(i) for i in range(n)], NO)
    return p.stream(name)
