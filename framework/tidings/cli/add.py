"""`tidings add`: more services in a project that `tidings new` made. It adds files, and one name to the settings."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import typer

from tidings.cli._exits import NO, OK, USAGE, Refused, answering
from tidings.cli._layout import laid_out
from tidings.cli._output import plain, say
from tidings.cli._scaffold import checked_name, class_name, place, render, replace_text

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Add to a project that 'tidings new' made.")

DEFAULT_EVENT: Final = "OrderConfirmed"
SAMPLES: Final = {"str": '"1"', "int": "1", "float": "1.0", "bool": "True"}
"""Values for fields of an event, by the types that are written there."""
_SERVICES: Final = re.compile(r"^(TIDINGS_SERVICES=)(.*)$", re.MULTILINE)


class Followed(NamedTuple):
    """An event of another service, as its source declares it."""

    service: str
    name: str
    key: str
    wire_name: str | None
    sample: str | None
    """An expression that makes one, whose key is "1"; None where its fields have types for which no value is known."""


@app.command("service", short_help="A service that follows another one's events.")
@answering
def service(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the service and its package.")],
    follow: Annotated[
        str | None, typer.Option("--follow", metavar="EVENT", help=f"The event it follows; {DEFAULT_EVENT} if there.")
    ] = None,
) -> int:
    """Add a service to the project in this folder, with its tests: it follows an event of a service that is there.

    The event is one whose key= is a text. Every file in settings/ then names the new service in TIDINGS_SERVICES.
    """
    here = Path.cwd()
    targets = _services_of(here)
    known = list(targets)
    if name in known:
        raise Refused(NO, f"this project has a service {name} already; nothing was written. Choose another name")
    package = here / checked_name(name)
    test = here / "tests" / f"test_{name}.py"
    for path in (package, test):
        if path.exists() or path.is_symlink():
            raise Refused(NO, f"{path} exists already; nothing was written. Choose another name")
    followed = _followed(here, known, follow)
    together = here / "tests" / f"test_{followed.service}_and_{name}.py"
    if together.exists() or together.is_symlink():
        raise Refused(NO, f"{together} exists already; nothing was written. Choose another name")
    own = f"{class_name(name)}Started"
    if own == followed.name:
        raise Refused(USAGE, f"{own} would be the event that {name} follows and its own, too: choose another name")
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
    settings = {path: _named(path.read_text(encoding="utf-8"), name) for path in sorted(here.glob("settings/*.env"))}
    place(package, {path.removeprefix(f"{name}/"): text for path, text in files.items() if path.startswith(f"{name}/")})
    test.parent.mkdir(exist_ok=True)
    for each, text in files.items():
        if each.startswith("tests/"):
            (here / each).write_text(text, encoding="utf-8")
    for path, text in settings.items():
        replace_text(path, text)
    say(plain(f"{name}/ follows {followed.name} of {followed.service}; its tests are in tests/test_{name}.py."))
    if followed.sample is None:
        say(
            plain(f"No test of both together was written: {followed.name} has fields for which no value is known here.")
        )
    else:
        say(plain(f"tests/{together.name} runs both in one world."))
    say("Next:")
    say("  make test")
    return OK


def _together(name: str, own: str, followed: Followed, target: str) -> dict[str, str]:
    """Return the words of the test in which both services run."""
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
    try:
        found = _SERVICES.search(settings.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        found = None
    if found is None or not found[2].strip():
        raise Refused(
            USAGE,
            f"{settings} does not say TIDINGS_SERVICES=...: go to the folder of a project that 'tidings new' made",
        )
    targets = (target.strip() for target in found[2].split(","))
    return {target.partition(":")[0].partition(".")[0]: target for target in targets}


def _followed(here: Path, services: list[str], wanted: str | None) -> Followed:
    """Return the event that is named, or `OrderConfirmed`, or the last one of the first service that has any."""
    found = [event for service in services for event in _events_of(here, service)]
    if wanted is not None:
        for event in found:
            if wanted == event.name:
                return event
    elif found:
        first = [event for event in found if event.service == found[0].service]
        return next((event for event in first if event.name == DEFAULT_EVENT), first[-1])
    there = f"there are {', '.join(event.name for event in found)}" if found else "there is none"
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
    """Return an expression that makes such an event, with the fields that it needs."""
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


def _named(text: str, name: str) -> str:
    """Return settings with one more service."""
    return _SERVICES.sub(lambda line: f"{line[1]}{line[2].rstrip()},{name}.service:service", text)
