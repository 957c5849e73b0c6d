"""What a deployment has created, so that it can be listed and removed: and nothing else, however it is named."""

from __future__ import annotations

import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.local_files import discarded_folders
from step_scripts.runner.wording import counted, megabytes

# In the order of removal: what serves or writes goes before what it needs.
ItemKind = Literal[
    "endpoint", "endpoint_config", "model", "model_package", "model_package_group", "job", "feature_group", "files"
]
KINDS: tuple[ItemKind, ...] = get_args(ItemKind)
# What steps write below the folder of their results. Other things there are not ours.
RESULT_FILE = re.compile(r"(?P<step>[\w.]+)/(?P<digest>[0-9a-f]{16})/.+")


class NotOwned(RuntimeError):
    """Something of that name is there and was not created by this deployment: it is left alone."""


class OwnedItem(BaseModel):
    """One thing that the deployment has created.

    `location` is an ARN, a path or a URI. `run_id`: the Dagster run that made it, where that is known. `temporary`: it
    should be gone when that run is.
    """

    model_config = ConfigDict(frozen=True)

    kind: ItemKind
    name: str
    location: str
    created_at: datetime | None = None
    run_id: str | None = None
    temporary: bool = False
    discarded: bool = Field(default=False, description="The rest of something whose removal has failed.")
    detail: str = Field(default="", description="What people want to know before they remove it.")


def files_item(uri: str, name: str, files: list[tuple[int, float]]) -> list[OwnedItem]:
    """Files at `uri` as one item; none if there are none. Of each: bytes, and seconds since 1970."""
    if not files:
        return []
    created = datetime.fromtimestamp(min(modified for _, modified in files), UTC)
    detail = f"{counted(len(files), 'file')}, {megabytes(sum(size for size, _ in files))}"
    return [OwnedItem(kind="files", name=name, location=uri, created_at=created, detail=detail)]


def files_below(root: str, pattern: re.Pattern[str], name: str) -> list[OwnedItem]:
    """An item a folder, of the files below `root` whose paths match. The pattern's first group is the folder."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path, size, modified in storage.list_details(root):
        if match := pattern.fullmatch(path):
            found.setdefault(match[1], []).append((size, modified))
    return [
        item
        for folder, files in sorted(found.items())
        for item in files_item(storage.join(root, folder), f"{name} {folder}", files)
    ]


def files_at(uri: str, name: str) -> list[OwnedItem]:
    """Everything below `uri` as one item; none if there is nothing."""
    return files_item(uri, name, [(size, modified) for _, size, modified in storage.list_details(uri)])


def remove_step_results(root: str, uri: str) -> None:
    """Remove the results of the step whose item is located at `uri`; with them the folders that this leaves empty."""
    step = uri.removeprefix(root.rstrip("/") + "/")
    files = (f"{step}/{path}" for path, _, _ in storage.list_details(uri))
    digests = {found["digest"] for file in files if (found := RESULT_FILE.fullmatch(file))}
    for digest in sorted(digests):
        storage.delete_folder(storage.join(uri, digest))
    remove_empty(uri, root)


def discarded_items(folder: str, kind: ItemKind) -> list[OwnedItem]:
    """What is left, directly in a local folder, of things of this kind whose removal has failed."""
    return [
        OwnedItem(kind=kind, name=path.name, location=str(path), detail="its removal is incomplete", discarded=True)
        for path in discarded_folders(storage.local_path(folder).absolute())
    ]


def remove_discarded(folder: str, item: OwnedItem) -> None:
    """Remove what `discarded_items(folder, …)` listed; nothing happens if it is gone. Raises `NotOwned`."""
    parent = storage.local_path(folder).absolute()
    if item.location in map(str, discarded_folders(parent)):
        shutil.rmtree(item.location)
    elif Path(item.location).parent != parent:
        raise NotOwned(f"{item.location} is nothing that was removed from {folder}")


def expected_errors() -> tuple[type[Exception], ...]:
    """What a removal may fail with without being a fault of the program."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:  # the local deployment needs no boto3
        return (OSError, RuntimeError, ValueError, LookupError, StepError)
    return (OSError, RuntimeError, ValueError, LookupError, StepError, BotoCoreError, ClientError)


def remove_empty(*uris: str) -> None:
    """Remove those local folders that are empty."""
    for uri in uris:
        if not storage.is_remote(uri):
            path = storage.local_path(uri)
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
