"""`tidings new`: a folder with a service that runs and whose tests pass. It changes nothing that exists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from tidings import __version__
from tidings.cli._exits import OK, USAGE, Refused, answering
from tidings.cli._output import plain, say
from tidings.cli._scaffold import checked_name, place, render
from tidings.cli._source import source

__all__ = ["new"]

EXTRAS: Final = ("api", "postgresql")


@answering
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the service, its package and its folder.")],
    extras: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="EXTRA,...", help="api: an HTTP API; postgresql: a database on a server."),
    ] = None,
) -> int:
    """Write a new project: one service with an aggregate, handlers, tests, settings and a Makefile, in the folder NAME.

    It runs embedded at once, and over RabbitMQ when its settings say so. Its README.md says how. 'tidings add service'
    adds the next service.
    """
    chosen = _chosen(extras or ())
    folder = Path.cwd() / checked_name(name)
    here = source()
    place(folder, project(name, chosen, here))
    say(plain(f"{name}/ is a project with the service {name}. Next:"))
    say(f"  cd {name}")
    for step in ("make install", "make test", "make run"):
        say(f"  {step}")
    return OK


def project(name: str, extras: tuple[str, ...], source: str | None = None) -> dict[str, str]:
    """Return the files of a new project. `source` is what pip installs Tidings from here; None for its index."""
    api, postgresql = "api" in extras, "postgresql" in extras
    requires = ["cli", "rabbitmq", *(["fastapi"] if api else []), *(["postgresql"] if postgresql else [])]
    develops = [*(["httpx>=0.27"] if api else []), "mypy>=1.11", "ruff>=0.6", "tidings[testing]"]
    others = f"$(filter-out {name}.service:service,$(SERVICES))"
    words = {
        "version": __version__,
        "extras": ",".join(requires),
        "dev": ", ".join(f'"{requirement}"' for requirement in develops),
        "targets": f"{name}.api:api {others}" if api else "$(SERVICES)",
        "runs": f"{name}.api:api" if api else f"{name}.service:service",
        "try": TRY_API if api else TRY,
        "source": "" if source is None else LOCAL,
        "api_row": f"| `{name}/api.py` | the HTTP API |\n" if api else "",
    }
    files = render("project", name, words)
    for extra in extras:
        files |= render(extra, name, words)
    if source is not None:
        escaped = source.replace("\\", "\\\\").replace("$", "$$").replace("#", "\\#")
        files["local.mk"] = (
            f"# Where Tidings was installed from on this machine. Delete this file to take it from pip's index.\n"
            f"TIDINGS_SOURCE := {escaped}\n"
        )
    return files


LOCAL: Final = """\
Tidings was not installed from an index here: `make install` takes it from where `local.mk` says. The file is of this
machine alone, so git ignores it. Without it, pip asks its index.

"""


TRY: Final = """.venv/bin/tidings streams append order-1 OrderPlaced '{"order_id": "1", "sku": "CUP", "quantity": 2}'"""
TRY_API: Final = (
    'curl -X PUT localhost:8000/orders/1 -H \'Content-Type: application/json\' -d \'{"sku": "CUP", "quantity": 2}\''
)


def _chosen(given: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    names = [name.strip() for text in given for name in text.split(",")]
    unknown = sorted(set(names) - set(EXTRAS))
    if unknown:
        raise Refused(USAGE, f"--with {unknown[0]!r}: choose from {' and '.join(EXTRAS)}, separated by a comma")
    return tuple(extra for extra in EXTRAS if extra in names)
