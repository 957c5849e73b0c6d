"""Searches a folder, or a prefix on S3, for files whose path matches a pattern.

One thing that cannot be read does not keep the others: it is set aside, with the reason and what to do.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from step_scripts.parameters import SourceFile
from step_scripts.runner import storage
from step_scripts.runner.local_files import FileState, local_state

_ANY_DEPTH = re.compile("")  # what `**` stands for, in a list of patterns of one segment each
_CALENDAR = (-62_135_596_800.0, 253_402_300_799.0)  # the years 1 to 9999, in seconds since 1970


@dataclass(frozen=True)
class SetAside:
    """Something that would be read and cannot be. `name` is its path, in characters that can be shown."""

    name: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}. {self.remedy}"


def shown(path: str) -> str:
    """`path` in characters that every file and terminal takes: bytes that are no UTF-8 become `\\xe4`."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@dataclass
class Listing:
    """The files that were looked for; what is set aside; what else is there and is not taken. All sorted by name.

    `closed`: folders that could not be listed.
    """

    files: list[SourceFile] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    closed: list[SetAside] = field(default_factory=list)

    def add(self, path: str, state: FileState) -> None:
        """A file that matches, unless its name or its time cannot be handed on."""
        if shown(path) != path:
            self.set_aside.append(SetAside(shown(path), "its name is not UTF-8", "Rename it"))
        elif not _CALENDAR[0] <= state.modified <= _CALENDAR[1]:
            reason = f"its time of modification ({state.modified:.0f} s since 1970) is in no calendar"
            self.set_aside.append(SetAside(path, reason, "Set another: touch"))
        else:
            self.files.append(SourceFile(uri=path, bytes=state.bytes, modified=state.modified, change=state.change))


@dataclass(frozen=True)
class _Entry:
    """Something below the folder that is searched, no folder: its state, or why it cannot be read.

    `file`: the file itself, where `linked` says that it was reached through a symbolic link.
    """

    path: str
    parts: tuple[str, ...]
    state: FileState | SetAside
    file: str = ""
    linked: bool = False


def matching(folder: str, pattern: str, flags: int = 0) -> Listing:
    """What lies below `folder` and matches. One segment at a time, so that `*` stays within a folder.

    A file that has several names, because of links, is read once: under the name that has no link in it.
    """
    parts = pattern.split("/")
    segments = [_ANY_DEPTH if part == "**" else re.compile(fnmatch.translate(part), flags) for part in parts]
    found, names = Listing(), dict[str, str]()
    entries = _objects(folder, segments) if storage.is_remote(folder) else _walk(folder, segments, found)
    for entry in sorted(entries, key=lambda e: (e.linked, e.path)):
        name = "/".join(entry.parts)
        if not _matches(entry.parts, segments):
            found.others.append(shown(name))
        elif isinstance(entry.state, SetAside):
            found.set_aside.append(entry.state)
        elif (first := names.setdefault(entry.file, entry.path)) != entry.path:
            found.others.append(shown(f"{name} (a link to {first})"))
        else:
            found.add(entry.path, entry.state)
    found.files.sort(key=lambda f: f.uri)
    found.set_aside.sort(key=lambda a: a.name)
    found.others.sort()
    return found


def _matches(parts: Sequence[str], segments: Sequence[re.Pattern[str]]) -> bool:
    if not segments:
        return not parts
    if segments[0] is _ANY_DEPTH:
        return any(_matches(parts[skip:], segments[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and bool(segments[0].fullmatch(parts[0])) and _matches(parts[1:], segments[1:])


def _leads_to_match(parts: Sequence[str], segments: Sequence[re.Pattern[str]]) -> bool:
    """Whether files below the folder `parts` may match."""
    before = segments[: segments.index(_ANY_DEPTH)] if _ANY_DEPTH in segments else segments[:-1]
    deep_enough = len(parts) <= len(before) or _ANY_DEPTH in segments
    return deep_enough and all(segment.fullmatch(part) for part, segment in zip(parts, before, strict=False))


def _objects(folder: str, segments: Sequence[re.Pattern[str]]) -> Iterator[_Entry]:
    for path, state in storage.object_states(folder, deep=len(segments) > 1):
        parts, uri = tuple(path.split("/")), f"{folder}/{path}"
        if not any(part.startswith((".", "_")) for part in parts):
            yield _Entry(uri, parts, state, uri)


def _walk(folder: str, segments: Sequence[re.Pattern[str]], found: Listing) -> Iterator[_Entry]:
    """Everything but folders below `folder`, in those folders that may hold a match. Links are followed, once."""
    top = Path(folder).stat() if Path(folder).exists() else None
    above = frozenset({(top.st_dev, top.st_ino)} if top else ())
    real = os.path.realpath(folder)
    waiting = [(folder.rstrip("/"), tuple[str, ...](), False, above)] if top else []
    while waiting:
        path, parts, linked, above = waiting.pop()
        try:
            with os.scandir(path or "/") as entries:
                children = sorted(entries, key=lambda e: e.name)
        except OSError as error:
            reason = f"the folder cannot be listed ({error.strerror or error})"
            found.closed.append(SetAside(shown(path), reason, "Allow it to be read and searched"))
            continue
        for child in children:
            if child.name.startswith((".", "_")):
                continue
            below = (*parts, child.name)
            try:
                link = child.is_symlink()
                state = child.stat()
            except OSError as error:
                nowhere = isinstance(error, FileNotFoundError)
                reason = "it is a link that leads nowhere" if nowhere else f"it cannot be read ({error.strerror})"
                yield _Entry(child.path, below, SetAside(shown(child.path), reason, "Correct or remove it"))
                continue
            if stat.S_ISREG(state.st_mode):
                file = os.path.realpath(child.path) if linked or link else f"{real}/{'/'.join(below)}"
                yield _Entry(child.path, below, local_state(state), file, linked or link)
            elif not stat.S_ISDIR(state.st_mode):
                yield _Entry(child.path, below, SetAside(shown(child.path), "it is no regular file", "Remove it"))
            elif (state.st_dev, state.st_ino) in above:
                found.others.append(shown(f"{'/'.join(below)} (a link back to a folder above it)"))
            elif _leads_to_match(below, segments):
                waiting.append((child.path, below, linked or link, above | {(state.st_dev, state.st_ino)}))
            else:
                found.others.append(shown("/".join(below)) + "/")
