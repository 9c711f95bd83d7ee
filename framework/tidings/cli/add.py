"""`tidings add`: more services in a project that `tidings new` made. It adds files, and one name to the settings."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import typer

from tidings.cli._exits import NO, OK, USAGE, Refused, answering
from tidings.cli._output import plain, say
from tidings.cli._scaffold import checked_name, class_name, place, render, replace_text

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Add to a project that 'tidings new' made.")

DEFAULT_EVENT: Final = "OrderConfirmed"
_SERVICES: Final = re.compile(r"^(TIDINGS_SERVICES=)(.*)$", re.MULTILINE)


class Followed(NamedTuple):
    """An event of another service, as its source declares it."""

    service: str
    name: str
    key: str
    wire_name: str | None


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
    known = _services_of(here)
    if name in known:
        raise Refused(NO, f"this project has a service {name} already; nothing was written. Choose another name")
    package = here / checked_name(name)
    test = here / "tests" / f"test_{name}.py"
    for path in (package, test):
        if path.exists() or path.is_symlink():
            raise Refused(NO, f"{path} exists already; nothing was written. Choose another name")
    followed = _followed(here, known, follow)
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
    settings = {path: _named(path.read_text(encoding="utf-8"), name) for path in sorted(here.glob("settings/*.env"))}
    place(package, {path.removeprefix(f"{name}/"): text for path, text in files.items() if path.startswith(f"{name}/")})
    test.parent.mkdir(exist_ok=True)
    test.write_text(files[f"tests/test_{name}.py"], encoding="utf-8")
    for path, text in settings.items():
        replace_text(path, text)
    say(plain(f"{name}/ follows {followed.name} of {followed.service}; its tests are in tests/test_{name}.py. Next:"))
    say("  make test")
    return OK


def _services_of(here: Path) -> list[str]:
    """Return the packages of the project's services, the first one first."""
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
    return [target.strip().partition(":")[0].partition(".")[0] for target in found[2].split(",")]


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
            found.append(Followed(service, node.name, key, name if isinstance(name, str) else None))
    return found


def _is_text(field: ast.stmt, name: str) -> bool:
    return isinstance(field, ast.AnnAssign) and ast.unparse(field).partition("=")[0].strip() == f"{name}: str"


def _named(text: str, name: str) -> str:
    """Return settings with one more service."""
    return _SERVICES.sub(lambda line: f"{line[1]}{line[2].rstrip()},{name}.service:service", text)
