"""What a Ray session finds on its machine: environment variables, open ports, usable CPUs, its temporary folder.

The folder is private (mode 0700), carries a marker, and is locked as long as a process needs it. The operating system
releases the lock with that process, however it ends. A marked folder that is not locked is abandoned. Nothing else is
ever removed. Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from step_scripts.runner.local_files import open_private, try_lock
from step_scripts.runner.processes import end_processes

PREFIXES = ("housing-", "ray-")
FOLDER_VARIABLE = "HOUSING_RAY_FOLDER"  # in the environment of every process of the session
MARKER = ".housing-session"
_POLARS_ALLOCATOR = "_RJEM_MALLOC_CONF"
_IDLE_WORKERS = "RAY_num_workers_soft_limit"
_WORKER_ENVIRONMENT = {
    # XGBoost's threads would otherwise spin while they wait for each other. If other processes use the same cores, a
    # fit on two threads then takes up to 30 times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
    # There is a worker for each CPU.
    "POLARS_MAX_THREADS": "1",
    # glibc would return the memory of large columns to the system at once. Getting it back, zeroed page by page, took
    # over a quarter of the CPU time of ingestion on a virtual machine. Workers keep up to 256 MiB. Polars has its own
    # allocator, which would return freed memory after half a second.
    "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
    _POLARS_ALLOCATOR: "dirty_decay_ms:10000",
}


def environment_defaults(values: Mapping[str, str]) -> contextlib.AbstractContextManager[None]:
    """Set those of `values` that the user has not set, for the block."""
    return environment_set({name: value for name, value in values.items() if name not in os.environ})


@contextlib.contextmanager
def environment_set(values: Mapping[str, str]) -> Iterator[None]:
    """Set `values`, whatever there is, for the block."""
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            os.environ.pop(name, None)
        os.environ.update(before)


def worker_environment() -> dict[str, str]:
    """Settings of the processes that Ray starts. What the user has set is kept, except how soon Polars gives memory
    back.
    """
    chosen = {name: os.environ.get(name, value) for name, value in _WORKER_ENVIRONMENT.items()}
    # Polars sets this variable when it is imported, and child processes inherit it. Of several values the last counts.
    given = os.environ.get(_POLARS_ALLOCATOR)
    chosen[_POLARS_ALLOCATOR] = ",".join(filter(None, (given, _WORKER_ENVIRONMENT[_POLARS_ALLOCATOR])))
    return chosen


def session_environment(num_cpus: int) -> dict[str, str]:
    """`worker_environment`, and how many idle workers are kept.

    Ray ends idle workers when there are more processes than CPUs, so the actors of a search would displace those that
    the next step uses. Twice as many are kept.
    """
    return {**worker_environment(), _IDLE_WORKERS: os.environ.get(_IDLE_WORKERS, str(2 * num_cpus))}


@contextlib.contextmanager
def only_needed_processes() -> Iterator[None]:
    """Have Ray start none of the four processes that have nothing to do in a private session or a job's cluster.

    These are the log monitor (no logs are sent to the driver), the autoscaler's monitor (no node is ever added), Ray
    Client's server (it listens to the network, and nobody uses it) and the dashboard's server, for which Ray waits
    although there is no dashboard: most of the time that it takes to start. `ray start` has options for two of them,
    `ray.init` has none, so Ray's own functions are replaced meanwhile.
    """
    from ray._private import parameter, services

    params, start_api_server = parameter.RayParams, services.start_api_server
    fewer: dict[str, Any] = {"include_log_monitor": False, "no_monitor": True, "ray_client_server_port": None}
    parameter.RayParams = lambda **given: params(**{**given, **fewer})
    services.start_api_server = lambda *_, **__: ("", None)  # its address and process, as where it cannot be started
    try:
        yield
    finally:
        parameter.RayParams, services.start_api_server = params, start_api_server


def require_token(folder: Path, token: str | None = None) -> None:
    """Have Ray refuse whoever does not know a secret in a file in `folder`: its ports are open to the network.

    Where `RAY_AUTH_MODE` says nothing, `ray.init` wants a token for what it starts; `ray start` has to be told. What
    the user has set is for other clusters.
    """
    path = folder / "ray_token"
    if not path.exists():
        with open_private(path, "xb") as file:
            file.write((token or secrets.token_hex(32)).encode())
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # the token itself would win over the file
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    # Ray recommends to choose a mode.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


def use_token_if_present() -> None:
    """Have Ray use the token that is on this machine, if there is one. Ray reads the setting when it is imported.

    A cluster without authentication ignores the token.
    """
    home = os.environ.get("HOME")
    file = home is not None and os.access(Path(home, ".ray", "auth_token"), os.R_OK)
    if file or os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def is_open(address: str, port: int, seconds: float = 1.0) -> bool:
    """Whether something accepts TCP connections there."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), seconds):
        return True
    return False


