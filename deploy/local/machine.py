"""What `deploy/local` needs of this machine: processes, ports, installed programs. It knows nothing of brokers.

Processes are told by pid and start time, since pids are used again.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

__all__ = [
    "Process",
    "all_stopped",
    "answers",
    "apt_install",
    "children",
    "end",
    "erlang",
    "fail",
    "free_port",
    "holder_of",
    "process_of",
    "runs",
    "signal_all",
    "wait_for",
]

STOPPED_WITHIN = 30.0  # seconds, then it is killed

Process = dict[str, Any]
"""`{"pid": 1234, "started": "..."}`, as it is kept in a file."""


def process_of(pid: int) -> Process:
    return {"pid": pid, "started": started(pid)}


def started(pid: int) -> str | None:
    """When a process began, in the system's own words; None for one that is gone or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (FileNotFoundError, ProcessLookupError):  # gone before the file was opened, or while it was read
        if Path("/proc/self/stat").exists():
            return None
    shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    stat, _, since = shown.stdout.strip().partition(" ")
    return None if not stat or stat.startswith("Z") else since.strip()


def runs(process: Process | None) -> bool:
    return process is not None and process["started"] is not None and started(process["pid"]) == process["started"]


def all_stopped(pid: int) -> bool:
    """Whether a SIGSTOP has reached every thread; None of them is looked at where the system cannot say."""
    try:
        threads = [thread.read_text() for thread in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile: it was not stopped
        return False
    if not threads:
        shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return shown.stdout.strip().startswith("T")
    return all(thread.rpartition(")")[2].split()[0] == "T" for thread in threads)


def children(pid: int) -> list[Process]:
    """The processes that it started and that have not ended."""
    if Path("/proc/self/stat").exists():
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):  # gone meanwhile
                if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                    found.append(int(stat.parent.name))
    else:
        shown = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        found = [int(child) for child, parent in map(str.split, shown.splitlines()) if parent == str(pid)]
    return [process for process in map(process_of, found) if process["started"] is not None]


def signal_all(processes: Iterable[Process], number: signal.Signals) -> None:
    """To those that have not ended."""
    for process in processes:
        if runs(process):
            with suppress(ProcessLookupError):
                os.kill(process["pid"], number)


def end(process: Process, how: signal.Signals) -> None:
    """Send a signal, and wait until the process is gone; after `STOPPED_WITHIN` it is killed."""
    if not runs(process):
        return
    pid = process["pid"]
    with suppress(ProcessLookupError):  # gone since it was looked at
        os.kill(pid, how)
        if how != signal.SIGKILL:
            os.kill(pid, signal.SIGCONT)  # one that is paused could not hear it
        until = time.monotonic() + STOPPED_WITHIN
        while runs(process):
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def free_port(wanted: int, taken: Collection[int] = ()) -> int:
    """`wanted` if nobody has it, else any below those that clients get: it must still be free at a restart."""
    candidates = (wanted, *random.sample(range(20_000, 32_000), 100))  # no secret  # nosec B311
    found = next((port for port in candidates if port and port not in taken and _is_free(port)), None)
    return found or fail("none of 100 TCP ports of 127.0.0.1 between 20000 and 32000 is free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def holder_of(port: int) -> str:
    """Who listens on a port, where `ss` is installed and may know it; else how to find out."""
    if shutil.which("ss") is None:
        return f"see by whom:  lsof -i TCP:{port} -s TCP:LISTEN"
    command = ["ss", "-Hltnp", f"sport = :{port}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r'"([^"]+)",pid=(\d+)', shown)
    return f"by {found[1]}, process {found[2]}" if found else f"see by whom, as root:  ss -ltnp 'sport = :{port}'"


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def erlang(program: str) -> str | None:
    """A program of Erlang's runtime: on the PATH, or where the runtime says it is at home."""
    if found := shutil.which(program):
        return found
    erl = shutil.which("erl")
    if erl is None:
        return None
    root = Path(erl).resolve().parents[1]
    return shutil.which(program, path=os.pathsep.join(str(folder) for folder in root.glob("erts-*/bin")))


def apt_install(package: str) -> None:
    """Install as root on Debian and its kin, without starting the package's system service."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()  # the package would start a system service: nothing may run that we did not start
    try:
        if ours:
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
        quiet: dict[str, Any] = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "stdout": sys.stderr}
        subprocess.run(["apt-get", "update", "-qq"], check=True, **quiet)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", package], check=True, **quiet)
    except subprocess.CalledProcessError as error:
        fail(f"{' '.join(error.cmd)} failed (code {error.returncode}): see above, mend it, and try again")
    finally:
        if ours:
            policy.unlink(missing_ok=True)


def wait_for(condition: Callable[[], object], seconds: float, complaint: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            fail(complaint)
        time.sleep(0.05)


def fail(complaint: str) -> NoReturn:
    print(complaint, file=sys.stderr)
    sys.exit(1)
