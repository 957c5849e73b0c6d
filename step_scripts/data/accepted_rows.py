"""What becomes of a block of CSV records: accepted rows get their ids and are written, rejected ones are listed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import polars as pl
import pyarrow as pa
from pydantic import BaseModel, Field

from step_scripts.data.csv_source import FAULTS, LINE, LINES, RangeFacts, facts_and_rows
from step_scripts.data.duplicate_rows import write_ids
from step_scripts.data.source_parts import PartReport, write_parquet, write_part
from step_scripts.parameters import ValidateSourceParams
from step_scripts.runner import storage
from step_scripts.table.record_ids import ids_of_lanes, record_lanes
from step_scripts.table.spec import TableSpec

LISTED_REJECTIONS = 100_000
REJECTION_SCHEMA = {"line": pl.Int64(), "column": pl.String(), "value": pl.String(), "reason": pl.String()}


class Problem(BaseModel):
    """How many cells of a column have a problem, and the first of them. `line` counts from the start of the piece."""

    column: str
    problem: str
    count: int
    line: int
    value: str


class ChunkReport(RangeFacts):
    """What became of a range: `records` were parsed; `record_lines` and `rejected_lines` are lines that all and the
    rejected records take.
    """

    records: int = 0
    rejected_rows: int = 0
    record_lines: int = 0
    rejected_lines: int = 0
    problems: list[Problem] = Field(default_factory=list)
    part: PartReport = PartReport()


@dataclass(frozen=True)
class RowsPlan:
    """What every task has to know: `modified` are the files' times by range.

    Parts go below `rows_uri`, what only this step needs below `scratch_uri`.
    """

    params: ValidateSourceParams
    modified: dict[int, float]
    rows_uri: str
    scratch_uri: str
    buckets: int


def rejections_uri(scratch_uri: str, index: int) -> str:
    """Where the rejected rows of piece `index` are listed, the first `LISTED_REJECTIONS` of them."""
    return storage.join(scratch_uri, f"rejected-{index:05d}.parquet")


def ids_uri(scratch_uri: str, index: int) -> str:
    """Where the record ids of piece `index` are kept for the search for duplicates."""
    return storage.join(scratch_uri, f"ids-{index:05d}.bin")


def write_rows(block: pa.Table, plan: RowsPlan) -> ChunkReport:
    """Write what is accepted of a block, and list what is rejected. What is wrong with all of it is in `fault`."""
    facts, rows = facts_and_rows(block)
    accepted = rows.filter(pl.col(FAULTS).is_null()) if rows[FAULTS].null_count() < rows.height else rows
    rejected = rows.filter(pl.col(FAULTS).is_not_null())
    rejections = _rejections(rejected)
    if not rejections.is_empty():
        listed = rejections.head(LISTED_REJECTIONS).select(list(REJECTION_SCHEMA))
        write_parquet(listed, rejections_uri(plan.scratch_uri, facts.index))
    part = PartReport()
    if accepted.height:
        table = plan.params.table
        lanes = record_lanes(accepted, table.key_columns or table.column_names)
        frame = accepted.select(
            ids_of_lanes(lanes), _event_time(table, plan.modified[facts.index]), *table.column_names
        )
        part = write_part(frame, plan.rows_uri, facts.index, table, lanes)
        write_ids(ids_uri(plan.scratch_uri, facts.index), lanes, accepted[LINE].to_numpy(), plan.buckets)
    return ChunkReport(
        **facts.model_dump(),
        records=rows.height,
        rejected_rows=rejected.height,
        record_lines=int(rows[LINES].sum()),
        rejected_lines=int(rejected[LINES].sum()),
        problems=_problems(rejections),
        part=part,
    )


def _event_time(table: TableSpec, modified: float) -> pl.Expr:
    dtype = pl.Datetime("us", "UTC")
    if table.event_time_column:
        return pl.col(table.event_time_column).cast(dtype).alias("event_time")
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=round(modified * 1e6))
    return pl.lit(moment, dtype=dtype).alias("event_time")


def _rejections(rejected: pl.DataFrame) -> pl.DataFrame:
    """Line, column, value, reason, problem of each fault; in order of line."""
    faults = rejected.select(pl.col(LINE).cast(pl.Int64).alias("line"), FAULTS).explode(FAULTS)
    return faults.select("line", pl.col(FAULTS).struct.unnest())


def _problems(rejections: pl.DataFrame) -> list[Problem]:
    first = pl.col("line", "value").first()
    groups = rejections.group_by("column", "problem", maintain_order=True).agg(pl.len().alias("count"), first)
    return [Problem.model_validate(group) for group in groups.iter_rows(named=True)]
