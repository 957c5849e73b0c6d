"""Messages for a full disk: which file, how much space is free there, what to do."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Libraries in other languages pass on the reason as text only; NumPy only counts the items that it could not write.
_TEXTS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|os error (28|122|27)\b|\d+ requested and \d+ written"
)


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
    seen: list[BaseException] = []
    following: list[BaseException | None] = [error]
    while following:
        one = following.pop(0)
        if one is None or one in seen:
            continue
        seen.append(one)
        following += [getattr(one, "cause", None), one.__cause__, one.__context__]
    full = [one for one in seen if isinstance(one, BaseException) and _is_full(one)]
    if not full:
        return None
    names = [str(one.filename) for one in full if isinstance(one, OSError) and one.filename]
    named = next((name for name in names if Path(name).is_absolute()), None)  # Ray Data puts other text there
    if named is not None:
        what = f"{named} could not be written: {_reason(full)} ({_room(Path(named))})"
    else:
        rooms = "; ".join(f"{place}: {_room(Path(place))}" for place in dict.fromkeys(map(str, places)))
        what = f"a file could not be written: {_reason(full)} ({rooms})"
    return (
        f"{what}. Free some space, for instance with job prune, or let HOUSING_ROOT or TMPDIR name a folder on a "
        "larger disk; then launch the run again. What this step had written has been removed"
    )


def _is_full(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in _FULL) or _TEXTS.search(str(error)) is not None


def _reason(errors: list[BaseException]) -> str:
    numbers = [one.errno for one in errors if isinstance(one, OSError) and one.errno in _FULL]
    return os.strerror(numbers[0] if numbers and numbers[0] else errno.ENOSPC)


def _room(path: Path) -> str:
    """How much is free where `path` is, or would be."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    usage = shutil.disk_usage(place)
    return f"{usage.free:,} of {usage.total:,} bytes are free there"
