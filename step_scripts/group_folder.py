"""A feature group on disk: its folder, its commit log, and the lock of its writers.

    <root>/<group>/group.json                                          name, table, time of creation
    <root>/<group>/data/year=YYYY/month=MM/day=DD/hour=HH/<latest event time>_<16 characters>.parquet
    <root>/<group>/_commits/00000001.json                              what each commit added
    <root>/<group>/_staging/                                           scratch of the ingestion that is under way

A data file exists for readers only if a commit names it. Writers hold a lock on the folder itself, so there is no lock
file to be left behind; the lock goes with the process that holds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from step_scripts import storage
from step_scripts.contract import Artifact, FileInfo, StepError
from step_scripts.table import TableSpec

GROUP_NAME = re.compile(r"[a-zA-Z0-9]([_-]*[a-zA-Z0-9]){0,63}")  # SageMaker's rule for feature groups
LOCK_SECONDS = 600.0
_POLL_SECONDS = 0.05
_DIGEST_FORMAT = "{:016x}{:016x}"
EMPTY_DIGEST = _DIGEST_FORMAT.format(0, 0)


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
    """What is known of a group from its creation on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    table: TableSpec
    created_at: datetime


def digest_of(sums: Sequence[int]) -> str:
    """32 hexadecimal digits of two 64-bit sums."""
    return _DIGEST_FORMAT.format(*sums)


class GroupFolder:
    """The folder of one group. Raises `StepError` for a name that is not a group's."""

    def __init__(self, root: str, name: str) -> None:
        if not GROUP_NAME.fullmatch(name):
            raise StepError(
                f"{name!r} is no name of a feature group: up to 64 letters, digits, '-' and '_', "
                "beginning and ending with a letter or a digit"
            )
        self.name = name
        self.path = storage.local_path(root).absolute() / name
        self.data = self.path / "data"
        self._log = self.path / "_commits"
        self._staging = self.path / "_staging"

    def info(self) -> GroupInfo | None:
        """The group's description, or None if there is no such group."""
        try:
            return GroupInfo.model_validate_json((self.path / "group.json").read_bytes())
        except FileNotFoundError:
            return None

    def create(self, table: TableSpec) -> GroupInfo:
        """Describe the group, as long as it has no commits. The caller holds the lock."""
        info = GroupInfo(name=self.name, table=table, created_at=datetime.now(UTC))
        storage.write_bytes(str(self.path / "group.json"), info.model_dump_json(indent=2).encode())
        return info

    def commits(self, upto: int | None = None) -> list[Commit]:
        """All commits in order, or those up to a number. Raises `StepError` if one is missing or unreadable."""
        names = sorted(p.name for p in self._log.glob("[0-9]*.json")) if self._log.is_dir() else []
        if names != [f"{n:08d}.json" for n in range(1, len(names) + 1)]:
            raise StepError(f"the commit log {self._log} has gaps; restore it from a backup, or delete the group")
        if upto is not None and not 0 <= upto <= len(names):
            raise StepError(f"feature group {self.name} has no commit {upto}; its latest is {len(names)}")
        try:
            return [Commit.model_validate_json((self._log / name).read_bytes()) for name in names[:upto]]
        except ValueError as error:
            raise StepError(f"the commit log {self._log} cannot be read: {error}") from error

    def append(self, commit: Commit) -> None:
        """Make `commit` visible, atomically, and never in place of another. The caller holds the lock."""
        self._log.mkdir(parents=True, exist_ok=True)
        target = self._log / f"{commit.number:08d}.json"
        temporary = self._log / f".{target.name}.{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(commit.model_dump_json(indent=1).encode())
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, target)  # fails if the target exists, as a rename would not
            _sync_folder(self._log)
        except FileExistsError as error:
            raise StepError(f"another writer has made commit {commit.number} of {self.name}; ingest again") from error
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, seconds: float = LOCK_SECONDS, *, create: bool = False) -> Iterator[None]:
        """Be the group's only writer. Raises `StepError` if others hold the lock for longer than `seconds`.

        Without `create`, also if there is no such group.
        """
        deadline = time.monotonic() + seconds
        descriptor = self._locked_descriptor(deadline, create)
        try:
            yield
        finally:
            os.close(descriptor)

    def _locked_descriptor(self, deadline: float, create: bool) -> int:
        while True:
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):  # `exist_ok` still raises if a deletion comes in between
                    self.path.mkdir()
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                if create:  # deleted since it was made
                    continue
                raise StepError(f"there is no feature group {self.name} in {self.path.parent}") from None
            locked = False
            try:
                while not (locked := _try_lock(descriptor) and self._is_at_path(descriptor)):
                    if not self._is_at_path(descriptor):
                        break
                    if time.monotonic() > deadline:
                        raise StepError(
                            f"feature group {self.name} is being written to by another run; wait for it, or end it"
                        )
                    time.sleep(_POLL_SECONDS)
            finally:
                if not locked:
                    os.close(descriptor)
            if locked:
                return descriptor

    def _is_at_path(self, descriptor: int) -> bool:
        """Whether the open folder is still the one at the group's path: a deletion may have come first."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A scratch folder for the length of the block. The caller holds the lock."""
        folder = self._staging / uuid.uuid4().hex
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)

    def remove_strays(self) -> int:
        """Remove what killed writers left: data files that no commit names, scratch. The caller holds the lock."""
        shutil.rmtree(self._staging, ignore_errors=True)
        for temporary in (*self._log.glob(".*.tmp"), *self.path.glob(".*.tmp")):
            temporary.unlink(missing_ok=True)
        committed = {f.path for c in self.commits() for f in c.files}
        strays = 0
        for folder, _, names in os.walk(self.data, topdown=False):
            for name in names:
                path = Path(folder) / name
                if path.relative_to(self.data).as_posix() not in committed:
                    path.unlink()
                    strays += 1
            with contextlib.suppress(OSError):  # not empty
                Path(folder).rmdir()
        return strays

    def remove(self) -> None:
        """Delete the group. The caller holds the lock; it is gone at once, however long the removal takes."""
        doomed = self.path.with_name(f".{self.name}.{uuid.uuid4().hex}.deleted")
        self.path.rename(doomed)
        shutil.rmtree(doomed)

    def missing_files(self, files: Sequence[StoredFile]) -> list[StoredFile]:
        """Committed files that are not there any more, or not in their size."""
        return [f for f in files if not _has_size(self.data / f.path, f.bytes)]

    def artifact(self, files: Sequence[StoredFile], digest: str, rows: int | None) -> Artifact:
        """The files as an artifact whose URI is the `data` folder; `rows` counts records, not events."""
        listed = [FileInfo(path=f.path, rows=f.rows, bytes=f.bytes, sha256=f.sha256) for f in files]
        return Artifact.of(str(self.data), listed, digest=digest).model_copy(update={"rows": rows})


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
