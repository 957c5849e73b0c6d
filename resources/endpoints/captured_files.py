"""Files of captured requests, as `prune` bounds them: by age, and by the bytes that an endpoint's may have together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby

from pydantic import BaseModel, ConfigDict

from resources.inventory import NotOwned, remove_empty
from step_scripts.runner import storage

# What SageMaker and the local server write below an endpoint's folder; anything else there is not ours.
_FILE = re.compile(r"[^/]+/\d{4}/\d\d/\d\d/\d\d/[^/]+\.jsonl")


class CapturedFile(BaseModel):
    """One file of captured requests. `path`: below the endpoint's folder `folder`."""

    model_config = ConfigDict(frozen=True)

    folder: str
    path: str
    bytes: int
    changed_at: datetime


def captured_below(folder: str) -> list[CapturedFile]:
    """The files of one endpoint, oldest first."""
    found = [
        CapturedFile(folder=folder, path=path, bytes=size, changed_at=datetime.fromtimestamp(modified, UTC))
        for path, size, modified in storage.list_details(folder)
        if _FILE.fullmatch(path)
    ]
    return sorted(found, key=lambda file: file.changed_at)


def surplus(files: Sequence[CapturedFile], before: datetime, most_bytes: float) -> list[CapturedFile]:
    """Those last changed `before`, and the oldest of each endpoint whose files have more than `most_bytes` together."""
    chosen = []
    for _, of_endpoint in groupby(sorted(files, key=lambda f: (f.folder, f.changed_at)), key=lambda f: f.folder):
        listed = list(of_endpoint)
        left = sum(file.bytes for file in listed)
        for file in listed:
            if file.changed_at >= before and left <= most_bytes:
                break
            chosen.append(file)
            left -= file.bytes
    return chosen


def remove_captured(files: Sequence[CapturedFile], root: str) -> None:
    """Remove the files, which must lie below `root`. Missing files are ignored. Raises `NotOwned`."""
    for folder in sorted({file.folder for file in files}):
        if not folder.startswith(root.rstrip("/") + "/"):
            raise NotOwned(f"{folder} is not below {root}; it is left alone")
        paths = [file.path for file in files if file.folder == folder]
        if storage.is_remote(folder):
            from step_scripts.runner.s3_objects import delete_objects

            delete_objects(folder, paths)
            continue
        for path in paths:
            file = storage.local_path(folder) / path
            file.unlink(missing_ok=True)
            remove_empty(*(str(parent) for parent in list(file.parents)[:4]))
