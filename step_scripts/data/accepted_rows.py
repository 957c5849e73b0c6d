"""What becomes of a block of CSV records: accepted rows get their ids and are written, rejected ones are listed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pyarrow as pa
from pydantic import BaseModel, Field

from step_scripts.data.csv_source import FAULTS, LINE, LINES, FragmentFacts, facts_and_rows
from step_scripts.data.duplicate_rows import without_duplicates, write_ids
from step_scripts.data.parquet_files import write_parquet
from step_scripts.parameters import ValidateSourceParams
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, FileInfo
from step_scripts.table.column_types import TIMESTAMP
from step_scripts.table.hashes import Hash128, RowSetDigest, row_hashes
from step_scripts.table.record_ids import distinct_hashes, hashes_of_ids, ids_of_hashes
from step_scripts.table.spec import TableSpec

LISTED_REJECTIONS = 100_000
REJECTION_SCHEMA = {"line": pl.Int64(), "column": pl.String(), "value": pl.String(), "reason": pl.String()}


class ColumnStatistics(BaseModel):
    """Of the valid rows."""

    minimum: float | int | str | bool | None = None
    maximum: float | int | str | bool | None = None
    nulls: int = 0

    def merge(self, other: ColumnStatistics) -> ColumnStatistics:
        """Of the rows of both."""
        values: list[Any] = [v for s in (self, other) for v in (s.minimum, s.maximum) if v is not None]
        return ColumnStatistics(
            minimum=min(values, default=None), maximum=max(values, default=None), nulls=self.nulls + other.nulls
        )


class WrittenRows(BaseModel):
    """The rows of a fragment that were written. `file` is None if there are none."""

    rows: int = 0
    file: FileInfo | None = None
    digest: RowSetDigest = RowSetDigest()
    statistics: dict[str, ColumnStatistics] = {}


class Problem(BaseModel):
    """How many cells of a column have a problem, and the first of them. `line` counts from the fragment's start."""

    column: str
    problem: str
    count: int
    line: int
    value: str


class FragmentReport(FragmentFacts):
    """What became of a fragment: `records` were parsed; `record_lines` and `rejected_lines` are lines that all and the
    rejected records take.
    """

    records: int = 0
    rejected_rows: int = 0
    record_lines: int = 0
    rejected_lines: int = 0
    problems: list[Problem] = Field(default_factory=list)
    written: WrittenRows = WrittenRows()


@dataclass(frozen=True)
class RowsPlan:
    """What every task has to know. `modified` are the files' times by fragment.

    Rows go below `rows_uri`, what only this step needs below `scratch_uri`.
    """

    params: ValidateSourceParams
    modified: dict[int, float]
    rows_uri: str
    scratch_uri: str
    partitions: int

    def ids_uri(self, fragment: int) -> str:
        """Where the record ids of a fragment are kept for the search for duplicates."""
        return storage.join(self.scratch_uri, f"ids-{fragment:05d}.arrow")


def rejections_file(fragment: int) -> str:
    """The scratch file that lists the rejected rows of a fragment, the first `LISTED_REJECTIONS` of them."""
    return f"rejected-{fragment:05d}.parquet"


def write_rows(block: pa.Table, plan: RowsPlan) -> FragmentReport:
    """Write what is accepted of a block, and list what is rejected. What is wrong with all of it is in `fault`."""
    facts, rows = facts_and_rows(block)
    accepted = rows.filter(pl.col(FAULTS).is_null()) if rows[FAULTS].null_count() < rows.height else rows
    rejected = rows.filter(pl.col(FAULTS).is_not_null())
    rejections = _rejections(rejected)
    if not rejections.is_empty():
        listed = rejections.head(LISTED_REJECTIONS).select(list(REJECTION_SCHEMA))
        write_parquet(listed, plan.scratch_uri, rejections_file(facts.index))
    written = WrittenRows()
    if accepted.height:
        table = plan.params.table
        hashes = row_hashes(accepted, table.key_columns or table.column_names)
        event_time = _event_time(table, plan.modified[facts.index])
        frame = accepted.select(ids_of_hashes(hashes), event_time, *table.column_names)
        written = _write(frame, hashes, plan.rows_uri, facts.index, table)
        write_ids(plan.ids_uri(facts.index), facts.index, hashes, accepted[LINE], plan.partitions)
    return FragmentReport(
        **facts.model_dump(),
        records=rows.height,
        rejected_rows=rejected.height,
        record_lines=int(rows[LINES].sum()),
        rejected_lines=int(rejected[LINES].sum()),
        problems=_problems(rejections),
        written=written,
    )


