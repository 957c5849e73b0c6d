"""Commits: what one ingestion or deletion changed. Each is a snapshot of the group's Iceberg table.

What it changed is in the snapshot's summary. Of snapshots that have been expired it is in a file beside the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Operation, Snapshot

from step_scripts.table.spec import TableSpec

FORMAT = 2
# Names in the summaries of snapshots.
_PREFIX = "housing."
COMMIT_KEY = f"{_PREFIX}commit"
INGESTION_KEY = f"{_PREFIX}ingestion"
REPLAYED_KEY = f"{_PREFIX}replayed-from"
COMPACTED_KEY = f"{_PREFIX}compaction"
_DIGEST_FORMAT = "{:016x}{:016x}"
EMPTY_DIGEST = _DIGEST_FORMAT.format(0, 0)


class Commit(BaseModel):
    """What one ingestion or deletion changed, and the state of the group after it.

    Rows of the dataset are either `added` (new records, and events older than what was known), `superseded` (the live
    event of a record was replaced) or `unchanged` (nothing stored). `deleted` counts tombstones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int = Field(ge=1)
    created_at: datetime
    write_time: datetime = Field(description="`write_time` of all its events; later than that of every earlier commit.")
    dataset_digest: str | None = Field(default=None, description="Of the ingested artifact. None: a single deletion.")
    table: TableSpec = Field(description="The group's columns from this commit on.")
    added: int = 0
    unchanged: int = 0
    superseded: int = 0
    deleted: int = 0
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
        found = {_key(name): value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
        if self.table != before:
            found[_key("table")] = self.table.model_dump_json(exclude_defaults=True)
        return {COMMIT_KEY: str(self.number), f"{_PREFIX}format": str(FORMAT), **found}

    @classmethod
    def of(cls, snapshot: Snapshot, before: TableSpec | None) -> Commit:
        """The commit that a snapshot's summary describes. Raises `ValueError` if something is missing."""
        summary = summary_of(snapshot)
        facts: dict[str, object] = {name: summary[_key(name)] for name in cls.model_fields if _key(name) in summary}
        if _key("table") in summary:
            before = TableSpec.model_validate_json(summary[_key("table")])
        return cls.model_validate({**facts, "table": before, "snapshot_id": snapshot.snapshot_id})


def _key(name: str) -> str:
    return COMMIT_KEY if name == "number" else f"{_PREFIX}{name.replace('_', '-')}"


def digest_of(sums: Sequence[int]) -> str:
    """32 hexadecimal digits of two 64-bit sums."""
    return _DIGEST_FORMAT.format(*sums)


def summary_of(snapshot: Snapshot) -> Mapping[str, str]:
    """The properties in a snapshot's summary."""
    return snapshot.summary.additional_properties if snapshot.summary is not None else {}


def number_of(snapshot: Snapshot) -> int:
    """The number of the commit that a snapshot of this store belongs to."""
    return int(summary_of(snapshot)[COMMIT_KEY])


def is_append(snapshot: Snapshot) -> bool:
    """Whether a snapshot has all files of the one before."""
    return snapshot.summary is not None and snapshot.summary.operation == Operation.APPEND


def in_order(table: Table) -> list[Snapshot]:
    """All snapshots, oldest first."""
    return sorted(table.metadata.snapshots, key=lambda snapshot: snapshot.sequence_number or 0)


def own_snapshots(table: Table) -> list[Snapshot]:
    """Snapshots that this store has made, oldest first."""
    return [snapshot for snapshot in in_order(table) if COMMIT_KEY in summary_of(snapshot)]


def foreign_appends(table: Table) -> set[int]:
    """Ids of snapshots that other programs have made and whose rows are no part of the group: all but compactions."""
    others = [s for s in in_order(table) if s.summary is not None and COMMIT_KEY not in summary_of(s)]
    return {s.snapshot_id for s in others if s.summary is not None and s.summary.operation.value != "replace"}


def history(table: Table, expired: Sequence[Commit]) -> dict[int, Commit]:
    """All commits by number: those `expired`, and those whose snapshots are there."""
    found = {commit.number: commit for commit in expired}
    spec = None
    for snapshot in own_snapshots(table):
        before = found.get(number_of(snapshot) - 1)
        commit = Commit.of(snapshot, before.table if before else spec)
        found[commit.number], spec = commit, commit.table
    return dict(sorted(found.items()))
