"""Local files: private ones, atomic writes, states, locks, removal of folders, messages for a full disk."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_DISCARDED = re.compile(r"\..+\.[0-9a-f]{32}\.deleted")
_WITHOUT_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_INODE = " inode "
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Libraries in other languages pass on the reason as text only; NumPy only counts the items that it could not write.
_FULL_TEXTS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|os error (28|122|27)\b|\d+ requested and \d+ written"
)


def private_folder(path: Path) -> None:
    """Create the folder and its missing parents, each with mode 0700. Existing ones keep their mode."""
    if not path.parent.exists():
        private_folder(path.parent)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise FileExistsError(f"{path} is no folder") from None


def open_private(path: Path, mode: str = "wb") -> IO[bytes]:
    """Open a binary file for writing, appending, or creating it; a new one has mode 0600."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file open for writing, which takes the place of `target` when the block has ended; nothing does if it fails."""
    private_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with file_named(target), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_files(root: Path, paths: Iterable[str] = ()) -> None:
    """Sync the files at `paths` below `root`, their folders, and the folder of `root`: so they survive a power cut.

    Call it before the file that commits them is written.
    """
    root = root.absolute()
    files = [root / path for path in paths]
    folders = {root, root.parent}
    for file in files:
        folders.update(folder for folder in file.parents if folder.is_relative_to(root))
    for path in [*files, *folders]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class FileState:
    """The state of a file. `modified`: seconds since 1970. `change` differs whenever the file is written or replaced.

    Size and time of modification do not tell: `cp -p`, `rsync --times` and `touch -r` keep both. The writer of a file
    cannot keep the time of change and the inode of a local file, or the ETag of an object on S3. S3's version id would
    add nothing: versions with the same ETag have the same content, and a listing does not include it.
    """

    bytes: int
    modified: float
    change: str


def local_state(found: os.stat_result) -> FileState:
    """The state of a local file: `change` is the time of change in ns and the inode."""
    return FileState(found.st_size, found.st_mtime_ns / 1e9, f"{found.st_ctime_ns}{_INODE}{found.st_ino}")


def lasting(change: str) -> str:
    """`change` without the inode, which some file systems (sshfs, s3fs) make up anew for each call.

    For comparisons of a file that has not been replaced. There the inode would only cause a needless read.
    """
    return change.partition(_INODE)[0]


def discard_folder(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that it is gone from its place at once.

    Raises `OSError` if something in it cannot be removed; `discarded_folders` then lists what is left. Does nothing if
    there is no such folder.
    """
    doomed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.deleted")
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed)


def discarded_folders(parent: Path) -> list[Path]:
    """What is left, directly in `parent`, of folders whose removal was interrupted or has failed."""
    return sorted(p for p in parent.iterdir() if _DISCARDED.fullmatch(p.name)) if parent.is_dir() else []


class NoLocks(OSError):
    """The file system that a file is on has no locks."""


@contextmanager
def file_lock(path: Path, timeout_seconds: float, purpose: str) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if absent, never removed) during the block.

    The operating system releases it when its holder dies. Raises `TimeoutError` naming file and `purpose` if another
    process or thread still holds it after `timeout_seconds`, `NoLocks` where the file system refuses locks.
    """
    from filelock import FileLock, Timeout  # the endpoint in AWS's image has none, and takes no lock

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
    from filelock import lock_descriptor

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


@contextmanager
def file_named(path: Path) -> Iterator[None]:
    """For a block that writes `path`: adds the file to an error that comes from a full disk and names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and _is_full(error):
            number = error.errno or errno.ENOSPC
            raise OSError(number, f"{os.strerror(number)} ({_room(path)})", str(path)) from error
        raise


def explain_full_disk(error: BaseException, places: Iterable[str | Path]) -> str | None:
    """The message if `error`, or anything in its chain of causes, comes from a full disk; else None.

    `places` are the folders that may be meant if the error names no file.
    """
    chain: list[BaseException] = [error]
    for one in chain:  # grows
        causes = (getattr(one, "cause", None), one.__cause__, one.__context__)  # `cause` is Ray's
        chain += [cause for cause in causes if isinstance(cause, BaseException) and cause not in chain]
    full = [one for one in chain if _is_full(one)]
    if not full:
        return None
    known = [one for one in full if isinstance(one, OSError)]
    reason = os.strerror(next((one.errno for one in known if one.errno in _FULL), errno.ENOSPC))
    # Ray Data puts other text where the name should be.
    named = next((name for one in known if Path(name := str(one.filename or "")).is_absolute()), None)
    if named is not None:
        what = f"{named} could not be written: {reason} ({_room(Path(named))})"
    else:
        rooms = "; ".join(f"{place}: {_room(Path(place))}" for place in dict.fromkeys(map(str, places)))
        what = f"a file could not be written: {reason} ({rooms})"
    return (
        f"{what}. Free some space, for instance with job prune, or let HOUSING_ROOT or TMPDIR name a folder on a "
        "larger disk; then launch the run again. What this step had written has been removed"
    )


def _is_full(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in _FULL) or _FULL_TEXTS.search(str(error)) is not None


def _room(path: Path) -> str:
    """How much is free where `path` is, or would be."""
    absolute = path.absolute()
    usage = shutil.disk_usage(next(place for place in (absolute, *absolute.parents) if place.exists()))
    return f"{usage.free:,} of {usage.total:,} bytes are free there"
