"""Writes the files of projects and services from templates, all or none. It never overwrites a file.

A template is a file in `templates/KIND/` that ends in `.tmpl`. In its path, `NAME` stands for the service's name, and
`FIRST` for the name of the service that it follows.
"""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from string import Template
from typing import Final

from tidings.buses import check_service_name
from tidings.cli._exits import NO, USAGE, Refused
from tidings.errors import ConfigurationError

__all__ = ["Files", "add_to", "checked_name", "class_name", "place", "render"]

TEMPLATES: Final = Path(__file__).parent / "templates"
LONGEST: Final = 30
"""Characters of a name, at most, so that no line of a template becomes too long."""
TAKEN: Final = frozenset({"settings", "tests"})
"""Names of a project's other folders."""

Files = Mapping[str, str]
"""Texts of files by their path inside the project."""


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
        raise Refused(USAGE, f"{name!r} is a Python keyword and cannot name a package: choose another name")
    if name in TAKEN:
        raise Refused(USAGE, f"{name!r} is a folder of every project and cannot name a package: choose another name")
    try:
        check_service_name(name)
    except ConfigurationError as error:
        raise Refused(USAGE, str(error)) from None
    if name in sys.stdlib_module_names or _importable(name):
        raise Refused(USAGE, f"{name!r} is a package that Python already has, and yours would hide it: choose another")
    return name


def class_name(name: str) -> str:
    """Return a package's name in the form of a class name: `order_desk` as `OrderDesk`."""
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
    """Write a new folder with these files, all or none. Raises `Refused` if something is in the way."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise Refused(NO, f"{folder} is not a folder, so nothing was written. Choose another name, or move it away")
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


def add_to(project: Path, package: str, files: Files, settings: Mapping[Path, str]) -> None:
    """Write a new package with its tests into a project, and new texts of existing settings files: all or none.

    Raises `Refused`.
    """
    inside = f"{package}/"
    with ExitStack() as undo:
        try:
            place(
                project / package,
                {path[len(inside) :]: text for path, text in files.items() if path.startswith(inside)},
            )
            undo.callback(shutil.rmtree, project / package)
            for name, text in files.items():
                if not name.startswith(inside):
                    path = project / name
                    if not path.parent.exists():
                        path.parent.mkdir()
                        undo.callback(path.parent.rmdir)
                    with path.open("x", encoding="utf-8") as file:
                        undo.callback(path.unlink)
                        file.write(text)
            drafts = {
                path.resolve(): undo.enter_context(_draft(path.resolve(), text)) for path, text in settings.items()
            }
            for path, draft in drafts.items():
                undo.callback(path.write_bytes, path.read_bytes())
                draft.replace(path)
        except OSError as error:
            raise Refused(
                NO, f"{error.filename or project} cannot be written: {error.strerror or error}. Nothing was changed"
            ) from error
        undo.pop_all()


@contextmanager
def _draft(path: Path, text: str) -> Iterator[Path]:
    """Write a file's new text to a draft beside it, with the same mode. Delete the draft if it is not used."""
    draft = path.with_name(f".{path.name}.new")
    try:
        draft.write_bytes(text.encode())
        shutil.copymode(path, draft)
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _importable(name: str) -> bool:
    """Return whether something with the name can be imported. A folder without Python files does not count."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return True
    return found is not None and found.origin is not None
