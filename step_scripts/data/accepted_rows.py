"""What becomes of a fragment: accepted rows get their ids and are written, rejected ones are listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import reduce
from typing import Any

import polars as pl
import pyarrow as pa

from step_scripts.data.csv_fragments import LINE, FragmentFacts, facts_and_text, read_rows
from step_scripts.data.csv_text import DamagedText
from step_scripts.data.parquet_files import write_parquet
from step_scripts.data.partitions import without_duplicates, write_ids
from step_scripts.parameters import ValidateSourceParams
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, FileInfo
from step_scripts.table.column_types import TIMESTAMP
from step_scripts.table.hashes import Hash128, RowSetDigest, distinct_hashes, hashes_of_ids, ids_of_hashes, row_hashes
from step_scripts.table.spec import TableSpec

LISTED_REJECTIONS = 100_000


@dataclass
class WrittenRows:
    """The rows of a fragment that were written. `file` is None if there are none.

    `statistics`: smallest value, largest value and number of nulls, by column.
    """

    rows: int = 0
    file: FileInfo | None = None
    digest: RowSetDigest = field(default_factory=RowSetDigest)
    statistics: dict[str, tuple[Any, Any, int]] = field(default_factory=dict)


@dataclass
class FragmentReport(FragmentFacts):
    """What became of a fragment.

    `problems`: of each column and problem, how many cells have it, and the first one's line and value.
    """

    problems: pl.DataFrame | None = None
    written: WrittenRows = field(default_factory=WrittenRows)


@dataclass(frozen=True)
class RowsPlan:
    """What every task has to know. Rows go below `rows_uri`, what only this step needs below `scratch_uri`."""

    params: ValidateSourceParams
    rows_uri: str
    scratch_uri: str
    partitions: int

    def ids_uri(self, fragment: int) -> str:
        """Where the record ids of a fragment are kept for the search for duplicates."""
        return storage.join(self.scratch_uri, f"ids-{fragment:05d}.arrow")


def rejections_file(fragment: int) -> str:
    """The scratch file that lists the rejected cells of a fragment, the first `LISTED_REJECTIONS` of them."""
    return f"rejected-{fragment:05d}.parquet"


def write_rows(block: pa.Table, plan: RowsPlan) -> FragmentReport:
    """Write what is accepted of a fragment, a block of `CsvFragments`, and list what is rejected."""
    facts, text = facts_and_text(block)
    report, fragment, table = FragmentReport(**vars(facts)), facts.fragment, plan.params.table
    if report.fault:
        return report
    try:
        accepted, rejected = read_rows(report, text, plan.params)
    except DamagedText as fault:
        report.fault = fault
        return report
    if rejected.height:
        write_parquet(rejected.head(LISTED_REJECTIONS), plan.scratch_uri, rejections_file(fragment.index))
        groups = rejected.group_by("column", "problem", maintain_order=True)
        report.problems = groups.agg(pl.len().alias("count"), pl.col("line", "value").first())
    if accepted.height:
        hashes = row_hashes(accepted, table.key_columns or table.column_names)
        event_time = _event_time(table, fragment.file.modified)
        frame = accepted.select(ids_of_hashes(hashes), event_time, *table.column_names)
        report.written = _write(frame, hashes, fragment.index, plan)
        write_ids(plan.ids_uri(fragment.index), fragment.index, hashes, accepted[LINE], plan.partitions)
    return report


def rewrite_rows(duplicate_uris: Sequence[str], fragment: int, plan: RowsPlan) -> WrittenRows:
    """Write the rows of a fragment again: those that equal an earlier row are dropped, or get ids of their own.

    Not atomic: nobody sees the file yet.
    """
    stored = pl.read_parquet(storage.read_bytes(storage.join(plan.rows_uri, _file_name(fragment))))
    frame = without_duplicates(stored, duplicate_uris, fragment, keep=plan.params.duplicate_rows == "keep")
    ids = frame["record_id"]
    return _write(frame, distinct_hashes(ids, hashes_of_ids(ids)), fragment, plan)


def rows_artifact(uri: str, written: Sequence[WrittenRows], table: TableSpec) -> Artifact:
    """The artifact of all rows. Its digest is that of the set of rows: cutting the source otherwise changes nothing."""
    schema = table.model_dump_json(include={"columns": {"__all__": {"name", "dtype"}}, "key_columns": True})
    digest = reduce(RowSetDigest.merge, (one.digest for one in written))
    return Artifact.of(uri, [one.file for one in written if one.file is not None], digest=digest.hexdigest(schema))


def merged_statistics(written: Sequence[WrittenRows], table: TableSpec) -> dict[str, dict[str, Any]]:
    """Smallest value, largest value and number of nulls of all rows, by column."""
    merged = {}
    for name in table.column_names:
        found = [one.statistics[name] for one in written if one.statistics]
        values = [value for *bounds, _ in found for value in bounds if value is not None]
        nulls = sum(count for *_, count in found)
        merged[name] = {"minimum": min(values, default=None), "maximum": max(values, default=None), "nulls": nulls}
    return merged


def _write(frame: pl.DataFrame, hashes: Hash128, fragment: int, plan: RowsPlan) -> WrittenRows:
    """Write record_id, event_time and the table's columns. `hashes` are those of the record ids."""
    table = plan.params.table
    # The digits of a hash cost LZ4 time and stay as long as they are.
    compression = {name: "none" if name == "record_id" else "lz4" for name in frame.columns}
    # Without keys the id stands for the whole content.
    content = ["event_time", *(table.column_names if table.key_columns else ())]
    columns = {name: frame[name] for name in table.column_names}
    return WrittenRows(
        rows=frame.height,
        file=write_parquet(frame, plan.rows_uri, _file_name(fragment), compression),
        digest=RowSetDigest.of(hashes, frame, content),
        statistics={n: (_plain(c.min()), _plain(c.max()), c.null_count()) for n, c in columns.items()},
    )


def _file_name(fragment: int) -> str:
    return f"part-{fragment:05d}.parquet"


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _event_time(table: TableSpec, modified: float) -> pl.Expr:
    if table.event_time_column:
        return pl.col(table.event_time_column).cast(TIMESTAMP).alias("event_time")
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=round(modified * 1e6))
    return pl.lit(moment, dtype=TIMESTAMP).alias("event_time")
