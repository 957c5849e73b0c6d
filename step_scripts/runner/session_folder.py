"""Temporary folders of Ray sessions, and the processes that belong to them.

A folder is private (mode 0700), carries a marker, and is locked as long as a process needs it. The operating system
releases the lock with that process, however it ends. A marked folder that is not locked is abandoned. Nothing else is
ever removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from step_scripts.runner.locking import try_lock
from step_scripts.runner.processes import end_processes

PREFIXES = ("housing-", "ray-")
FOLDER_VARIABLE = "HOUSING_RAY_FOLDER"  # in the environment of every process of the session
MARKER = ".housing-session"


@dataclass
class SessionFolder:
    """A folder made by this process. `lock` is an open descriptor: a process that inherits it holds the lock too."""

    path: Path
    lock: int

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
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def _marked_folders() -> Iterator[Path]:
    parents = dict.fromkeys([Path("/tmp"), Path(tempfile.gettempdir())])
    for path in (found for parent in parents for prefix in PREFIXES for found in sorted(parent.glob(f"{prefix}*"))):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.geteuid() and not path.is_symlink() and (path / MARKER).is_file():
                yield path
