"""Temporary folders of Ray sessions, and the processes that belong to them.

A folder is private (mode 0700), carries a marker, and is locked for as long as a process needs it. The operating system
releases the lock with that process, however it ends and whatever process gets its number later: a marked folder that is
not locked is abandoned. Nothing else is ever removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PREFIXES = ("housing-", "ray-")
FOLDER_VARIABLE = "HOUSING_RAY_FOLDER"  # in the environment of every process of the session
MARKER = ".housing-session.json"
_CREATE_TIME_TOLERANCE = 0.05  # seconds; psutil derives it from the boot time, which may be adjusted slightly
_END_SECONDS = 5.0


@dataclass
class SessionFolder:
    """A folder made by this process. `lock` is an open descriptor: whoever has it keeps the folder from removal."""

    path: Path
    lock: int

    @contextlib.contextmanager
    def recording(self, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Within the block the session's first process is started; `pid` and `started` are added to what is yielded.

        Who reads the record meanwhile waits: there is no moment at which the process is there and nobody can know.
        """
        with (self.path / MARKER).open("r+") as file, _locked(file.fileno(), fcntl.LOCK_EX):
            yield facts
            file.seek(0)
            file.truncate()
            json.dump(facts, file)
            file.flush()

    def remove(self) -> None:
        """Remove the folder, and let go of it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let go of the folder, which another process may still need."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


def make_folder(prefix: str, parent: str | None = None) -> SessionFolder:
    """A new folder with a marker, locked. `prefix` is one of `PREFIXES`; `parent` is Python's choice if None."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))  # mode 0700
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    # A file system without locks cannot tell who is alive: the folder is then never taken for abandoned.
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
    (path / MARKER).write_text("{}")
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
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            end_processes(processes_of(path))
            shutil.rmtree(path)
            removed.append(path)
        except OSError:
            continue
        finally:
            os.close(descriptor)
    return removed


def recorded_sessions() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folders of this user's sessions, with what was recorded of each. Waits for a session that is being started."""
    for path in _marked_folders():
        with contextlib.suppress(OSError, ValueError):
            with (path / MARKER).open() as file, _locked(file.fileno(), fcntl.LOCK_SH):
                record = json.load(file)
            if record:
                yield path, record


def recorded_process(record: dict[str, Any]) -> psutil.Process | None:
    """The session's first process, if it is alive. A later process with its number is not taken for it."""
    with contextlib.suppress(psutil.Error, KeyError):
        process = psutil.Process(record["pid"])
        same = abs(process.create_time() - record["started"]) <= _CREATE_TIME_TOLERANCE
        if same and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


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
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def end_processes(processes: list[psutil.Process], seconds: float = 0.0) -> None:
    """End processes: with SIGTERM if they have `seconds` for it, then by force. Those that have ended do not matter."""
    alive = processes
    if seconds:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=_END_SECONDS)


def _marked_folders() -> Iterator[Path]:
    for parent in dict.fromkeys([Path("/tmp"), Path(tempfile.gettempdir())]):
        for prefix in PREFIXES:
            for path in sorted(parent.glob(f"{prefix}*")):
                with contextlib.suppress(OSError):
                    own = path.lstat().st_uid == os.geteuid()
                    if own and path.is_dir() and not path.is_symlink() and (path / MARKER).is_file():
                        yield path


@contextlib.contextmanager
def _locked(descriptor: int, kind: int) -> Iterator[None]:
    with contextlib.suppress(OSError):  # see `make_folder`
        fcntl.flock(descriptor, kind)
    yield
