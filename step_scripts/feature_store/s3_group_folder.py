"""A feature group on S3. There is no lock: writers work side by side, and the first to commit wins.

A commit is a conditional put, so that two writers can never both make commit N; the loser compares its rows again with
what the winner stored. Files of a killed writer cannot be told from those of one that is at work, except by their age:
what no commit names is removed after `STRAY_SECONDS`, and a writer that took more than half as long gives up instead of
committing.
"""

from __future__ import annotations

import contextlib
import functools
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from step_scripts.feature_store.group_folder import (
    LOCK_SECONDS,
    Commit,
    CommitTaken,
    GroupFolder,
    GroupInfo,
    StoredFile,
    commit_name,
)
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.s3_objects import delete_objects, delete_prefix, list_objects, put_if_absent
from step_scripts.table.spec import TableSpec

STRAY_SECONDS = 48 * 3600.0
_REMOVAL = "removal.json"  # there while the group is being deleted
_READERS = 16


class S3GroupFolder(GroupFolder):
    """The folder of one group below an s3:// prefix. `data_uri` may be elsewhere, as the group's description says."""

    def __init__(self, root: str, name: str, data_uri: str | None = None) -> None:
        super().__init__(root.replace("s3a://", "s3://", 1), name)
        self._data_uri = data_uri.rstrip("/") if data_uri else None
        self._staging = storage.join(self.uri, "_staging")
        self._began: float | None = None
        self._etags: dict[str, str] = {}

    @property
    def data_uri(self) -> str:
        """What was given, else what the group's description says, else the folder's own `data`."""
        if self._data_uri is None:
            info = self.info()
            self._data_uri = (info.data_uri if info else None) or storage.join(self.uri, "data")
        return self._data_uri

    def create(self, table: TableSpec, data_uri: str | None = None) -> GroupInfo:
        """Describe the group, as long as it has no commits. Its data stay where they are unless `data_uri` is given."""
        self._data_uri = data_uri or self.data_uri
        return super().create(table, self._data_uri)

    def append(self, commit: Commit) -> None:
        """Make `commit` visible if no other writer has been first.

        Raises `CommitTaken` if one has, and `StepError` if this one took too long or the group has been deleted.
        """
        if self._began is not None and time.monotonic() - self._began > STRAY_SECONDS / 2:
            raise StepError(
                f"writing to feature group {self.name} took more than {STRAY_SECONDS / 7200:.0f} hours, after which "
                "its files may be taken for leftovers. Nothing was committed; ingest with more actors or hosts"
            )
        uri = storage.join(self.log_uri, commit_name(commit.number))
        if not put_if_absent(uri, commit.model_dump_json(indent=1).encode()):
            raise CommitTaken(f"another writer has made commit {commit.number} of {self.name}; ingest again")
        if self.info() is None:
            delete_objects(self.log_uri, [commit_name(commit.number)])
            raise StepError(f"feature group {self.name} was deleted while it was written to; ingest again")

    @contextlib.contextmanager
    def lock(self, seconds: float = LOCK_SECONDS, *, create: bool = False) -> Iterator[None]:
        """Write to the group; others may too."""
        if not create and self.info() is None:
            raise StepError(f"there is no feature group {self.name} in {self.root}")
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None

    @contextlib.contextmanager
    def staging(self) -> Iterator[str]:
        """A scratch prefix of this writer alone."""
        uri = storage.join(self._staging, uuid.uuid4().hex)
        try:
            yield uri
        finally:
            delete_prefix(uri)

    def remove_strays(self) -> int:
        """Remove uncommitted files and scratch that are older than `STRAY_SECONDS`."""
        oldest = datetime.now(UTC) - timedelta(seconds=STRAY_SECONDS)
        delete_objects(self._staging, [o.path for o in list_objects(self._staging) if o.modified < oldest])
        old = [o.path for o in list_objects(self.data_uri) if o.modified < oldest]
        if not old:
            return 0
        # Read after the listing: a file that was committed in between counts as committed.
        committed = {f.path for c in self.commits() for f in c.files}
        strays = [path for path in old if path not in committed]
        delete_objects(self.data_uri, strays)
        return len(strays)

    def remove_attempt(self, token: str) -> None:
        """Remove the data files whose names begin with `token` after the time."""
        paths = (o.path for o in list_objects(self.data_uri))
        delete_objects(self.data_uri, [p for p in paths if p.rpartition("_")[2].startswith(token)])

    def remove(self) -> None:
        """Delete the group: its description first, so that nobody sees a half of it.

        A marker stays until everything is gone, so that a removal that has failed can be found and repeated.
        """
        data_uri = self.data_uri
        storage.write_bytes(storage.join(self.uri, _REMOVAL), b"{}")
        delete_objects(self.uri, ["group.json"])
        delete_prefix(self.log_uri)
        delete_prefix(data_uri)
        delete_objects(self.uri, [o.path for o in list_objects(self.uri) if o.path != _REMOVAL])
        delete_prefix(self.uri)

    def removal_is_incomplete(self) -> bool:
        """Whether the group was to be deleted, and something of it is left."""
        return self.info() is None and storage.exists(storage.join(self.uri, _REMOVAL))

    def info(self) -> GroupInfo | None:
        """The group's description, or None if there is no such group."""
        info = super().info()
        if info is not None and info.data_uri and self._data_uri is None:
            self._data_uri = info.data_uri
        return info

    def _commit_names(self) -> list[str]:
        self._etags = {o.path: o.etag for o in list_objects(self.log_uri) if "/" not in o.path}
        return sorted(self._etags)

    def _commit_texts(self, names: Sequence[str]) -> list[bytes]:
        if not names:
            return []
        with ThreadPoolExecutor(min(_READERS, len(names))) as pool:
            uris = [storage.join(self.log_uri, name) for name in names]
            return list(pool.map(_commit_text, uris, [self._etags[name] for name in names]))

    def _sizes(self, files: Sequence[StoredFile]) -> dict[str, int]:
        return {o.path: o.bytes for o in list_objects(self.data_uri)} if files else {}


@functools.lru_cache(maxsize=1024)
def _commit_text(uri: str, etag: str) -> bytes:
    """A commit, read once: the entity tag tells it from that of a later group of the same name."""
    return storage.read_bytes(uri)
