"""Finds source files: a path, a folder, a glob, or any of these below `s3://`."""

from __future__ import annotations

import fnmatch
import io
import re
from typing import TYPE_CHECKING

from step_scripts import storage
from step_scripts.contract import StepError
from step_scripts.parameters import SourceFile

if TYPE_CHECKING:
    from pyarrow import fs

_TAIL_BYTES = 1024
_WILDCARD = re.compile(r"[*?\[]")


def find_source_files(source: str) -> tuple[SourceFile, ...]:
    """The files that `source` names, sorted by URI: one file, the `*.csv` files of a folder, or what matches a glob.

    In a glob `*` and `?` stay within one folder and `**` crosses folders. Empty files are returned too: reading them
    tells what is wrong. Names that begin with `.` or `_` are left out unless named exactly. Raises `StepError` with the
    pattern, the folder searched and a remedy if nothing is found.
    """
    text = source.strip()
    if not text:
        raise StepError("no source is configured: name a CSV file, a folder, a glob or an s3:// URI")
    try:
        filesystem, path = storage.filesystem(text)
    except ValueError as error:
        raise StepError(f"source {source!r}: {error}") from error
    prefix = text.partition("://")[0] + "://" if storage.is_remote(text) else ""
    from pyarrow import fs

    try:
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.File:
            found, looked = [info], path
        elif info.type == fs.FileType.Directory:
            found, looked = _matching(filesystem, path, "*.csv"), path
        elif _WILDCARD.search(path):
            looked, pattern = _split_glob(path)
            found = _matching(filesystem, looked, pattern)
        else:
            found, looked = [], path.rpartition("/")[0]
    except OSError as error:
        raise StepError(f"source {source!r} cannot be reached: {error}") from error
    if not found:
        raise StepError(_not_found(filesystem, source, prefix, looked))
    files = (SourceFile(uri=prefix + i.path, bytes=i.size or 0, modified=_modified(i)) for i in found)
    return tuple(sorted(files, key=lambda f: f.uri))


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


def _modified(info: fs.FileInfo) -> float:
    return (info.mtime_ns or 0) / 1e9


def _split_glob(path: str) -> tuple[str, str]:
    """The folder before the first wildcard, and the rest."""
    folder, rest = "", path
    while "/" in rest and not _WILDCARD.search(part := rest.partition("/")[0]):
        folder, rest = f"{folder}{part}/", rest.removeprefix(f"{part}/")
    return folder.rstrip("/") or "/", rest


def _matching(filesystem: fs.FileSystem, folder: str, pattern: str) -> list[fs.FileInfo]:
    from pyarrow import fs

    deep = "/" in pattern
    selector = fs.FileSelector(folder, recursive=deep, allow_not_found=True)
    # One segment at a time, so that `*` stays within a folder; fnmatch has no notion of folders.
    segments = [".*" if part == "**" else fnmatch.translate(part) for part in pattern.split("/")]
    matched = []
    for info in filesystem.get_file_info(selector):
        relative = info.path.removeprefix(folder.rstrip("/") + "/")
        parts = relative.split("/")
        if (
            info.type == fs.FileType.File
            and not any(part.startswith((".", "_")) for part in parts)
            and _segments_match(parts, segments)
        ):
            matched.append(info)
    return matched


def _segments_match(parts: list[str], segments: list[str]) -> bool:
    if not segments:
        return not parts
    if segments[0] == ".*":
        return any(_segments_match(parts[skip:], segments[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and bool(re.fullmatch(segments[0], parts[0])) and _segments_match(parts[1:], segments[1:])


def _not_found(filesystem: fs.FileSystem, source: str, prefix: str, folder: str) -> str:
    from pyarrow import fs

    message = f"nothing matches the source {source!r}: "
    if filesystem.get_file_info(folder or "/").type == fs.FileType.NotFound:
        return message + f"the folder {prefix}{folder} does not exist. Correct the path of the source"
    selector = fs.FileSelector(folder or "/", recursive=False)
    names = sorted(i.base_name for i in filesystem.get_file_info(selector) if not i.base_name.startswith("."))
    holds = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
    return message + (
        f"searched {prefix}{folder}, which holds {holds}. "
        "Give a CSV file, a folder of *.csv files or a glob such as 'folder/*.csv'"
    )
