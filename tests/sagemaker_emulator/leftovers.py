"""The record of what an emulator has on the machine, and the removal of what a killed one left."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

PREFIX = "sagemaker-emulator-"
LINK_PREFIX = "smemu"
OWNER_VARIABLE = "SAGEMAKER_EMULATOR_OWNER"


def start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, which tells a reused pid from the original."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def is_alive(pid: int, started: int | None) -> bool:
    """Whether the process that had `pid` when it was recorded still runs."""
    if Path("/proc/self/stat").exists():
        return started is not None and start_time(pid) == started
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


class State:
    """A directory for everything one emulator writes, with a file that says what else belongs to it."""

    def __init__(self, parent: str | Path | None = None) -> None:
        base = Path(parent or tempfile.gettempdir()).resolve()
        self.root = base / f"{PREFIX}{os.getpid()}-{secrets.token_hex(3)}"
        self.root.mkdir(mode=0o755)
        self.owner = self.root.name
        self._lock = threading.Lock()
        self._links: list[str] = []
        self._directories: list[str] = []
        self._write()

    def add_link(self, name: str) -> None:
        """Record a network link."""
        with self._lock:
            self._links.append(name)
            self._write()

    def ensure_mount_point(self, path: Path) -> None:
        """Create a directory outside the emulator's own tree and record what was created."""
        with self._lock:
            missing = [p for p in (path, *path.parents) if not p.exists()]
            self._directories.extend(str(p) for p in missing)
            self._write()
            path.mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        """Remove everything recorded, and the directory itself."""
        _remove(self.root, self._links, self._directories)

    def _write(self) -> None:
        record = {
            "pid": os.getpid(),
            "start_time": start_time(os.getpid()),
            "links": self._links,
            "directories": self._directories,
        }
        temporary = self.root / "state.json.tmp"
        temporary.write_text(json.dumps(record))
        temporary.replace(self.root / "state.json")


def remove_leftovers(parent: str | Path | None = None) -> list[str]:
    """Remove what emulators that no longer run have left; returns the names of what was found."""
    base = Path(parent or tempfile.gettempdir()).resolve()
    found: list[str] = []
    for root in sorted(base.glob(f"{PREFIX}*-*")):
        try:
            record = json.loads((root / "state.json").read_text())
        except (OSError, ValueError):
            record = {"pid": int(root.name.removeprefix(PREFIX).split("-")[0]), "start_time": None}
            if start_time(record["pid"]) is not None:
                continue
        if is_alive(record["pid"], record.get("start_time")):
            continue
        found.append(root.name)
        _remove(root, record.get("links", []), record.get("directories", []))
    for link, pid in _emulator_links():
        if start_time(pid) is None:
            found.append(link)
            _delete_link(link)
    return found


def kill_owned(marker: str) -> None:
    """SIGKILL every process whose environment carries the emulator's marker `marker`."""
    wanted = f"{OWNER_VARIABLE}={marker}".encode()
    for _ in range(20):
        pids = [pid for pid in _pids() if wanted in _environment(pid)]
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _pids() -> Iterable[int]:
    own = os.getpid()
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if int(p.name) != own]


def _environment(pid: int) -> list[bytes]:
    try:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return []
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
    # The value is "<emulator>" or "<emulator>/<job>/<host>": a marker matches itself and what lies below it.
    found = next((v for v in variables if v.startswith(f"{OWNER_VARIABLE}=".encode())), b"")
    parts = found.split(b"/")
    return [b"/".join(parts[: n + 1]) for n in range(len(parts))]


def _remove(root: Path, links: Iterable[str], directories: Iterable[str]) -> None:
    kill_owned(root.name)
    for link in links:
        _delete_link(link)
    for directory in directories:
        with contextlib.suppress(OSError):
            Path(directory).rmdir()
    shutil.rmtree(root, ignore_errors=True)


def _emulator_links() -> list[tuple[str, int]]:
    pattern = re.compile(rf"{LINK_PREFIX}([0-9a-f]+)[nv][0-9a-z]+")
    matches = [pattern.fullmatch(path.name) for path in Path("/sys/class/net").glob(f"{LINK_PREFIX}*")]
    return [(match[0], int(match[1], 16)) for match in matches if match]


def _delete_link(name: str) -> None:
    if Path(f"/sys/class/net/{name}").exists():
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)