def available_cpus() -> int:
    """CPUs that this process may use, at least 1. Ray itself would count all CPUs of the machine.

    Affinity (`taskset`) limits them, and the quotas of control groups, which containers and systemd set.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *map(int, _cpu_quotas(Path("/")))]))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """CPUs that the control groups of this process allow, in both versions of Linux's interface below `root`."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, name in (line.split(":", 2) for line in lines):
        version_2 = controllers == ""
        if not version_2 and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("" if version_2 else "cpu")
        # Inside a container the path is often that of the host; the group's files are then at the top.
        own = top / name.strip("/")
        for group in [top, *(p for p in [own, *own.parents] if p.is_relative_to(top) and p != top)]:
            files = ["cpu.max"] if version_2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
            with contextlib.suppress(OSError, ValueError):
                quota, period = " ".join((group / file).read_text() for file in files).split()
                if float(quota) > 0:  # "max" is no number, -1 no limit
                    yield float(quota) / float(period)


@dataclass
class SessionFolder:
    """A folder. `lock` is an open descriptor, -1 if the folder is another process's: who inherits it holds the lock."""

    path: Path
    lock: int = -1

    def remove(self) -> None:
        """Remove the folder, and release its lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Release the lock. Another process may still hold it."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


def make_folder(prefix: str, parent: str | None = None) -> SessionFolder:
    """A new folder with a marker, locked. `prefix` is one of `PREFIXES`; `parent` is Python's choice if None."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))  # mode 0700
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    # Without locks nobody can tell which folders are in use, so none is ever removed as abandoned.
    with contextlib.suppress(OSError):
        try_lock(lock, path)
    (path / MARKER).touch()
    return SessionFolder(path, lock)


def remove_abandoned() -> list[Path]:
    """End what is left of this user's sessions whose processes were killed, and remove their folders.

    Returns the folders. What cannot be removed stays for the next time.
    """
    removed = []
    for path in _marked_folders():
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        with contextlib.suppress(OSError):
            if try_lock(descriptor, path):
                end_processes(processes_of(path))
                shutil.rmtree(path)
                removed.append(path)
        os.close(descriptor)
    return removed


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes of the session in `folder`, oldest first, whoever their parents are now.

    Some of Ray's overwrite their environment with a title; all have log files below the folder open.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            if environment.get(FOLDER_VARIABLE) == str(folder) or (
                not environment and any(Path(file.path).is_relative_to(folder) for file in process.open_files())
            ):
                found.append((process.create_time(), process))
    return [process for _, process in sorted(found, key=lambda entry: entry[0])]


def _marked_folders() -> Iterator[Path]:
    parents = dict.fromkeys([Path("/tmp"), Path(tempfile.gettempdir())])
    for path in (found for parent in parents for prefix in PREFIXES for found in sorted(parent.glob(f"{prefix}*"))):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.geteuid() and not path.is_symlink() and (path / MARKER).is_file():
                yield path
