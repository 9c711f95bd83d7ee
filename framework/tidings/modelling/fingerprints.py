"""A fingerprint of a handler's code: it differs where the handler, or what it calls in the user's code, differs.

It reads code that is loaded already, and the source of the user's modules for their constants; it runs nothing. What
differs between processes of the same code (a host's name, the time of the start, what a closure holds) does not count.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from hashlib import sha256
from importlib import metadata
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Final, get_args

__all__ = ["fingerprint", "version_of"]

MOST: Final = 5000
"""Functions and classes that one fingerprint looks at."""
_PLAIN: Final = (str, bytes, int, float, complex, bool, type(None), type(Ellipsis))
_ADDRESS: Final = re.compile(" at 0x[0-9a-fA-F]+")
_INSTALLED: Final = tuple(
    path for name, path in sysconfig.get_paths().items() if name in ("stdlib", "platstdlib", "purelib", "platlib")
)


@lru_cache(maxsize=1024)
def fingerprint(function: Callable[..., Any], views: tuple[type, ...] = ()) -> str:
    """32 hexadecimal digits: the version of the function's package, its code, the code that it reaches by name, and
    how the events that it takes are declared.

    Libraries count by nothing, unless the handler is part of one: then by the code of its own package.
    """
    digest = sha256(version_of(function).encode())
    package = _package(_unwrapped(function))
    seen: set[int] = set()
    waiting: list[Any] = [function, *views]
    while waiting and len(seen) < MOST:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        found: list[Any] = []
        for part in _parts(thing):
            if isinstance(part, str):
                digest.update(part.encode("utf-8", "surrogatepass"))
                digest.update(b"\0")
            elif _is_own(part, package):
                found.append(part)
        waiting += reversed(found)
    return digest.hexdigest()[:32]


def version_of(function: Callable[..., Any]) -> str:
    """Return the version of the package that the function is defined in; "" if it has none."""
    package = _package(_unwrapped(function))
    try:
        return metadata.version(package)
    except (metadata.PackageNotFoundError, ValueError):
        return str(getattr(sys.modules.get(package), "__version__", ""))


def _unwrapped(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return inspect.unwrap(function) if callable(function) else function


def _package(thing: Any) -> str:
    module = getattr(thing, "__module__", None) or type(thing).__module__
    return str(module).partition(".")[0]


def _is_own(thing: Any, package: str) -> bool:
    """The user's code: of the handler's package, or of a module that nobody installed."""
    name = thing.__name__.partition(".")[0] if isinstance(thing, ModuleType) else _package(thing)
    if name == package:
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    return name != "tidings" and isinstance(file, str) and not file.startswith(_INSTALLED)


def _parts(thing: Any) -> Iterator[Any]:
    """Texts that describe what a function or class does, and the things that it uses."""
    if isinstance(thing, partial):
        yield thing.func
        yield from map(_shown, thing.args)
        yield from (f"{name}={_shown(value)}" for name, value in thing.keywords.items())
    elif isinstance(thing, MethodType | staticmethod | classmethod):
        yield thing.__func__
    elif isinstance(thing, property):
        yield from (part for part in (thing.fget, thing.fset, thing.fdel) if part is not None)
    elif isinstance(thing, FunctionType):
        yield from _parts_of_function(thing)
    elif isinstance(thing, type):
        yield thing.__qualname__
        yield repr(list(inspect.get_annotations(thing)))
        yield from thing.__bases__
        yield from _parts_of_model(thing)
        for name, value in list(vars(thing).items()):
            if isinstance(value, FunctionType | staticmethod | classmethod | property):
                yield value
            elif not name.startswith("__"):
                yield f"{name}={_shown(value)}"
    elif not isinstance(thing, ModuleType):
        yield type(thing)


def _parts_of_model(model: type) -> Iterator[Any]:
    """How a pydantic model reads: the types of its fields, and of an event its version and upcasters."""
    declared = vars(model).get("__tidings__")
    for name in ("name", "version", "oldest", "key"):
        yield f"{name}={_shown(getattr(declared, name, None))}"
    for version, step in sorted(getattr(declared, "upcasters", {}).items()):
        yield str(version)
        yield step
    for name, field in sorted(vars(model).get("__pydantic_fields__", {}).items()):
        yield f"{name}: {_ADDRESS.sub('', repr(field))}"
        waiting = [field.annotation]
        while waiting:
            kind = waiting.pop()
            if isinstance(kind, type):
                yield kind
            waiting += reversed(get_args(kind))


def _parts_of_function(function: FunctionType) -> Iterator[Any]:
    if (wrapped := getattr(function, "__wrapped__", None)) is not None:
        yield wrapped
    yield from map(_shown, function.__defaults__ or ())
    yield from (f"{name}={_shown(value)}" for name, value in (function.__kwdefaults__ or {}).items())
    for cell in function.__closure__ or ():
        try:
            if _is_code(cell.cell_contents):
                yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    names: list[str] = []
    yield from _described(function.__code__, names)
    module = sys.modules.get(function.__module__)
    for name in dict.fromkeys(names):
        if name in function.__globals__:
            value = function.__globals__[name]
            if isinstance(value, ModuleType):  # the names of its attributes follow
                module = value
                continue
            yield from _named(name, value, sys.modules.get(function.__module__))
        elif module is not None and name in vars(module):
            yield from _named(name, vars(module)[name], module)


def _named(name: str, value: Any, module: ModuleType | None) -> Iterator[Any]:
    if _is_code(value):
        yield value
    elif module is not None and _is_own(module, ""):  # of what is installed, the version says enough
        yield _constants(module).get(name, "")


def _is_code(value: Any) -> bool:
    return isinstance(value, FunctionType | MethodType | type | partial | staticmethod | classmethod)


@lru_cache(maxsize=1024)
def _constants(module: ModuleType) -> dict[str, str]:
    """What a module assigns to names literally."""
    try:
        body = ast.parse(inspect.getsource(module)).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    found: dict[str, str] = {}
    for statement in body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            try:
                value = _shown(ast.literal_eval(statement.value))
            except (ValueError, TypeError, MemoryError, RecursionError):
                continue
            found |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    return found


def _described(code: CodeType, names: list[str]) -> Iterator[str]:
    """The code with what is nested in it; `names` gets those that it looks up."""
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    names += code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _described(constant, names)
        else:
            yield _shown(constant)


def _shown(value: Any) -> str:
    """The same in every process: never an address, nor the order of a set."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, frozenset | set):
        return f"{{{','.join(sorted(map(_shown, value)))}}}"
    if isinstance(value, tuple | list):
        return f"({','.join(map(_shown, value))})"
    if isinstance(value, dict):
        return f"{{{','.join(f'{_shown(key)}:{_shown(inner)}' for key, inner in value.items())}}}"
    return type(value).__qualname__
