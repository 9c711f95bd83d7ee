"""Backups of SQLite files, both logs and services' databases: taken while they are in use, checked, and restored whole.

A backup is a folder with one file per database, and a list of these files. It is complete when the list is there.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from tidings._support.holders import open_elsewhere
from tidings._support.private_files import make_private
from tidings.errors import TidingsError

__all__ = ["Backup", "BackupRefused", "BackupFile", "read", "restore", "take"]

LIST: Final = "backup.json"
VERSION: Final = 1
PAGES: Final = 1000
"""Pages to copy at a time; between two copies, others may write."""


class BackupRefused(TidingsError):
    """A backup cannot be taken, or must not be restored. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class BackupFile:
    """One file of a backup."""

    name: str
    """`log`, or the name of a service."""
    file: str
    """The name of the file in the backup's folder."""
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Backup:
    """A folder with one backup of all files."""

    folder: Path
    taken_at: str
    kept: tuple[BackupFile, ...]


def take(folder: Path, files: Mapping[str, Path]) -> Backup:
    """Copy SQLite databases into a new folder while others read and write them.

    `files` has the path of each database by name; they are copied in this order. Each copy shows one moment. Give
    services before the log, so that no service is ahead of the log. Raises `BackupRefused`.
    """
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else (folder,)):
        raise BackupRefused(f"{folder} is there already, and not empty: name a new folder. Nothing was written.")
    for name, path in files.items():
        if not path.is_file():
            raise BackupRefused(f"{name}: there is no file {path}. Nothing was written.")
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for number, (name, path) in enumerate(files.items()):
        safe = "".join(sign if (sign.isalnum() and sign.isascii()) or sign in "-_" else "_" for sign in name)[:50]
        target = folder / f"{number:02}-{safe}.db"
        try:
            _copy(path, target)
        except sqlite3.Error as error:
            raise BackupRefused(f"{name}: {path} cannot be copied: {error}. {folder} is incomplete.") from error
        kept.append(BackupFile(name, target.name, _digest(target), target.stat().st_size))
    backup = Backup(folder, datetime.now(UTC).isoformat(timespec="seconds"), tuple(kept))
    told = {
        "version": VERSION,
        "taken_at": backup.taken_at,
        "files": [{name: getattr(one, name) for name in BackupFile.__slots__} for one in kept],
    }
    fresh = folder / f"{LIST}.new"
    with fresh.open("w") as writing:
        json.dump(told, writing, indent=2)
        writing.flush()
        os.fsync(writing.fileno())
    fresh.replace(folder / LIST)
    _sync(folder)
    return backup


def read(folder: Path) -> Backup:
    """Read the backup in a folder, and check every file. Raises `BackupRefused` if it is incomplete or damaged."""
    try:
        told: Any = json.loads((folder / LIST).read_bytes())
        if told["version"] != VERSION:
            raise BackupRefused(
                f"{folder / LIST} has version {told['version']}: use the version of Tidings that wrote it"
            )
        kept = tuple(BackupFile(**{name: one[name] for name in BackupFile.__slots__}) for one in told["files"])
        backup = Backup(folder, str(told["taken_at"]), kept)
    except FileNotFoundError:
        raise BackupRefused(f"{folder} is no backup, or one that was not finished: it has no {LIST}") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BackupRefused(f"{folder / LIST} cannot be read: {type(error).__name__}: {error}") from error
    for one in kept:
        path = folder / one.file
        if Path(one.file).name != one.file or not path.is_file():
            raise BackupRefused(f"{one.name}: {path} is missing")
        if _digest(path) != one.sha256:
            raise BackupRefused(f"{one.name}: {path} is not what was written there: it was changed or damaged")
        if (fault := _fault(path)) is not None:
            raise BackupRefused(f"{one.name}: {path} is damaged: {fault}")
    return backup


def restore(backup: Backup, files: Mapping[str, Path], *, overwrite: bool = False) -> None:
    """Restore files from a backup to the paths that `files` gives by name.

    A file that is replaced is kept beside the new one, as `NAME.before-restore-N`. Raises `BackupRefused` if another
    process has one of them open, or if one exists and `overwrite` is not set.
    """
    wanted = {one.name: one for one in backup.kept if one.name in files}
    if missing := sorted(files.keys() - wanted.keys()):
        raise BackupRefused(f"{backup.folder} has no {', '.join(missing)}. Nothing was changed.")
    for name, path in files.items():
        if path.exists() and (holder := open_elsewhere(str(path))) is not None:
            raise BackupRefused(f"{name}: {path} is open in process {holder}: stop it. Nothing was changed.")
        if path.exists() and not overwrite:
            raise BackupRefused(f"{name}: {path} exists: say --overwrite, which keeps it beside. Nothing was changed.")
        if not path.parent.is_dir():
            raise BackupRefused(f"{name}: there is no folder {path.parent}. Nothing was changed.")
    fresh = {name: path.with_name(f"{path.name}.restoring") for name, path in files.items()}
    for name, path in fresh.items():
        path.unlink(missing_ok=True)
        _copy(backup.folder / wanted[name].file, path)
    for name, path in files.items():
        kept = next(
            beside
            for number in range(1, 10_000)
            if not (beside := path.with_name(f"{path.name}.before-restore-{number}")).exists()
        )
        for ending in ("-wal", "-shm", ""):  # a write-ahead log belongs to the file beside it
            old = path.with_name(path.name + ending)
            if old.exists():
                old.replace(kept.with_name(kept.name + ending))
        fresh[name].replace(path)
        _sync(path.parent)


def _copy(source: Path, target: Path) -> None:
    """Copy one moment of a database that others may be using, to a file that needs no other files beside it."""
    make_private(target)
    with (
        closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=30)) as reading,
        closing(sqlite3.connect(target)) as writing,
    ):
        reading.backup(writing, pages=PAGES, sleep=0.01)
        writing.execute("PRAGMA journal_mode = DELETE")
    with target.open("rb+") as file:
        os.fsync(file.fileno())
    if (fault := _fault(target)) is not None:
        raise BackupRefused(f"{source}: the copy is damaged: {fault}")


def _fault(path: Path) -> str | None:
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
            (said,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            return None if said == "ok" else str(said)
    except sqlite3.Error as error:
        return str(error)


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
