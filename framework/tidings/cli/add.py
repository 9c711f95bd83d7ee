"""`tidings add`: adds a service to a project that `tidings new` made: files, and a name in the settings."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import typer

from tidings.cli._env_files import read_settings, services_in, with_service
from tidings.cli._exits import NO, OK, USAGE, Refused, answering
from tidings.cli._layout import laid_out
from tidings.cli._output import plain, say
from tidings.cli._scaffold import add_to, checked_name, class_name, render

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Add to a project that 'tidings new' made.")

DEFAULT_EVENT: Final = "OrderConfirmed"
SAMPLES: Final = {"str": '"1"', "int": "1", "float": "1.0", "bool": "True"}
"""Sample values for an event's fields, by the type as the source writes it."""


class Followed(NamedTuple):
    """An event of another service, as its source declares it."""

    service: str
    name: str
    key: str
    wire_name: str | None
    sample: str | None
    """An expression that makes such an event, with key "1"; None if a field has a type without a known sample."""


@app.command("service", short_help="Add a service that follows another one's events.")
@answering
def service(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the service and its package.")],
    follow: Annotated[
        str | None,
        typer.Option(
            "--follow", metavar="EVENT", help=f"The event to follow; by default {DEFAULT_EVENT}, if there is one."
        ),
    ] = None,
) -> int:
    """Add a service with tests to the project in this folder. It follows an event of another service of the project.

    The key= of that event must be a field with a text. Every file in settings/ with a line TIDINGS_SERVICES=... gets
    the new service added there. If anything cannot be written, nothing is.
    """
    here = Path.cwd()
    targets = _services_of(here)
    known = list(targets)
    if name in known:
        raise Refused(NO, f"this project already has a service {name}; nothing was written. Choose another name")
    package = here / checked_name(name)
    test = here / "tests" / f"test_{name}.py"
    for path in (package, test):
        if path.exists() or path.is_symlink():
            raise Refused(NO, f"{path} already exists; nothing was written. Choose another name")
    followed = _followed(here, known, follow)
    together = here / "tests" / f"test_{followed.service}_and_{name}.py"
    if together.exists() or together.is_symlink():
        raise Refused(NO, f"{together} already exists; nothing was written. Choose another name")
    own = f"{class_name(name)}Started"
    if own == followed.name:
        raise Refused(
            USAGE, f"{own} would be both an event of {name} and the event that it follows: choose another name"
        )
    keywords = f'name="{followed.wire_name}", ' if followed.wire_name else ""
    words = {
        "first": followed.service,
        "event": followed.name,
        "key": followed.key,
        "keywords": f'{keywords}key="{followed.key}"',
        "imports": ", ".join(sorted((own, followed.name))),
    }
    files = render("added", name, words)
    if followed.sample is not None:
        files |= render("together", name, _together(name, own, followed, targets[followed.service]))
    texts = {path: read_settings(path) for path in sorted(here.glob("settings/*.env"))}
    settings = {path: with_service(path, text, f"{name}.service:service") for path, text in texts.items()}
    add_to(here, name, files, {path: text for path, text in settings.items() if text != texts[path]})
    say(plain(f"{name}/ follows {followed.name} of {followed.service}; its tests are in tests/test_{name}.py."))
    if followed.sample is None:
        say(plain(f"No test of both together was written: {followed.name} has fields without a known sample value."))
    else:
        say(plain(f"tests/{together.name} tests both together."))
    for path, text in texts.items():
        if services_in(path, text) is None:
            say(plain(f"settings/{path.name} has no line TIDINGS_SERVICES=..., so it stays as it is."))
    say("Next:")
    say("  make test")
    return OK


def _together(name: str, own: str, followed: Followed, target: str) -> dict[str, str]:
    """Return the words for the template of the test in which both services run."""
    module, _, attribute = target.partition(":")
    first, second = f"{followed.service}_service", f"{name}_service"
    attribute = attribute or "service"
    imports = (
        f"from {followed.service}.events import {followed.name}",
        f"from {module} import {attribute}{'' if attribute == first else f' as {first}'}",
        f"from {name}.events import {own}",
        f"from {name}.service import service as {second}",
    )
    assert followed.sample is not None
    return {
        "first": followed.service,
        "first_service": first,
        "name_service": second,
        "imports": "\n".join(sorted(imports)),
        "sample": laid_out(followed.sample, 8, before=len("event = "), after=0),
        "stream": f"{followed.key.removesuffix('_id')}-1",
        "key": followed.key,
    }


def _services_of(here: Path) -> dict[str, str]:
    """Return the project's services as `TIDINGS_SERVICES` names them, by package, the first one first."""
    settings = here / "settings" / "embedded.env"
    targets = services_in(settings, read_settings(settings)) if settings.is_file() else None
    if targets is None:
        raise Refused(
            USAGE,
            f"{settings} has no line TIDINGS_SERVICES=...: go to the folder of a project that 'tidings new' made, or "
            "write that line, with the project's services: TIDINGS_SERVICES=shop.service:service",
        )
    return {target.partition(":")[0].partition(".")[0]: target for target in targets}


def _followed(here: Path, services: list[str], wanted: str | None) -> Followed:
    """Return the `wanted` event, else `OrderConfirmed`, else the last one of the first service that has any."""
    found = [event for service in services for event in _events_of(here, service)]
    if wanted is not None:
        for event in found:
            if wanted == event.name:
                return event
    elif found:
        first = [event for event in found if event.service == found[0].service]
        return next((event for event in first if event.name == DEFAULT_EVENT), first[-1])
    known = dict[str, str]()
    for event in found:
        known.setdefault(event.name, f"{event.name} of {event.service}")  # other services have views of it
    there = f"there are {', '.join(known.values())}" if found else "there is none"
    raise Refused(
        NO,
        f"{'no event' if wanted is None else f'no {wanted}'} to follow: looked in events.py of {', '.join(services)} "
        f"for events whose key= is a field with a text; {there}. Nothing was written",
    )


def _events_of(here: Path, service: str) -> list[Followed]:
    path = here / service / "events.py"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return []
    found = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        said = {one.arg: one.value.value for one in node.keywords if isinstance(one.value, ast.Constant)}
        key, name = said.get("key"), said.get("name")
        if isinstance(key, str) and any(_is_text(field, key) for field in node.body):
            found.append(Followed(service, node.name, key, name if isinstance(name, str) else None, _sample(node, key)))
    return found


def _sample(event: ast.ClassDef, key: str) -> str | None:
    """Return an expression that makes such an event with its required fields; None if a value is not known."""
    values = []
    for field in event.body:
        if isinstance(field, ast.AnnAssign) and field.value is None:
            value = '"1"' if ast.unparse(field.target) == key else SAMPLES.get(ast.unparse(field.annotation))
            if value is None:
                return None
            values.append(f"{ast.unparse(field.target)}={value}")
        elif isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Call):
            return None  # Field(...), which may have limits
    plain = [ast.unparse(base) for base in event.bases] == ["Event"]
    return f"{event.name}({', '.join(values)})" if plain else None


def _is_text(field: ast.stmt, name: str) -> bool:
    return isinstance(field, ast.AnnAssign) and ast.unparse(field).partition("=")[0].strip() == f"{name}: str"
