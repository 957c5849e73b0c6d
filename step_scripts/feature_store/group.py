"""A feature group as readers and writers see it: its description, its commits, its data files.

    <root>/<group>/group.json      name, table, time of creation, format; on S3 where the data and the Glue table are
    <root>/<group>/catalog.db      local groups only: the Iceberg catalog
    <root>/<group>/metadata/       local groups only: the Iceberg table's metadata
    <root>/<group>/_expired.json   commits whose snapshots have been expired
    <data>/event_time_day=YYYY-MM-DD/<attempt>-<SHA-256 of the file>.parquet

`<data>` is `<root>/<group>/data`, or what SageMaker resolved. `step_scripts.feature_store.group_places` says how two
writers are kept apart.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from string import ascii_uppercase, digits
from typing import Any

from pydantic import ValidationError
from pyiceberg.exceptions import CommitFailedException, NoSuchTableError
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table, Transaction

from step_scripts.feature_store import iceberg_table
from step_scripts.feature_store.commits import (
    COMPACTED_KEY,
    FORMAT,
    INGESTION_KEY,
    Commit,
    GroupState,
    history,
    summary_of,
)
from step_scripts.feature_store.events import WriteTarget, table_columns
from step_scripts.feature_store.iceberg_table import CommitTaken, path_in, reading
from step_scripts.runner import storage
from step_scripts.runner.contract import FrozenModel, StepError
from step_scripts.table.spec import TableSpec

GROUP_NAME = re.compile(r"[a-zA-Z0-9]([_-]*[a-zA-Z0-9]){0,63}")  # SageMaker's rule for feature groups
ORPHAN_AGE = timedelta(days=3)  # a younger file may belong to a writer that is at work
COMMAND = "python -m step_scripts.feature_store"
_REFUSED_CHARACTERS = "#?%"  # pyiceberg takes places for URLs and would write beside the root


class GroupInfo(FrozenModel):
    """What is known of a group from its creation on. `data_uri`: where its data are, if not in its own folder.

    `glue_table`: database and name of its table in Glue, with a dot between them; on S3 only.
    """

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
    def data_uri(self) -> str:
        """Where the data files are."""
        return storage.join(self.uri, "data")

    @contextlib.contextmanager
    def lock(self, *, create: bool = False) -> Iterator[None]:
        """Write to the group for the length of the block.

        Raises `StepError` if that is not possible now; without `create`, also if there is no such group.
        """
        if not create and not self.is_there():
            raise StepError(f"there is no feature group {self.name} in {self.root}")
        yield

    @abstractmethod
    def delete_orphan_files(self) -> int:
        """Delete what killed writers left: data files that no snapshot has. Returns how many."""

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
        """Describe the group and make its table, as long as it has no commits. The caller holds the lock.

        Its data and its table in Glue stay where they are unless other places are given.
        """
        known = self.info()
        info = GroupInfo(
            format=FORMAT,
            name=self.name,
            table=table,
            created_at=datetime.now(UTC),
            data_uri=data_uri or (known and known.data_uri),
            glue_table=glue_table or (known and known.glue_table),
        )
        storage.write_bytes(self._info_uri, info.model_dump_json(indent=2).encode())
        self._make_table(info)

    def state(self, upto: int | None = None) -> GroupState:
        """The group now, or after commit `upto`. Raises `StepError` if its table cannot be read."""
        with reading(self.uri):
            table = self._load()
            found = history(table, self.expired()) if table is not None else {}
        commits = list(found.values())
        if list(found) != list(range(1, len(commits) + 1)):
            raise StepError(
                f"the history of feature group {self.name} has gaps: of its commits there are {list(found)}. "
                f"Another program may have expired snapshots of the table; restore {self.uri} from a backup, or delete "
                "the group"
            )
        if upto is not None and not 0 <= upto <= len(commits):
            raise StepError(f"feature group {self.name} has no commit {upto}; its latest is {len(commits)}")
        return GroupState(self.name, self.data_uri, commits[:upto], table)

    def expired(self) -> list[Commit]:
        """Commits whose snapshots have been expired: what they changed is known, what was then there is not."""
        try:
            return [Commit.model_validate(facts) for facts in json.loads(storage.read_bytes(self.expired_uri))]
        except FileNotFoundError:
            return []

    def orphan_files(self, before: datetime, *, metadata: bool = False) -> list[tuple[str, int]]:
        """Data files that no snapshot has and that are older than a time: URI and bytes.

        With `metadata`, also those of a local table's metadata; on S3 they are where SageMaker wants them.
        """
        found = {
            path_in(uri := storage.join(place, path)): (uri, size)
            for place in (self.data_uri, *([storage.join(self.uri, "metadata")] if metadata else []))
            for path, size, modified in storage.list_details(place)
            if modified < before.timestamp()
        }
        # Read after the listing: a file that was committed in between counts as committed.
        table = self._load() if found else None
        for uri in iceberg_table.files_named_by(table) if table is not None else ():
            found.pop(path_in(uri), None)
            if not found:
                break
        return list(found.values())

    @contextlib.contextmanager
    def attempt(self, state: GroupState, table: TableSpec, write_time: datetime | None = None) -> Iterator[Attempt]:
        """What is needed to write events of `table` on top of `state`. If the block fails, its files are deleted.

        `write_time` of the events: now, unless it is given, and later than that of the latest commit.
        """
        assert state.iceberg is not None
        transaction = state.iceberg.transaction()
        if new := table_columns(table, state.iceberg.schema()):
            with transaction.update_schema() as update:
                update.union_by_name(new)
        now = datetime.now(UTC)
        target = WriteTarget(
            data_uri=self.data_uri,
            table=table,
            token="".join(secrets.choice(ascii_uppercase + digits) for _ in range(6)),
            schema=schema_to_pyarrow(transaction.table_metadata.schema()),
            partition=state.iceberg.spec().fields[0].name,
            write_time=write_time or max(now, state.last.write_time + timedelta(microseconds=1) if state.last else now),
        )
        begun = Attempt(state, transaction, target)
        try:
            yield begun
        except BaseException:
            with contextlib.suppress(StepError, OSError):  # a later ingestion deletes them too
                if not self._is_committed(begun):
                    self._delete_files_of(target.token)
            raise

    def append(self, attempt: Attempt, commit: Commit, paths: Sequence[str], removed: Sequence[DataFile] = ()) -> None:
        """Make `commit` and its files visible, atomically.

        With `removed`, they hold the events that those files have held: a compaction after the latest commit.
        Raises `CommitTaken` if another writer has committed since the attempt began, and `StepError` if the group has
        been deleted.
        """
        table = attempt.state.iceberg
        assert table is not None
        last = attempt.state.last
        summary = commit.summary(last.table if last and not removed else None)
        summary |= {INGESTION_KEY: attempt.target.token} | ({COMPACTED_KEY: "true"} if removed else {})
        folder = self.data_uri if storage.is_remote(self.data_uri) else f"file://{self.data_uri}"
        added = [storage.join(folder, path) for path in paths]
        try:
            iceberg_table.commit(table, attempt.transaction, added, summary, removed)
        except CommitFailedException as error:
            raise CommitTaken(f"another writer has made commit {commit.number} of feature group {self.name}") from error
        except NoSuchTableError as error:
            raise self._deleted() from error
        except Exception:
            # The answer may have got lost: what counts is what the catalog says.
            if not self._is_committed(attempt):
                raise

    def _deleted(self) -> StepError:
        return StepError(f"feature group {self.name} was deleted while it was written to; ingest again")

    def _is_committed(self, attempt: Attempt) -> bool:
        table = self._load()
        made = table.metadata.snapshots if table is not None else []
        return any(summary_of(snapshot).get(INGESTION_KEY) == attempt.target.token for snapshot in made)
