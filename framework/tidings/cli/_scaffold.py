"""Templates of projects and services to files on disk. All or nothing: what exists is never written over.

A template is a file in `templates/KIND/` that ends in `.tmpl`; in its path, `NAME` stands for the service's
name, and `FIRST` for that of the one that it follows.
"""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Final

from tidings.buses import check_service_name
from tidings.cli._exits import NO, USAGE, Refused
from tidings.errors import ConfigurationError

__all__ = ["Files", "checked_name", "class_name", "place", "render", "replace_text"]

TEMPLATES: Final = Path(__file__).parent / "templates"
LONGEST: Final = 30
"""Characters of a name, at most, so that no line of a template becomes too long."""
TAKEN: Final = frozenset({"settings", "tests"})
"""Names of a project's other folders."""

Files = Mapping[str, str]
"""Path inside the project to its text."""


def checked_name(name: str) -> str:
    """Return the name of a new service if it can be a package and a service. Raises `Refused`."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or len(name) > LONGEST:
        fitting = re.sub(r"[^a-z0-9]+", "_", name.lower()).lstrip("_0123456789")[:LONGEST].rstrip("_")
        hint = f", such as {fitting}" if fitting else ""
        raise Refused(
            USAGE,
            f"{name!r} cannot name a Python package: use 1 to {LONGEST} of a-z, 0-9 and '_', and begin with a "
            f"letter{hint}",
        )
    if keyword.iskeyword(name):
        raise Refused(USAGE, f"{name!r} is a word of Python's own and cannot name a package: choose another name")
    if name in TAKEN:
        raise Refused(USAGE, f"{name!r} is a folder of every project and cannot name a package: choose another name")
    try:
        check_service_name(name)
    except ConfigurationError as error:
        raise Refused(USAGE, str(error)) from None
    if name in sys.stdlib_module_names or _importable(name):
        raise Refused(USAGE, f"{name!r} is a package that Python has already, and would be hidden: choose another name")
    return name


def class_name(name: str) -> str:
    """Return a package's name as classes are written: `order_desk` as `OrderDesk`."""
    return "".join(part.capitalize() for part in name.split("_"))


def render(kind: str, name: str, words: Mapping[str, str]) -> dict[str, str]:
    """Return the files of a template, by their path inside the project."""
    known = {"name": name, "title": class_name(name), **words}
    found = {}
    for source in sorted((TEMPLATES / kind).rglob("*.tmpl")):
        path = source.relative_to(TEMPLATES / kind).as_posix().removesuffix(".tmpl")
        path = path.replace("NAME", name).replace("FIRST", words.get("first", ""))
        path = ".gitignore" if path == "gitignore" else path
        found[path] = Template(source.read_text(encoding="utf-8")).substitute(known)
    return found


def place(folder: Path, files: Files) -> None:
    """Write a new folder with these files: whole, or not at all. Raises `Refused` where something is in the way."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise Refused(NO, f"{folder} is no folder, so nothing was written. Choose another name, or move it away")
    if folder.exists() and any(folder.iterdir()):
        raise Refused(
            NO, f"folder {folder} is not empty, so nothing was written. Choose another name, or go to another folder"
        )
    try:
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for path, text in files.items():
                (draft / path).parent.mkdir(parents=True, exist_ok=True)
                (draft / path).write_text(text, encoding="utf-8")
            draft.chmod(0o777 & ~_umask())
            draft.rename(folder)  # over an empty folder, too
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise Refused(NO, f"{folder} cannot be written: {error.strerror or error}. Nothing was left behind") from error


def replace_text(path: Path, text: str) -> None:
    """Replace a file's text, whole or not at all, and keep its mode."""
    draft = path.with_name(f".{path.name}.new")
    try:
        draft.write_text(text, encoding="utf-8")
        shutil.copymode(path, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _importable(name: str) -> bool:
    """Return whether something installed has the name; a plain folder that happens to be called so has not."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return True
    return found is not None and found.origin is not None
