"""A lock between processes that the operating system releases when its holder dies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from step_scripts.runner.locking import try_lock
from step_scripts.runner.private_files import private_folder


@contextmanager
def file_lock(path: Path, timeout_seconds: float, purpose: str) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if absent, never removed) during the block.

    Raises `TimeoutError` naming file and `purpose` if another process or thread still holds it after
    `timeout_seconds`, `NoLocks` where the file system refuses locks.
    """
    private_folder(path.parent)
    deadline = time.monotonic() + timeout_seconds
    with path.open("a") as file:
        while not try_lock(file.fileno(), path):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{purpose}: another process has held {path} for more than {timeout_seconds:g} s")
            time.sleep(0.02)
        yield
