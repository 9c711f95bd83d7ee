"""Reads the line TIDINGS_SERVICES=... of a settings file, and adds a service to it.

Both a shell and make read such a file, so a line has one value, with or without quotes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from tidings.cli._exits import USAGE, Refused

__all__ = ["read_settings", "services_in", "with_service"]

NAME: Final = "TIDINGS_SERVICES"
_LINE: Final = re.compile(rf"^(?P<head>[ \t]*(?:export[ \t]+)?{NAME}=)(?P<rest>[^\r\n]*)", re.MULTILINE)
_VALUE: Final = re.compile(r"""(?P<quote>["']?)(?P<value>[^"'#]*?)(?P=quote)(?P<tail>[ \t]*(?:[ \t]\#.*)?)""")
_TARGET: Final = re.compile(r"[\w.]+(?::[\w.]+)?")


def read_settings(path: Path) -> str:
    """Return the text of a settings file, with its line ends as they are. Raises `Refused`."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except OSError as error:
        raise Refused(USAGE, f"{path} cannot be read: {error.strerror or error}. Nothing was written") from error
    except UnicodeDecodeError as error:
        raise Refused(USAGE, f"{path} is not in UTF-8, so it cannot be changed. Nothing was written") from error


def services_in(path: Path, text: str) -> list[str] | None:
    """Return the services that a file names, as `package.module:attribute`; None if it has no such line.

    Raises `Refused` for a value that cannot be read.
    """
    found = _last(text)
    return None if found is None else _parts(path, found)[1]


def with_service(path: Path, text: str, target: str) -> str:
    """Return the text of the file with this service added; unchanged if it has no such line, or names it already.

    Raises `Refused` for a value that cannot be read.
    """
    found = _last(text)
    if found is None:
        return text
    value, targets = _parts(path, found)
    if target in targets:
        return text
    quote = value["quote"]
    line = f"{found['head']}{quote}{','.join([*targets, target])}{quote}{value['tail']}"
    return text[: found.start()] + line + text[found.end() :]


def _last(text: str) -> re.Match[str] | None:
    """Return the line that counts: the last one."""
    lines = list(_LINE.finditer(text))
    return lines[-1] if lines else None


def _parts(path: Path, line: re.Match[str]) -> tuple[re.Match[str], list[str]]:
    value = _VALUE.fullmatch(line["rest"])
    targets = [] if value is None else [target.strip() for target in value["value"].strip().strip(",").split(",")]
    if value is None or not all(_TARGET.fullmatch(target) for target in targets):
        says = "names no service" if value is not None and targets == [""] else "cannot be read"
        raise Refused(
            USAGE,
            f"{path}: the line {line[0].strip()!r} {says}. Write the project's services there, with commas between "
            f"them: {NAME}=shop.service:service,billing.service:service. Nothing was written",
        )
    return value, targets
