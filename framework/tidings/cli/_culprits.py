"""Reads from a traceback where an attempt failed, and makes a test's stand-in for a resource fail in the same way.

It runs nothing of the service. If the traceback does not say it for certain, a comment leaves it to the reader.
"""

from __future__ import annotations

import builtins
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tidings.cli._literals import Imports, NoLiteral, literal, place_of
from tidings.cli._output import plain
from tidings.modelling.handlers import Inject

if TYPE_CHECKING:
    from tidings.operations.capture import Run

__all__ = ["failing_alike"]

_BEGIN: Final = "Traceback (most recent call last):\n"
_FRAME: Final = re.compile(r'^  File "(.+)", line (\d+), in (\S+)(?:\n    (.*))?$', re.MULTILINE)
_ERROR: Final = re.compile(r"^([A-Za-z_][\w.]*)(?::|$)", re.MULTILINE)


class _Frame(NamedTuple):
    file: str
    line: str
    function: str
    source: str


def failing_alike(run: Run, imports: Imports, redacted: Callable[[str], str]) -> Iterator[str]:
    """Yield lines that make a stand-in in RESOURCES fail as the resource has failed.

    Yield none if the handler's own code failed, or something that it called without a resource.
    """
    kinds = {name: kind for name, kind in run.handler.parameters if not isinstance(kind, Inject)}
    last = run.detail.rpartition(_BEGIN)[2]
    frames = [_Frame(file, line, name, source or "") for file, line, name, source in _FRAME.findall(last)]
    if not kinds or not frames:
        return
    error = _error(last, run.reason, imports, redacted)
    called = _called(frames, kinds)
    if called is not None and error is not None:
        kind, method = called
        yield f"RESOURCES[{imports.of(*place_of(kind))}].{method}.side_effect = {error}"
    elif called is not None or not _is_of(frames[-1].file, run.handler.function):
        at = frames[-1]
        where = f"{at.function} ({PurePath(at.file).name}, line {at.line})"
        yield f"# It failed in {plain(where)}. If one of RESOURCES called that, let it fail in the same way:"
        yield "# RESOURCES[...].method.side_effect = ..."


def _called(frames: Sequence[_Frame], kinds: dict[str, type]) -> tuple[type, str] | None:
    """Return the class of the resource on the way to the error, and the method that was called; None if not certain."""
    for caller, frame in pairwise(frames):
        method = frame.function
        if f".{method}(" not in caller.source:
            continue
        having = {name: kind for name, kind in kinds.items() if callable(getattr(kind, method, None))}
        named = [kind for name, kind in having.items() if re.search(rf"\b{name}\.{method}\(", caller.source)]
        found = list(dict.fromkeys(named or having.values()))
        if len(found) == 1:
            return found[0], method
    return None


def _error(trace: str, reason: str, imports: Imports, redacted: Callable[[str], str]) -> str | None:
    """Return an expression that makes an equal error; None if the message alone is not enough for that."""
    short, _, message = reason.partition(": ")
    names = [found for found in _ERROR.findall(trace) if found.rpartition(".")[2] == short]
    if not names:
        return None
    module, _, name = names[0].rpartition(".")
    kind: Any = getattr(sys.modules.get(module) if module else builtins, name, None)
    try:
        again = kind(message) if message else kind()
        if not isinstance(again, Exception) or type(again) is not kind or str(again) != message:
            return None
        called = imports.of(*place_of(kind)) if module else name
        return f"{called}({literal(redacted(message), imports) if message else ''})"
    except (Exception, NoLiteral):
        return None


def _is_of(file: str, function: Any) -> bool:
    """Return whether a file, possibly of another machine, is the module of a function."""
    parts = str(inspect.unwrap(function).__module__).split(".")
    path = PurePath(file).with_suffix("").parts
    return path[-len(parts) :] == tuple(parts) or path[-len(parts) - 1 :] == (*parts, "__init__")
