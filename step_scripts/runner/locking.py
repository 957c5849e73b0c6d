"""Locks between processes. A module of its own: AWS's image, in which the endpoint reads files, has no `filelock`."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor

from step_scripts.runner.local_files import private_folder

_WITHOUT_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


class NoLocks(OSError):
    """The file system that a file is on has no locks."""


@contextmanager
def file_lock(path: Path, timeout_seconds: float, purpose: str) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if absent, never removed) during the block.

    The operating system releases it when its holder dies. Raises `TimeoutError` naming file and `purpose` if another
    process or thread still holds it after `timeout_seconds`, `NoLocks` where the file system refuses locks.
    """
    private_folder(path.parent)
    lock = FileLock(path, timeout_seconds, mode=0o600, poll_interval=0.02, fallback_to_soft=False)
    with _refusal_explained(path):
        try:
            lock.acquire()
        except Timeout as error:
            message = f"{purpose}: another process has held {path} for more than {timeout_seconds:g} s"
            raise TimeoutError(message) from error
    try:
        yield
    finally:
        lock.release()


def try_lock(descriptor: int, path: Path) -> bool:
    """Take an exclusive lock on an open file or folder, which is at `path`; False if another process has it.

    Raises `NoLocks` naming the path and the remedy where the file system refuses locks.
    """
    with _refusal_explained(path):
        return lock_descriptor(descriptor, blocking=False)


@contextmanager
def _refusal_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        raise NoLocks(
            error.errno,
            "the file system refuses locks (flock), without which two runs could overwrite each other's work. Mount it "
            "with locks (NFS: a lock service, or the option local_lock=flock on a single machine), or let HOUSING_ROOT "
            "name a folder on another disk",
            str(path),
        ) from error
