"""A feature group as readers and writers see it: its description, its commits, its data files.

    <root>/<group>/group.json      name, table, time of creation, format; on S3 where the data and the Glue table are
    <root>/<group>/catalog.db      local groups only: the Iceberg catalog
    <root>/<group>/metadata/       local groups only: the Iceberg table's metadata
    <root>/<group>/_expired.json   commits whose snapshots have been expired
    <root>/<group>/_staging/       scratch of ingestions that are under way
    <data>/event_time_day=YYYY-MM-DD/<ingestion>-<SHA-256 of the file>.parquet

A commit is a snapshot of the group's Iceberg table; what it changed is in the snapshot's summary. `<data>` is
`<root>/<group>/data`, or what SageMaker resolved. `step_scripts.feature_store.local_group` and
`step_scripts.feature_store.glue_group` say how two writers are kept apart.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pyiceberg.exceptions import CommitFailedException, NoSuchTableError
from pyiceberg.table import Table, Transaction
from pyiceberg.table.snapshots import Snapshot as IcebergSnapshot

from step_scripts.feature_store import iceberg_table
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, FileInfo, StepError
from step_scripts.table.spec import TableSpec

GROUP_NAME = re.compile(r"[a-zA-Z0-9]([_-]*[a-zA-Z0-9]){0,63}")  # SageMaker's rule for feature groups
LOCK_SECONDS = 600.0
FORMAT = 2
COMMAND = "python -m step_scripts.feature_store"
_REFUSED_CHARACTERS = "#?%"  # pyiceberg takes places for URLs and would write beside the root
_DIGEST_FORMAT = "{:016x}{:016x}"
EMPTY_DIGEST = _DIGEST_FORMAT.format(0, 0)
_COMMIT_ATTEMPTS = 12
_LONGEST_PAUSE = 10.0  # seconds
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_TIME, _LAST_TIME = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
# Names in the summaries of snapshots.
_PREFIX = "housing."
COMMIT_KEY = f"{_PREFIX}commit"
INGESTION_KEY = f"{_PREFIX}ingestion"
REPLAYED_KEY = f"{_PREFIX}replayed-from"
COMPACTED_KEY = f"{_PREFIX}compaction"

T = TypeVar("T")


class CommitTaken(StepError):
    """Another writer has committed first: what is to be written must be compared again."""


class StoredFile(BaseModel):
    """One Parquet file of events, sorted by record id. `path` is relative to the group's `data` folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    rows: int
    bytes: int
    first_event_time: datetime
    last_event_time: datetime

    @property
    def sha256(self) -> str:
        """Of its content, as its name says."""
        return self.path.rpartition("-")[2].removesuffix(".parquet")


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
    added: int
    unchanged: int
    superseded: int
    deleted: int
    live_rows: int = Field(description="Records that a read without `as_of` returns.")
    live_digest: str = Field(description="Digest of the live records; does not depend on their order.")
    mirrors: bool = Field(description="Whether the live records are those of the dataset, and no others.")
    deduplicate: bool = Field(description="Whether a record may have several events, or a tombstone.")
    snapshot_id: int | None = Field(default=None, description="Of the Iceberg table. None: expired, or not made yet.")

    @property
    def live_sums(self) -> tuple[int, int]:
        """The two sums that the digest is made of."""
        return int(self.live_digest[:16], 16), int(self.live_digest[16:], 16)

    def summary(self, before: TableSpec | None) -> dict[str, str]:
        """As it stands in the summary of its snapshot. The table only if it is not that of `before`."""
        facts = self.model_dump(mode="json", exclude={"table", "number", "snapshot_id"}, exclude_none=True)
        found = {
            f"{_PREFIX}{name.replace('_', '-')}": value if isinstance(value, str) else json.dumps(value)
            for name, value in facts.items()
        }
        if self.table != before:
            found[f"{_PREFIX}table"] = self.table.model_dump_json(exclude_defaults=True)
        return {COMMIT_KEY: str(self.number), f"{_PREFIX}format": str(FORMAT), **found}

    @classmethod
    def of(cls, summary: Mapping[str, str], before: TableSpec | None, snapshot_id: int) -> Commit:
        """The commit that a summary describes. Raises `ValueError` if something is missing."""

        def fact(name: str) -> Any:
            return summary.get(f"{_PREFIX}{name.replace('_', '-')}")

        facts = {name: found for name in cls.model_fields if (found := fact(name)) is not None}
        table = facts.pop("table", None)
        return cls.model_validate(
            {
                "dataset_digest": None,
                **facts,
                "number": summary[COMMIT_KEY],
                "table": TableSpec.model_validate_json(table) if table is not None else before,
                "snapshot_id": snapshot_id,
            }
        )


