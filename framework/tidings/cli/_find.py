"""Finds the object that MODULE:SERVICE on a command line names. It imports only the user's module."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID

from tidings.cli._exits import USAGE, Refused
from tidings.errors import TidingsError
from tidings.service import Service
from tidings.settings import Settings

__all__ = ["event_named", "find", "find_service", "find_services", "is_application", "named"]


def find(target: str) -> object:
    """Return what `MODULE:ATTRIBUTE` names, or the only `Service` of `MODULE`. Raises `Refused`."""
    name, _, attribute = target.partition(":")
    if target.endswith(".py"):
        raise Refused(USAGE, f"{target!r} is a file: write the module as Python imports it, {target[:-3]}:SERVICE")
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise Refused(
            USAGE, f"{target!r} is no MODULE:SERVICE: write a module as Python imports it, like shop.stock:stock"
        )
    module = _imported(name)
    if not attribute:
        return _only_service(module, name)
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise Refused(USAGE, f"module {name!r} has no {attribute!r}. {_choices(module, name)}") from None
    return found


def find_service(target: str) -> Service:
    """Return the `Service` that `target` names, as `find` does. Raises `Refused` if it is something else."""
    found = find(target)
    if not isinstance(found, Service):
        name = target.partition(":")[0]
        hint = " Only 'tidings run' takes a web application." if is_application(found) else ""
        choices = _choices(sys.modules[name], name)
        raise Refused(USAGE, f"{target!r} is a {type(found).__name__}, not a tidings.Service.{hint} {choices}")
    return found


def find_services(targets: Sequence[str], settings: Settings, *, needed: bool = True) -> dict[str, Service]:
    """Return the services that arguments name, or without any, `TIDINGS_SERVICES`; each once, by MODULE:SERVICE.

    Raises `Refused`, also if there is none and one is `needed`.
    """
    chosen = tuple(targets) or settings.service_names
    if needed and not chosen:
        raise Refused(USAGE, "no service is named: give MODULE:SERVICE, or set TIDINGS_SERVICES=MODULE:SERVICE,...")
    found: dict[str, Service] = {}
    for given in chosen:
        target, service = (given, find_service(given)) if given in settings.service_names else named(given, settings)
        other = next((name for name, known in found.items() if known.name == service.name), None)
        if other is not None and found[other] is not service:
            raise Refused(USAGE, f"{other!r} and {target!r} are two services with one name, {service.name!r}")
        if other is None:
            found[target] = service
    return found


def named(given: str, settings: Settings) -> tuple[str, Service]:
    """Return MODULE:SERVICE and the service for what a person writes: that, or a name of one in TIDINGS_SERVICES."""
    if ":" not in given:
        for target, service in find_services((), settings, needed=False).items():
            if service.name == given:
                return target, service
    return given, find_service(given)


def event_named(text: str) -> UUID | int | tuple[str, int]:
    """Read what a person writes for an event: its id, its global position, or STREAM@VERSION. Raises `Refused`."""
    if text.isascii() and text.isdecimal() and len(text) < 20:
        return min(int(text), 2**63 - 1)
    stream, at, version = text.rpartition("@")
    if at and stream and version.isascii() and version.isdecimal() and len(version) < 20:
        return stream, min(int(version), 2**63 - 1)
    try:
        return UUID(text)
    except ValueError:
        raise Refused(
            USAGE, f"{text!r} names no event: give its id (a UUID), STREAM@VERSION, or its global position"
        ) from None


def is_application(found: object) -> bool:
    """Return whether it can be called as ASGI 3 says: with scope, receive and send."""
    if isinstance(found, type | Service) or not callable(found):
        return False
    try:
        inspect.signature(found).bind(None, None, None)
    except (TypeError, ValueError):
        return False
    return True


def _imported(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            text = (
                f"no module {missing!r} can be found from {here}: is the name right, and is this the folder above it?"
            )
        else:
            text = f"module {name!r} needs {missing!r}, which is not installed here. {_place(error)}"
        raise Refused(USAGE, text) from error
    except TidingsError:
        raise
    except Exception as error:
        hint = ""
        if isinstance(error, RuntimeError) and "running event loop" in str(error):
            hint = " The module runs its program when it is imported: put that under  if __name__ == '__main__':"
        raise Refused(
            USAGE, f"module {name!r} cannot be imported: {type(error).__name__}: {error}. {_place(error)}{hint}"
        ) from error


def _place(error: BaseException) -> str:
    """Return where in the user's code it happened: the last frame that is not in the import machinery."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"See {error.filename}:{error.lineno}."
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    return f"See {frames[-1].filename}:{frames[-1].lineno}." if len(frames) > 1 else ""


def _services_of(module: ModuleType) -> dict[str, Service]:
    """Return the services of a module by their names in it; the first name, if one has several."""
    found: dict[str, Service] = {}
    for name, value in vars(module).items():
        if isinstance(value, Service) and all(value is not known for known in found.values()):
            found[name] = value
    return found


def _only_service(module: ModuleType, name: str) -> Service:
    found = _services_of(module)
    if len(found) != 1:
        raise Refused(USAGE, f"which one of module {name!r}? {_choices(module, name)}")
    return next(iter(found.values()))


def _choices(module: ModuleType, name: str) -> str:
    found = [f"{name}:{attribute}" for attribute in _services_of(module)]
    return f"Its services: {', '.join(found)}." if found else "It has no services."