def rewrite_rows(duplicate_uris: Sequence[str], fragment: int, plan: RowsPlan) -> WrittenRows:
    """Write the rows of a fragment again: those that equal an earlier row are dropped, or get ids of their own.

    Not atomic: nobody sees the file yet.
    """
    stored = pl.read_parquet(storage.read_bytes(storage.join(plan.rows_uri, _file_name(fragment))))
    frame = without_duplicates(stored, duplicate_uris, fragment, keep=plan.params.duplicate_rows == "keep")
    ids = frame["record_id"]
    return _write(frame, distinct_hashes(ids, hashes_of_ids(ids)), plan.rows_uri, fragment, plan.params.table)


def rows_artifact(uri: str, written: Sequence[WrittenRows], table: TableSpec) -> Artifact:
    """The artifact of all rows. Its digest is that of the set of rows: cutting the source otherwise changes nothing."""
    schema = table.model_dump_json(include={"columns": {"__all__": {"name", "dtype"}}, "key_columns": True})
    digest = RowSetDigest()
    for one in written:
        digest = digest.merge(one.digest)
    return Artifact.of(uri, [one.file for one in written if one.file is not None], digest=digest.hexdigest(schema))


def merged_statistics(written: Iterable[WrittenRows]) -> dict[str, dict[str, Any]]:
    """Statistics of all rows, by column."""
    merged: dict[str, ColumnStatistics] = {}
    for one in written:
        for name, statistics in one.statistics.items():
            merged[name] = merged[name].merge(statistics) if name in merged else statistics
    return {name: statistics.model_dump() for name, statistics in merged.items()}


def _write(frame: pl.DataFrame, hashes: Hash128, rows_uri: str, fragment: int, table: TableSpec) -> WrittenRows:
    """Write record_id, event_time and the table's columns. `hashes` are those of the record ids."""
    # The digits of a hash cost LZ4 time and stay as long as they are.
    compression = {name: "none" if name == "record_id" else "lz4" for name in frame.columns}
    # Without keys the id stands for the whole content.
    content = ["event_time", *(table.column_names if table.key_columns else ())]
    return WrittenRows(
        rows=frame.height,
        file=write_parquet(frame, rows_uri, _file_name(fragment), compression),
        digest=RowSetDigest.of(hashes, frame, content),
        statistics={name: _statistics(frame[name]) for name in table.column_names},
    )


def _file_name(fragment: int) -> str:
    return f"part-{fragment:05d}.parquet"


def _statistics(column: pl.Series) -> ColumnStatistics:
    return ColumnStatistics(minimum=_plain(column.min()), maximum=_plain(column.max()), nulls=column.null_count())


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _event_time(table: TableSpec, modified: float) -> pl.Expr:
    if table.event_time_column:
        return pl.col(table.event_time_column).cast(TIMESTAMP).alias("event_time")
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=round(modified * 1e6))
    return pl.lit(moment, dtype=TIMESTAMP).alias("event_time")


def _rejections(rejected: pl.DataFrame) -> pl.DataFrame:
    """Line, column, value, reason, problem of each fault; in order of line."""
    faults = rejected.select(pl.col(LINE).cast(pl.Int64).alias("line"), FAULTS).explode(FAULTS)
    return faults.select("line", pl.col(FAULTS).struct.unnest())


def _problems(rejections: pl.DataFrame) -> list[Problem]:
    first = pl.col("line", "value").first()
    groups = rejections.group_by("column", "problem", maintain_order=True).agg(pl.len().alias("count"), first)
    return [Problem.model_validate(group) for group in groups.iter_rows(named=True)]
