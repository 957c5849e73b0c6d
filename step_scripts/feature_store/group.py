"""A feature group as readers and writers see it: its description, its commits, its data files.

    <root>/<group>/group.json      name, table, time of creation, format; on S3 where the data and the Glue table are
    <root>/<group>/catalog.db      local groups only: the Iceberg catalog
    <root>/<group>/metadata/       local groups only: the Iceberg table's metadata
    <root>/<group>/_expired.json   commits whose snapshots have been expired
    <root>/<group>/_staging/       scratch of ingestions that are under way
    <data>/event_time_day=YYYY-MM-DD/<attempt>-<SHA-256 of the file>.parquet

`<data>` is `<root>/<group>/data`, or what SageMaker resolved. `step_scripts.feature_store.local_group` and
`step_scripts.feature_store.glue_group` say how two writers are kept apart.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pyiceberg.exceptions import CommitFailedException, NoSuchTableError
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.table import Table, Transaction
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from step_scripts.feature_store import commits, iceberg_table
from step_scripts.feature_store.commits import FORMAT, INGESTION_KEY, Commit, summary_of
from step_scripts.feature_store.data_files import WriteTarget, attempt_token
from step_scripts.feature_store.event_schema import missing_columns
from step_scripts.feature_store.group_state import GroupState, StoredFile, path_in, reading
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, FileInfo, StepError
from step_scripts.runner.wording import counted
from step_scripts.table.spec import TableSpec

GROUP_NAME = re.compile(r"[a-zA-Z0-9]([_-]*[a-zA-Z0-9]){0,63}")  # SageMaker's rule for feature groups
LOCK_SECONDS = 600.0
ORPHAN_AGE = timedelta(days=3)  # a younger file may belong to a writer that is at work
COMMAND = "python -m step_scripts.feature_store"
_REFUSED_CHARACTERS = "#?%"  # pyiceberg takes places for URLs and would write beside the root
_COMMIT_ATTEMPTS = 12
_LONGEST_PAUSE = 10.0  # seconds

T = TypeVar("T")


class CommitTaken(StepError):
    """Another writer has committed first: what is to be written must be compared again."""


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


@dataclass(frozen=True)
class Attempt:
    """One attempt to write, based on the state of the group that the writer has compared with."""

    state: GroupState
    transaction: Transaction
    target: WriteTarget


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
        self.expired_uri = storage.join(self.uri, "_expired.json")
        self._info_uri = storage.join(self.uri, "group.json")

    @property
    @abstractmethod
    def data_uri(self) -> str:
        """Where the data files are."""

    @abstractmethod
    def lock(self, seconds: float = LOCK_SECONDS, *, create: bool = False) -> AbstractContextManager[None]:
        """Write to the group for the length of the block. Raises `StepError` if that is not possible now.

        Without `create`, also if there is no such group.
        """

    @abstractmethod
    def staging(self) -> AbstractContextManager[str]:
        """URI of a scratch folder for the length of the block, in reach of all that can reach the data."""

    @abstractmethod
    def delete_orphan_files(self) -> int:
        """Delete what killed writers left: data files that no snapshot has, scratch. Returns how many data files."""

    @abstractmethod
    def remove(self) -> None:
        """Delete the group. The caller holds the lock."""

    @abstractmethod
    def _load(self) -> Table | None:
        """The table as it is now. Raises `StepError` if it is not where it should be."""

    @abstractmethod
    def _make_table(self, info: GroupInfo) -> None: ...

    @abstractmethod
    def _delete_files_of(self, token: str) -> None:
        """Delete the data files whose names begin with the token of an attempt that has failed."""

    def is_there(self) -> bool:
        """Whether there is a group, in whatever format."""
        return storage.exists(self._info_uri)

    def described(self) -> dict[str, Any] | None:
        """The description of a group in whatever format; None if there is no such group."""
        try:
            return json.loads(storage.read_bytes(self._info_uri))
        except FileNotFoundError:
            return None

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

    def create(self, table: TableSpec, data_uri: str | None = None, glue_table: str | None = None) -> None:
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

    def state(self, upto: int | None = None) -> GroupState:
        """The group now, or after commit `upto`. Raises `StepError` if its table cannot be read."""
        with reading(self.uri):
            table = self._load()
            found = self._commits(table)
        if upto is not None and not 0 <= upto <= len(found):
            raise StepError(f"feature group {self.name} has no commit {upto}; its latest is {len(found)}")
        return GroupState(found[:upto], self.data_uri, table)

    def commits(self, upto: int | None = None) -> list[Commit]:
        """All commits in order, or those up to a number."""
        return self.state(upto).commits

    def expired(self) -> list[Commit]:
        """Commits whose snapshots have been expired: what they changed is known, what was then there is not."""
        try:
            return [Commit.model_validate(facts) for facts in json.loads(storage.read_bytes(self.expired_uri))]
        except FileNotFoundError:
            return []

    def _commits(self, table: Table | None) -> list[Commit]:
        if table is None:
            return []
        numbers = {commits.number_of(snapshot) for snapshot in commits.own_snapshots(table)}
        are_expired = numbers and len(numbers) < max(numbers)
        found = commits.history(table, self.expired() if are_expired else [])
        if list(found) != list(range(1, len(found) + 1)):
            raise StepError(
                f"the history of feature group {self.name} has gaps: of its commits there are {list(found)}. "
                f"Another program may have expired snapshots of the table; restore {self.uri} from a backup, or delete "
                "the group"
            )
        return list(found.values())

    def lost_files(self, files: Sequence[StoredFile]) -> tuple[list[StoredFile], str]:
        """Committed files that are not there any more, or not in their size; and a sentence that names the first."""
        sizes = storage.sizes(self.data_uri, [f.path for f in files])
        lost = [f for f in files if sizes.get(f.path) != f.bytes]
        if not lost:
            return [], ""
        first = storage.join(self.data_uri, lost[0].path)
        of = counted(len(files), "file")
        return lost, f"{len(lost)} of {of} of feature group {self.name} missing or cut off, the first is {first}"

    def artifact(self, files: Sequence[StoredFile], digest: str, rows: int | None) -> Artifact:
        """The files as an artifact whose URI is the `data` folder; `rows` counts records, not events."""
        listed = [FileInfo(path=f.path, rows=f.rows, bytes=f.bytes, sha256=f.sha256) for f in files]
        return Artifact.of(self.data_uri, listed, digest=digest).model_copy(update={"rows": rows})

    def orphan_files(self, before: datetime, *, metadata_uri: str | None = None) -> list[tuple[str, int]]:
        """Data files that no snapshot has and that are older than a time: URI and bytes.

        Also those of the table's metadata, if it is said where they are.
        """
        found = [
            (storage.join(place, path), size)
            for place in (self.data_uri, *([metadata_uri] if metadata_uri else []))
            for path, size, modified in storage.list_details(place)
            if modified < before.timestamp()
        ]
        # Read after the listing: a file that was committed in between counts as committed.
        table = self._load() if found else None
        if table is None:
            return found
        known = iceberg_table.referenced_uris(table) if metadata_uri else iceberg_table.data_uris(table)
        plain = {path_in(uri, "") for uri in known}
        return [(uri, size) for uri, size in found if uri.lstrip("/") not in plain]

    def file_location(self, path: str) -> str:
        """What the table calls a data file."""
        uri = storage.join(self.data_uri, path)
        return uri if storage.is_remote(uri) else f"file://{uri}"

    def begin(self, state: GroupState, table: TableSpec, write_time: datetime | None = None) -> Attempt:
        """What is needed to write events of `table` on top of `state`. Changes nothing.

        `write_time` of the events: now, unless it is given, and later than that of the latest commit.
        """
        assert state.iceberg is not None
        transaction = state.iceberg.transaction()
        if (new := missing_columns(state.iceberg.schema(), table)).fields:
            with transaction.update_schema() as update:
                update.union_by_name(new)
        now = datetime.now(UTC)
        target = WriteTarget(
            data_uri=self.data_uri,
            table=table,
            token=attempt_token(),
            schema=schema_to_pyarrow(transaction.table_metadata.schema()),
            partition=iceberg_table.partition_name(state.iceberg),
            write_time=write_time or max(now, state.last.write_time + timedelta(microseconds=1) if state.last else now),
        )
        return Attempt(state, transaction, target)

    @contextlib.contextmanager
    def attempt(self, state: GroupState, table: TableSpec, write_time: datetime | None = None) -> Iterator[Attempt]:
        """See `begin`. If the block fails, the files that it has written are deleted."""
        begun = self.begin(state, table, write_time)
        try:
            yield begun
        except BaseException:
            with contextlib.suppress(StepError, OSError):  # a later ingestion deletes them too
                if self._committed(begun) is None:
                    self._delete_files_of(begun.target.token)
            raise

    def append(self, attempt: Attempt, commit: Commit, paths: Sequence[str]) -> Commit:
        """Make `commit` and its files visible, atomically. Returns it with its snapshot's id.

        Raises `CommitTaken` if another writer has committed since the attempt began, and `StepError` if the group has
        been deleted.
        """
        table = attempt.state.iceberg
        assert table is not None
        before = attempt.state.last.table if attempt.state.last else None
        summary = commit.summary(before) | {INGESTION_KEY: attempt.target.token}
        try:
            added = [self.file_location(path) for path in paths]
            snapshot_id = iceberg_table.commit(table, attempt.transaction, added, summary)
        except CommitFailedException as error:
            raise CommitTaken(f"another writer has made commit {commit.number} of feature group {self.name}") from error
        except NoSuchTableError as error:
            raise self._deleted() from error
        except Exception:
            # The answer may have got lost: what counts is what the catalog says.
            if (found := self._committed(attempt)) is None:
                raise
            snapshot_id = found
        return commit.model_copy(update={"snapshot_id": snapshot_id})

    def _deleted(self) -> StepError:
        return StepError(f"feature group {self.name} was deleted while it was written to; ingest again")

    def _committed(self, attempt: Attempt) -> int | None:
        """Id of the snapshot that an attempt has made."""
        table = self._load()
        made = table.metadata.snapshots if table is not None else []
        token = attempt.target.token
        return next((s.snapshot_id for s in made if summary_of(s).get(INGESTION_KEY) == token), None)


def retry_on_commit_conflict(write: Callable[[], T], log: Callable[[str], None]) -> T:
    """Repeat `write`, which begins by reading the group's state, while other writers commit first; logs each time.

    Raises `StepError` after 12 times: of writers that start together, one a round succeeds.
    """
    attempts = Retrying(
        retry=retry_if_exception_type(CommitTaken),
        stop=stop_after_attempt(_COMMIT_ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.1, max=_LONGEST_PAUSE),
        before_sleep=lambda state: log(f"{state.outcome.exception() if state.outcome else ''}: comparing again"),
        reraise=True,
    )
    try:
        return attempts(write)
    except CommitTaken as error:
        raise StepError(
            f"other writers have committed to the feature group first, {_COMMIT_ATTEMPTS} times in a row; nothing of "
            "this one was committed. Ingest again when fewer runs write to the group"
        ) from error
