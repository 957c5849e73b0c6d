"""A feature group as readers and writers see it: its description, its commit log, its data files.

    <root>/<group>/group.json               name, table, time of creation, where the data are if not here
    <root>/<group>/_commits/00000001.json   what each commit added
    <root>/<group>/_staging/                scratch of ingestions that are under way
    <data>/year=YYYY/month=MM/day=DD/hour=HH/<latest event time>_<16 characters>.parquet

`<data>` is `<root>/<group>/data`, or what SageMaker resolved. A data file exists for readers only if a commit names it.
Of its 16 characters the first belong to the ingestion that wrote it. `step_scripts.feature_store.local_group_folder`
and `step_scripts.feature_store.s3_group_folder` say how two writers are kept apart.
"""

from __future__ import annotations

import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, FileInfo, StepError
from step_scripts.table.spec import TableSpec

GROUP_NAME = re.compile(r"[a-zA-Z0-9]([_-]*[a-zA-Z0-9]){0,63}")  # SageMaker's rule for feature groups
LOCK_SECONDS = 600.0
_DIGEST_FORMAT = "{:016x}{:016x}"
EMPTY_DIGEST = _DIGEST_FORMAT.format(0, 0)
_COMMIT_ATTEMPTS = 12
_LONGEST_PAUSE = 10.0  # seconds

T = TypeVar("T")


class CommitTaken(StepError):
    """Another writer has made the commit of this number first: what is to be written must be compared again."""


class StoredFile(BaseModel):
    """One Parquet file of events, sorted by record id. `path` is relative to the group's `data` folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    rows: int
    bytes: int
    sha256: str
    first_event_time: datetime
    last_event_time: datetime


class Commit(BaseModel):
    """What one ingestion or deletion changed, and the state of the group after it.

    Rows of the dataset are either `added` (new records, and events older than what was known), `superseded` (the live
    event of a record was replaced) or `unchanged` (nothing stored). `deleted` counts tombstones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int = Field(ge=1)
    created_at: datetime
    write_time: datetime = Field(description="`write_time` of all its events; later than that of every earlier commit.")
    dataset_digest: str | None = Field(description="Digest of the ingested artifact. None: a single deletion.")
    table: TableSpec = Field(description="The group's columns from this commit on.")
    files: tuple[StoredFile, ...]
    added: int
    unchanged: int
    superseded: int
    deleted: int
    live_rows: int = Field(description="Records that a read without `as_of` returns.")
    live_digest: str = Field(description="Digest of the live records; does not depend on their order.")
    mirrors: bool = Field(description="Whether the live records are those of the dataset, and no others.")
    deduplicate: bool = Field(description="Whether a record may have several events, or a tombstone.")

    @property
    def live_sums(self) -> tuple[int, int]:
        """The two sums that the digest is made of."""
        return int(self.live_digest[:16], 16), int(self.live_digest[16:], 16)


