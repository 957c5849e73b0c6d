"""Finds source files: a path, a folder, a glob, or any of these below `s3://`."""

from __future__ import annotations

import io
import re
import stat
from pathlib import Path

from resources.sources.folder_search import Listing, matching, shown
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.storage import file_state

_TAIL_BYTES = 1024
_WILDCARD = re.compile(r"[*?\[]")


def list_source(source: str) -> Listing:
    """What `source` names: one file, the CSV files of a folder, or what matches a glob.

    A folder's files end with `.csv`, in upper or lower case. In a glob `*` and `?` stay within one folder and `**`
    crosses folders. `~` is the home folder. Empty files are returned too: reading them tells what is wrong. Names that
    begin with `.` or `_` are left out unless named exactly. Raises `StepError` with the pattern, the folder searched
    and a remedy if nothing is found.
    """
    text = source.strip()
    if not text:
        raise StepError("no source is configured: name a CSV file, a folder, a glob or an s3:// URI")
    try:
        path = absolute(text)
        kind, found, looked = _kind(path), Listing(), path.rpartition("/")[0]
        if kind == "file":
            found.add(path, file_state(path))
        elif kind == "folder":
            found, looked = matching(path, "*.csv", re.IGNORECASE), path
        elif wildcard := _WILDCARD.search(path):
            slash = path.rfind("/", 0, wildcard.start())
            looked = path[:slash].rstrip("/") or "/"
            found = matching(looked, path[slash + 1 :])
    except ValueError as error:
        raise StepError(f"source {source!r}: {error}") from error
    except OSError as error:
        raise StepError(f"source {source!r} cannot be reached: {error}") from error
    if found.closed:
        raise StepError(f"source {source!r} cannot be read: {found.closed[0]}")
    if not found.files:
        aside = f". Set aside: {'; '.join(map(str, found.set_aside[:5]))}" if found.set_aside else ""
        raise StepError(_not_found(source, looked) + aside)
    return found


def list_landing(place: str) -> Listing | None:
    """The CSV files in `place` and in all folders below it; None if there is no such place.

    A folder that cannot be listed is set aside. Raises `StepError` if the place itself cannot be reached.
    """
    try:
        path = absolute(place)
        if _kind(path) is None and not storage.is_remote(path):
            return None
        found = matching(path, "**/*.csv", re.IGNORECASE)
    except (OSError, ValueError) as error:
        raise StepError(f"landing place {place!r} cannot be reached: {error}") from error
    if found.closed and found.closed[0].name == shown(path):
        raise StepError(f"landing place {place!r} cannot be read: {found.closed[0]}")
    found.set_aside = sorted([*found.set_aside, *found.closed], key=lambda a: a.name)
    return found


def ends_within_a_line(uri: str) -> bool:
    """Whether the last line of a file has no line end, as in one that is still being written or was cut off.

    False for a file that cannot be read: whoever reads it tells why.
    """
    try:
        with storage.open_input(uri) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            return not file.read().rstrip(b" \t").endswith((b"\n", b"\r"))
    except OSError:
        return False


def expanded(uri: str) -> str:
    """`uri` with `~` or `~user` at its beginning replaced by that home folder."""
    if not uri.startswith("~"):
        return uri
    try:
        return str(Path(uri).expanduser())
    except RuntimeError:  # nobody of that name: there is no such folder
        return uri


def absolute(uri: str) -> str:
    """The absolute local path, with the home folder for `~`; or the URI, without a slash at its end."""
    return uri.rstrip("/") if storage.is_remote(uri) else str(storage.local_path(expanded(uri)).absolute())


def _kind(path: str) -> str | None:
    """`file`, `folder`, or None if there is nothing. Raises `ValueError` for what is neither local nor on S3."""
    if not storage.is_remote(path):
        try:
            mode = Path(path).stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise OSError("it is neither a regular file nor a folder")
        return "folder" if stat.S_ISDIR(mode) else "file"
    from pyarrow import fs

    filesystem, place = storage.filesystem(path)
    kinds = {fs.FileType.File: "file", fs.FileType.Directory: "folder"}
    return kinds.get(filesystem.get_file_info(place).type)


def _not_found(source: str, folder: str) -> str:
    from pyarrow import fs

    message = f"nothing matches the source {source!r}: "
    if storage.is_remote(folder):
        filesystem, place = storage.filesystem(folder)
        if filesystem.get_file_info(place).type == fs.FileType.NotFound:
            return message + f"the folder {folder} does not exist. Correct the path of the source"
        names = [i.base_name for i in filesystem.get_file_info(fs.FileSelector(place, recursive=False))]
    elif not Path(folder or "/").is_dir():
        return message + f"the folder {shown(folder)} does not exist. Correct the path of the source"
    else:
        names = [shown(entry.name) for entry in Path(folder or "/").iterdir()]
    visible = sorted(name for name in names if not name.startswith("."))
    more = f" and {len(visible) - 8} more" if len(visible) > 8 else ""
    holds = ", ".join(visible[:8]) + more if visible else "nothing"
    return message + (
        f"searched {shown(folder)}, which holds {holds}. "
        "Give a CSV file, a folder of *.csv files or a glob such as 'folder/*.csv'"
    )
