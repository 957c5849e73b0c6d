"""Locks that the operating system releases when their holder dies."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

_REFUSED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


class NoLocks(OSError):
    """The file system that a file is on has no locks."""


def try_lock(descriptor: int, path: Path) -> bool:
    """Take an exclusive lock on an open file or folder, which is at `path`; False if another process has it.

    Raises `NoLocks` naming the path and the remedy where the file system refuses locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise NoLocks(
            error.errno,
            "the file system refuses locks (flock), without which two runs could overwrite each other's work. Mount it "
            "with locks (NFS: a lock service, or the option local_lock=flock on a single machine), or let HOUSING_ROOT "
            "name a folder on another disk",
            str(path),
        ) from error
    return True