class GroupInfo(BaseModel):
    """What is known of a group from its creation on. `data_uri`: where its data are, if not in its own folder.

    `glue_table`: database and name of its table in Glue, with a dot between them; on S3 only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    name: str
    table: TableSpec
    created_at: datetime
    data_uri: str | None = None
    glue_table: str | None = None


def digest_of(sums: Sequence[int]) -> str:
    """32 hexadecimal digits of two 64-bit sums."""
    return _DIGEST_FORMAT.format(*sums)


@dataclass(frozen=True)
class GroupState:
    """The group at one moment: its commits in order, and its table.

    A writer's changes are based on it: `Group.append` refuses if it is not the latest any more.
    """

    commits: list[Commit]
    data_uri: str
    iceberg: Table | None

    @property
    def last(self) -> Commit | None:
        """The latest commit."""
        return self.commits[-1] if self.commits else None

    def snapshot(self, number: int) -> IcebergSnapshot:
        """The snapshot of a commit. Raises `StepError` if it has been expired."""
        found = self.commits[number - 1].snapshot_id
        snapshot = self.iceberg.snapshot_by_id(found) if self.iceberg is not None and found is not None else None
        if snapshot is None:
            raise StepError(
                f"commit {number} has been expired: it was too old, and no kept model version or split named it. "
                "Materialize from the present state of the feature group"
            )
        return snapshot

    @cached_property
    def files(self) -> list[StoredFile]:
        """Files that make up the group after the latest of these commits."""
        if not self.commits:
            return []
        assert self.iceberg is not None
        foreign = iceberg_table.foreign_appends(self.iceberg, COMMIT_KEY)
        with reading(self.iceberg.metadata_location):
            found = iceberg_table.files_of(self.iceberg, self.snapshot(len(self.commits)))
        return [self._stored(f) for f in found if f.snapshot_id not in foreign]

    def _stored(self, file: iceberg_table.FileFacts) -> StoredFile:
        first, last = iceberg_table.micros(file.first_time), iceberg_table.micros(file.last_time)
        return StoredFile(
            path=path_in(file.uri, self.data_uri),
            rows=file.rows,
            bytes=file.bytes,
            first_event_time=_FIRST_TIME if first is None else _EPOCH + timedelta(microseconds=first),
            last_event_time=_LAST_TIME if last is None else _EPOCH + timedelta(microseconds=last),
        )


def path_in(uri: str, folder: str) -> str:
    """`uri`, which pyiceberg has written as a URL, relative to a folder that it is in."""
    plain = uri.removeprefix("file://").replace("s3a://", "s3://", 1)
    return plain.removeprefix(folder.rstrip("/") + "/")


@dataclass(frozen=True)
class Writing:
    """What an attempt to write has begun with: the state, and the table as it will be.

    `schema` is that of the data files, `partition` the name before `=` in the names of their folders.
    """

    state: GroupState
    transaction: Transaction
    schema: pa.Schema
    partition: str


class Group(ABC):
    """The place of one group. Raises `StepError` for a name that is not a group's, and for a root with `#?%`."""

    def __init__(self, root: str, name: str) -> None:
        if not GROUP_NAME.fullmatch(name):
            raise StepError(
                f"{name!r} is no name of a feature group: up to 64 letters, digits, '-' and '_', "
                "beginning and ending with a letter or a digit"
            )
        if refused := [character for character in _REFUSED_CHARACTERS if character in root]:
            raise StepError(
                f"feature groups cannot be kept below {root}: a table's place must not contain {' or '.join(refused)}. "
                "Use a folder or prefix without these characters"
            )
        self.name = name
        self.root = root
        self.uri = storage.join(root, name)

    @property
    @abstractmethod
    def data_uri(self) -> str:
        """Where the data files are."""

    def is_there(self) -> bool:
        """Whether there is a group, in whatever format."""
        return storage.exists(self._info_uri)

    def info(self) -> GroupInfo | None:
        """The group's description, or None if there is no such group. Raises `StepError` for another format."""
        described = self.described()
        if described is None:
            return None
        found = described.get("format", 1)
        if found < FORMAT:
            raise StepError(
                f"feature group {self.name} in {self.root} has the layout of an earlier version. Remedy: take it over, "
                f"with its history, by\n    {COMMAND} import {shlex.quote(self.root)} {self.name}\n"
                "or delete it and ingest its sources again"
            )
        if found > FORMAT:
            raise StepError(
                f"feature group {self.name} in {self.root} was written by a later version of this project (format "
                f"{found}, this one reads {FORMAT}): upgrade, or use another group name"
            )
        try:
            return GroupInfo.model_validate(described)
        except ValidationError as error:
            raise StepError(f"{self._info_uri} cannot be read: {error}. Restore it from a backup") from error

    def described(self) -> dict[str, Any] | None:
        """The description of a group in whatever format."""
        try:
            return json.loads(storage.read_bytes(self._info_uri))
        except FileNotFoundError:
            return None

    def create(self, table: TableSpec, data_uri: str | None = None, glue_table: str | None = None) -> GroupInfo:
        """Describe the group and make its table, as long as it has no commits. The caller holds the lock."""
        info = GroupInfo(
            format=FORMAT,
            name=self.name,
            table=table,
            created_at=datetime.now(UTC),
            data_uri=data_uri,
            glue_table=glue_table,
        )
        storage.write_bytes(self._info_uri, info.model_dump_json(indent=2).encode())
        self._make_table(info)
        return info

    def state(self, upto: int | None = None) -> GroupState:
        """The group now, or after commit `upto`. Raises `StepError` if its table cannot be read."""
        with reading(self.uri):
            table = self._load()
            commits = self._commits(table)
        if upto is not None and not 0 <= upto <= len(commits):
            raise StepError(f"feature group {self.name} has no commit {upto}; its latest is {len(commits)}")
        return GroupState(commits[:upto], self.data_uri, table)

    def commits(self, upto: int | None = None) -> list[Commit]:
        """All commits in order, or those up to a number."""
        return self.state(upto).commits

    def missing_files(self, files: Sequence[StoredFile]) -> list[StoredFile]:
        """Committed files that are not there any more, or not in their size."""
        sizes = storage.sizes(self.data_uri, [f.path for f in files])
        return [f for f in files if sizes.get(f.path) != f.bytes]

    def artifact(self, files: Sequence[StoredFile], digest: str, rows: int | None) -> Artifact:
        """The files as an artifact whose URI is the `data` folder; `rows` counts records, not events."""
        listed = [FileInfo(path=f.path, rows=f.rows, bytes=f.bytes, sha256=f.sha256) for f in files]
        return Artifact.of(self.data_uri, listed, digest=digest).model_copy(update={"rows": rows})

    def begin(self, state: GroupState, spec: TableSpec) -> Writing:
        """What is needed to write events of `spec` on top of `state`. Changes nothing."""
        table = state.iceberg
        assert table is not None
        transaction = table.transaction()
        if (new := iceberg_table.lacking(table.schema(), spec)).fields:
            with transaction.update_schema() as update:
                update.union_by_name(new)
        schema = iceberg_table.file_schema(transaction.table_metadata.schema())
        return Writing(state, transaction, schema, iceberg_table.partition_name(table))

    def append(self, writing: Writing, commit: Commit, files: Sequence[StoredFile], token: str) -> Commit:
        """Make `commit` and its files visible, atomically. Returns it with its snapshot's id.

        `token` tells the writer from others. Raises `CommitTaken` if another one has committed since `writing` began,
        and `StepError` if the group has been deleted.
        """
        table, metadata = writing.transaction._table, writing.transaction.table_metadata
        described = [
            iceberg_table.described(metadata.schema(), table.spec(), self.location(uri), uri, file.bytes)
            for file in files
            for uri in [storage.join(self.data_uri, file.path)]
        ]
        before = writing.state.last
        summary = commit.summary(before.table if before else None) | {INGESTION_KEY: token}
        try:
            snapshot_id = iceberg_table.append(table, writing.transaction, described, summary)
        except CommitFailedException as error:
            raise CommitTaken(f"another writer has made commit {commit.number} of {self.name}; ingest again") from error
        except NoSuchTableError as error:
            raise self._deleted() from error
        except Exception:
            # The answer may have got lost: what counts is what the catalog says.
            if (found := self._committed(token)) is None:
                raise
            snapshot_id = found
        return commit.model_copy(update={"snapshot_id": snapshot_id})

    def remove_attempt(self, token: str) -> None:
        """Remove the files of one ingestion that has failed, known by the beginning of their names."""
        if self._committed(token) is None:
            self._remove_files_of(token)

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
        """Remove what killed writers left: data files that no snapshot has, scratch. Returns the number of files."""

    @abstractmethod
    def remove(self) -> None:
        """Delete the group. The caller holds the lock."""

    @abstractmethod
    def _load(self) -> Table | None:
        """The table as it is now. Raises `StepError` if it is not where it should be."""

    @abstractmethod
    def _make_table(self, info: GroupInfo) -> None: ...

    @abstractmethod
    def _remove_files_of(self, token: str) -> None: ...

    @property
    def _info_uri(self) -> str:
        return storage.join(self.uri, "group.json")

    @property
    def expired_uri(self) -> str:
        """Where the commits are whose snapshots have been expired."""
        return storage.join(self.uri, "_expired.json")

    def location(self, uri: str) -> str:
        """What the table calls a file."""
        return uri if storage.is_remote(uri) else f"file://{uri}"

    def _deleted(self) -> StepError:
        return StepError(f"feature group {self.name} was deleted while it was written to; ingest again")

    def _committed(self, token: str) -> int | None:
        table = self._load()
        if table is None:
            return None
        for snapshot in table.metadata.snapshots:
            if iceberg_table.summary_of(snapshot).get(INGESTION_KEY) == token:
                return snapshot.snapshot_id
        return None

    def _commits(self, table: Table | None) -> list[Commit]:
        if table is None:
            return []
        found: dict[int, Commit] = {}
        snapshots = iceberg_table.own_snapshots(table, COMMIT_KEY)
        numbers = {_number(snapshot) for snapshot in snapshots}
        if numbers and len(numbers) < max(numbers):
            found = {commit.number: commit for commit in self.expired()}
        spec = None
        for snapshot in snapshots:
            number = _number(snapshot)
            before = found.get(number - 1)
            spec = before.table if before else spec
            found[number] = Commit.of(iceberg_table.summary_of(snapshot), spec, snapshot.snapshot_id)
            spec = found[number].table
        if sorted(found) != list(range(1, len(found) + 1)):
            raise StepError(
                f"the history of feature group {self.name} has gaps: of its commits there are {sorted(found)}. "
                f"Another program may have expired snapshots of the table; restore {self.uri} from a backup, or delete "
                "the group"
            )
        return [found[number] for number in sorted(found)]

    def expired(self) -> list[Commit]:
        """Commits whose snapshots have been expired: what they changed is known, what was then there is not."""
        try:
            lines = storage.read_bytes(self.expired_uri)
        except FileNotFoundError:
            return []
        return [Commit.model_validate(facts) for facts in json.loads(lines)]


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
    """Turns what pyiceberg raises for lost or damaged metadata into a `StepError` that says so."""
    try:
        yield
    except StepError:
        raise
    except Exception as error:
        of_catalog = type(error).__module__.partition(".")[0] == "sqlalchemy"
        if not of_catalog and not isinstance(error, (OSError, ValueError, KeyError)):
            raise
        raise StepError(
            f"the table of the feature group at {place} cannot be read ({type(error).__name__}: {error}); restore it "
            "from a backup, or delete the group and ingest its sources again"
        ) from error


def _number(snapshot: IcebergSnapshot) -> int:
    return int(iceberg_table.summary_of(snapshot)[COMMIT_KEY])


def until_committed(write: Callable[[], T], taken: Callable[[str], None]) -> T:
    """Repeat `write`, which begins by reading the group's state, while other writers commit first.

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
