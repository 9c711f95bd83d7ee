"""A Debian of another release in a folder, for a server of which this system's packages are too old. It starts nothing.

debootstrap makes it once, as root, from the mirror that apt's own sources name. Its programs see this machine's files,
processes and network, but its /usr and /etc in the place of this machine's. That is so in a mount namespace of their
own: nobody else sees it, and nothing stays mounted when they end.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import machine
from machine import fail

__all__ = ["RELEASES", "Userland", "mirror_in"]

RELEASES = {13: "trixie"}
"""Number of a Debian to the name by which mirrors have it."""
BYTES = 1 << 30
"""Free bytes needed while one is made; 190 MB are kept."""
NOT_NEEDED = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale")
INSIDE = 'mount --bind "$0/etc" /etc && mount --bind "$0/usr" /usr && exec "$@"'
"""Both by this machine's `mount`: /usr comes last."""
NAMESPACE = ("unshare", "--mount", "--propagation", "private")


class Userland:
    """The userland of one server, in the folder TIDINGS_LOCAL_PROGRAMS, or else in var/programs of this checkout."""

    def __init__(self, release: int, package: str) -> None:
        named = os.environ.get("TIDINGS_LOCAL_PROGRAMS")
        self._folder = Path(named).absolute() if named else Path(__file__).resolve().parents[2] / "var" / "programs"
        self.release, self._package = release, package
        self.root = self._folder / f"debian{release}-{package}"

    @staticmethod
    def needed(release: int | None) -> bool:
        """Whether this system is another release, whose own packages will not do."""
        try:
            system = platform.freedesktop_os_release()
        except OSError:  # macOS has none
            system = {}
        return release is not None and (system.get("ID"), system.get("VERSION_ID")) != ("debian", str(release))

    def found(self, pattern: str) -> list[str]:
        """Paths of this pattern as its programs see them, the newest version first."""
        return sorted((f"/{place.relative_to(self.root)}" for place in self.root.glob(pattern)), reverse=True)

    def command(self, *words: str) -> list[str]:
        """The command line that runs a program of it. The program gets the process id of whoever runs this."""
        return [*NAMESPACE, "sh", "-c", INSIDE, str(self.root), *words]

    def make(self) -> None:
        """Make it, unless it is there. Two at once: the second one waits. Takes a minute or two."""
        self._check()
        with self._alone() as lock:
            if not self.root.exists():
                self._bootstrap(lock)

    def _check(self) -> None:
        """Fail where it can be neither made nor used."""
        what = f"{self._package} of Debian {self.release}"
        if not shutil.which("apt-get") or not shutil.which("unshare"):
            fail(f"{what} runs only on Debian. Leave --release out, and install a {self._package} of your own")
        if os.geteuid() != 0:
            fail(
                f"{what} needs root on this machine: its userland is made by debootstrap, and seen through mounts. Run "
                "the same command with sudo, or leave --release out"
            )
        if not Path("/bin").is_symlink():
            fail(f"{what} needs a system whose /bin is a link to /usr/bin:  apt-get install usrmerge")
        if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode != 0:
            fail(
                f"{what} needs mounts in a namespace of its own, and this root may not make one. Give the container "
                "CAP_SYS_ADMIN (docker run --cap-add SYS_ADMIN --security-opt apparmor=unconfined), or leave --release "
                "out"
            )

    @contextmanager
    def _alone(self) -> Iterator[int]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock.fileno()

    def _bootstrap(self, lock: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < BYTES:
            fail(f"a userland in {self._folder} needs {BYTES >> 20} MB while it is made, and {free >> 20} MB are free")
        if not shutil.which("debootstrap"):
            machine.apt_install("debootstrap")
        name, mirror, log = RELEASES[self.release], _mirror(), self.root.with_suffix(".log")
        half = self.root.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)  # of one that was killed: its mounts ended with it
        print(f"making a userland of Debian {self.release} in {self.root} (once) ...", file=sys.stderr, flush=True)
        command = ["debootstrap", "--variant=minbase", f"--include={self._package}", name, str(half), mirror]
        with log.open("w") as said:
            made = subprocess.run(
                [*NAMESPACE, *command], stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=_proxied(), check=False,
                pass_fds=(lock,),  # if this process is killed, the next one waits until debootstrap has ended, too
            )  # fmt: skip
        if made.returncode != 0:
            shutil.rmtree(half, ignore_errors=True)
            last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            fail(
                f"{' '.join(command)} failed (code {made.returncode}):\n{last}\n(the whole of it is in {log}). See "
                f"whether {mirror} can be reached (apt-get update) and has {name}, and try again"
            )
        for place in NOT_NEEDED:
            shutil.rmtree(half / place, ignore_errors=True)
        (half / "etc" / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        half.rename(self.root)
        log.unlink()


def mirror_in(targets: str) -> str | None:
    """The first address of Debian itself among `ADDRESS ORIGIN LABEL` lines of apt: not of its security updates."""
    found = re.search(r"^((?:https?|file):\S+) Debian Debian$", targets, re.MULTILINE)
    return found[1] if found else None


def _mirror() -> str:
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL)", "Created-By: Packages"]
    for _ in range(2):
        if found := mirror_in(subprocess.run(command, capture_output=True, text=True, check=True).stdout):
            return found
        # Without its lists, apt does not know whose the mirrors are.
        subprocess.run(["apt-get", "update", "-qq"], stdout=sys.stderr, check=False)
    return fail(
        "apt's sources name no mirror of Debian over http, https or file, so there is nothing to make a userland from: "
        "see  apt-get indextargets  and /etc/apt/sources.list.d"
    )


def _proxied() -> dict[str, str]:
    """The environment, with the proxies that apt uses: debootstrap's wget does not know of them."""
    proxies = {}
    for scheme in ("http", "https"):
        command = ["apt-config", "shell", "PROXY", f"Acquire::{scheme}::Proxy"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if found := re.search(r"PROXY='(.+)'", shown):
            proxies[f"{scheme}_proxy"] = found[1]
    return os.environ | proxies
