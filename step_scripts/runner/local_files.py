"""Local files: private ones, atomic writes, removal of folders, messages for a full disk."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_DISCARDED = re.compile(r"\..+\.[0-9a-f]{32}\.deleted")
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
    """Open a binary file for writing or appending; a new one has mode 0600."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))


def write_private(path: Path, data: bytes) -> None:
    """Write a new file of mode 0600. Raises `FileExistsError`."""
    with open_private(path, "xb") as file:
        file.write(data)


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
        sync_path(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_path(path: Path) -> None:
    """Sync a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
