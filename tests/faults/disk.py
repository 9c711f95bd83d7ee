"""A disk of some megabytes, to be filled; and a limit to what a process may write, where no disk can be mounted."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["SmallDisk", "limited", "mounted"]


class SmallDisk:
    """A small file system. Get one from `mounted`."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def fill(self) -> None:
        """Fill it to the last block."""
        with (self.place / "other-files").open("ab", buffering=0) as file:
            size = 1 << 16
            while size:
                try:
                    file.write(b"x" * size)
                except OSError:
                    size >>= 1

    def free(self) -> None:
        (self.place / "other-files").unlink()

    @contextmanager
    def full(self) -> Iterator[None]:
        self.fill()
        yield
        self.free()


@contextmanager
def mounted(place: Path) -> Iterator[SmallDisk]:
    """Mount a file system of 16 MB (SQLite's log alone takes 4). Skips the test if none can be mounted."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tidings-test", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if done is None or done.returncode != 0:
        said = "" if done is None else done.stderr.strip()
        pytest.skip(f"no file system can be mounted here ({said}): run as root, in a container with CAP_SYS_ADMIN")
    try:
        yield SmallDisk(place)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextmanager
def limited(pid: int, size: int) -> Iterator[None]:
    """Limit the bytes of each file that a process writes. Skips the test if the system cannot do that."""
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux can limit a process that runs already")
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