class GroupInfo(BaseModel):
    """What is known of a group from its creation on. `data_uri`: where its data are, if not in its own folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    table: TableSpec
    created_at: datetime
    data_uri: str | None = None


def digest_of(sums: Sequence[int]) -> str:
    """32 hexadecimal digits of two 64-bit sums."""
    return _DIGEST_FORMAT.format(*sums)


class GroupFolder(ABC):
    """The folder of one group. Raises `StepError` for a name that is not a group's."""

    def __init__(self, root: str, name: str) -> None:
        if not GROUP_NAME.fullmatch(name):
            raise StepError(
                f"{name!r} is no name of a feature group: up to 64 letters, digits, '-' and '_', "
                "beginning and ending with a letter or a digit"
            )
        self.name = name
        self.root = root
        self.uri = storage.join(root, name)
        self.log_uri = storage.join(self.uri, "_commits")

    @property
    @abstractmethod
    def data_uri(self) -> str:
        """Where the data files are."""

    def info(self) -> GroupInfo | None:
        """The group's description, or None if there is no such group."""
        try:
            return GroupInfo.model_validate_json(storage.read_bytes(storage.join(self.uri, "group.json")))
        except FileNotFoundError:
            return None

    def create(self, table: TableSpec, data_uri: str | None = None) -> GroupInfo:
        """Describe the group, as long as it has no commits. The caller holds the lock."""
        info = GroupInfo(name=self.name, table=table, created_at=datetime.now(UTC), data_uri=data_uri)
        storage.write_bytes(storage.join(self.uri, "group.json"), info.model_dump_json(indent=2).encode())
        return info

    def commits(self, upto: int | None = None) -> list[Commit]:
        """All commits in order, or those up to a number. Raises `StepError` if one is missing or unreadable."""
        names = self._commit_names()
        if names != [commit_name(n) for n in range(1, len(names) + 1)]:
            raise StepError(f"the commit log {self.log_uri} has gaps; restore it from a backup, or delete the group")
        if upto is not None and not 0 <= upto <= len(names):
            raise StepError(f"feature group {self.name} has no commit {upto}; its latest is {len(names)}")
        try:
            return [Commit.model_validate_json(text) for text in self._commit_texts(names[:upto])]
        except ValueError as error:
            raise StepError(f"the commit log {self.log_uri} cannot be read: {error}") from error

    def missing_files(self, files: Sequence[StoredFile]) -> list[StoredFile]:
        """Committed files that are not there any more, or not in their size."""
        sizes = self._sizes(files)
        return [f for f in files if sizes.get(f.path) != f.bytes]

    def artifact(self, files: Sequence[StoredFile], digest: str, rows: int | None) -> Artifact:
        """The files as an artifact whose URI is the `data` folder; `rows` counts records, not events."""
        listed = [FileInfo(path=f.path, rows=f.rows, bytes=f.bytes, sha256=f.sha256) for f in files]
        return Artifact.of(self.data_uri, listed, digest=digest).model_copy(update={"rows": rows})

    @abstractmethod
    def append(self, commit: Commit) -> None:
        """Make `commit` visible, atomically. Raises `CommitTaken` if there is a commit of this number."""

    @abstractmethod
    def lock(self, seconds: float = LOCK_SECONDS, *, create: bool = False) -> AbstractContextManager[None]:
        """Write to the group for the length of the block. Raises `StepError` if that is not possible now.

        Without `create`, also if there is no such group.
        """

    @abstractmethod
    def staging(self) -> AbstractContextManager[str]:
        """URI of a scratch folder for the length of the block, in reach of all that can reach the data."""

    @abstractmethod
    def remove_strays(self) -> int:
        """Remove what killed writers left: data files that no commit names, scratch. Returns the number of files."""

    @abstractmethod
    def remove_attempt(self, token: str) -> None:
        """Remove the files of one ingestion that has failed, known by the first characters of their names."""

    @abstractmethod
    def remove(self) -> None:
        """Delete the group. The caller holds the lock."""

    @abstractmethod
    def _commit_names(self) -> list[str]: ...

    @abstractmethod
    def _commit_texts(self, names: Sequence[str]) -> list[bytes]: ...

    @abstractmethod
    def _sizes(self, files: Sequence[StoredFile]) -> dict[str, int]:
        """Sizes, in bytes, of those files that are there, by path."""


def until_committed(write: Callable[[], T], taken: Callable[[str], None]) -> T:
    """Repeat `write`, which begins by reading the commit log, while other writers commit first.

    Calls `taken` each time. Raises `StepError` after 12 times: of writers that start together, one a round succeeds.
    """
    for attempt in range(_COMMIT_ATTEMPTS):
        try:
            return write()
        except CommitTaken as error:
            taken(str(error))
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE, 0.1 * 2**attempt)))
    raise StepError(
        f"other writers have committed to the feature group first, {_COMMIT_ATTEMPTS} times in a row; nothing of this "
        "one was committed. Ingest again when fewer runs write to the group"
    )


def commit_name(number: int) -> str:
    """File name of a commit."""
    return f"{number:08d}.json"
