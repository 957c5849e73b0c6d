"""The task on one piece of a CSV file: read, parse, validate, identify, write. Runs in a Ray worker."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
from pydantic import BaseModel

from step_scripts import storage
from step_scripts.cell_parsing import ParsedRows, parse_rows
from step_scripts.csv_chunks import Chunk, ChunkFault, Records, count_byte, has_odd_quotes, read_chunk, split_records
from step_scripts.duplicate_rows import write_ids
from step_scripts.parameters import ValidateSourceParams
from step_scripts.record_ids import ids_of_lanes, record_lanes
from step_scripts.source_parts import PartReport, write_parquet, write_part
from step_scripts.table import TableSpec

LISTED_REJECTIONS = 100_000
REJECTION_SCHEMA = {"line": pl.Int64(), "column": pl.String(), "value": pl.String(), "reason": pl.String()}


class Problem(BaseModel):
    """How many cells of a column have a problem, and the first of them. `line` counts from the start of the piece."""

    column: str
    problem: str
    count: int
    line: int
    value: str


class ChunkReport(BaseModel):
    """What became of a piece. Lines count from 1 at its start. `records` leaves out blank lines. `content`: the sum of
    its blocks."""

    index: int
    odd_quotes: bool = False
    fault: tuple[int, str] | None = None
    lines: int = 0
    records: int = 0
    misfits: int = 0
    rejected_rows: int = 0
    problems: list[Problem] = []
    part: PartReport = PartReport()
    content: int = 0


@dataclass(frozen=True)
class ChunkTask:
    """What a worker is sent. Parts go below `rows_uri`, what only this step needs below `scratch_uri`."""

    chunk: Chunk
    params: ValidateSourceParams
    rows_uri: str
    scratch_uri: str
    buckets: int


def rejections_uri(scratch_uri: str, index: int) -> str:
    """Where the rejected rows of piece `index` are listed, the first `LISTED_REJECTIONS` of them."""
    return storage.join(scratch_uri, f"rejected-{index:05d}.parquet")


def ids_uri(scratch_uri: str, index: int) -> str:
    """Where the record ids of piece `index` are kept for the search for duplicates."""
    return storage.join(scratch_uri, f"ids-{index:05d}.bin")


def validate_chunk(task: ChunkTask) -> ChunkReport:
    """Do the task. What is wrong with the piece as a whole is in the report's `fault`."""
    try:
        return _validate(task)
    except ChunkFault as fault:
        return ChunkReport(index=task.chunk.index, fault=(fault.line, fault.problem))
    except FileNotFoundError:
        problem = "the file disappeared while it was read. Restore it, then start again"
        return ChunkReport(index=task.chunk.index, fault=(1, problem))


def _validate(task: ChunkTask) -> ChunkReport:
    chunk, params = task.chunk, task.params
    data, _, content = read_chunk(chunk, params.max_line_bytes)
    if has_odd_quotes(data):
        return ChunkReport(index=chunk.index, odd_quotes=True)
    lines_total = count_byte(data, ord("\n"))
    records, parsed = _parse(data, chunk, params)
    del data
    lines = records.lines if records.lines is not None else np.arange(1, records.count + 1, dtype=np.uint32)
    rejected = parsed.faults["row"].unique()
    keep = np.ones(records.count, dtype=bool)
    keep[rejected.to_numpy()] = False
    frame = parsed.frame if keep.all() else parsed.frame.filter(pl.Series(keep))
    rejections = _rejections(parsed.faults, lines, records, chunk.file.fields)
    if not rejections.is_empty():
        listed = rejections.head(LISTED_REJECTIONS).select(list(REJECTION_SCHEMA))
        write_parquet(listed, rejections_uri(task.scratch_uri, chunk.index))
    part = PartReport()
    if frame.height:
        table = params.table
        lanes = record_lanes(frame, table.key_columns or table.column_names)
        frame = frame.select(ids_of_lanes(lanes), _event_time(table, chunk.file.modified), pl.all())
        part = write_part(frame, task.rows_uri, chunk.index, table, lanes)
        write_ids(ids_uri(task.scratch_uri, chunk.index), lanes, lines[keep], task.buckets)
    return ChunkReport(
        index=chunk.index,
        lines=lines_total,
        records=records.count + len(records.misfits),
        misfits=len(records.misfits),
        rejected_rows=len(rejected) + len(records.misfits),
        problems=_problems(rejections),
        part=part,
        content=content,
    )


def _parse(data: bytes, chunk: Chunk, params: ValidateSourceParams) -> tuple[Records, ParsedRows]:
    layout = (chunk.file.positions, chunk.file.fields, params.delimiter, params.table)
    records = split_records(data, params.delimiter, chunk.file.fields)
    try:
        return records, parse_rows(records, *layout)
    except pl.exceptions.ComputeError:
        if records.lines is not None:
            raise
    # As many fields are missing in some records as others have too many.
    records = split_records(data, params.delimiter, chunk.file.fields, exact=True)
    return records, parse_rows(records, *layout)


def _event_time(table: TableSpec, modified: float) -> pl.Expr:
    dtype = pl.Datetime("us", "UTC")
    if table.event_time_column:
        return pl.col(table.event_time_column).cast(dtype).alias("event_time")
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=round(modified * 1e6))
    return pl.lit(moment, dtype=dtype).alias("event_time")


def _rejections(faults: pl.DataFrame, lines: np.ndarray, records: Records, fields: int) -> pl.DataFrame:
    """Line, column, value, reason, problem; in order of line."""
    reason = pl.concat_str(
        [pl.when(pl.col("value") != "").then(pl.col("value") + " ").otherwise(pl.lit("")), "problem"]
    )
    cells = faults.select(
        pl.Series("line", lines[faults["row"].to_numpy()], dtype=pl.Int64), "column", "value", reason.alias("reason"),
        "problem",
    )  # fmt: skip
    if not records.misfits:
        return cells
    counts = [f"has {n} field{'s' if n != 1 else ''}, the header {fields}" for _, n, _ in records.misfits]
    misfits = pl.DataFrame(
        {
            "line": [line for line, _, _ in records.misfits],
            "column": "",
            "value": [text for _, _, text in records.misfits],
            "reason": [f"the row {count}" for count in counts],
            "problem": [f"row {count}" for count in counts],
        },
        schema={**REJECTION_SCHEMA, "problem": pl.String()},
    )
    return pl.concat([cells, misfits]).sort("line", maintain_order=True)


def _problems(rejections: pl.DataFrame) -> list[Problem]:
    first = pl.col("line", "value").first()
    groups = rejections.group_by("column", "problem", maintain_order=True).agg(pl.len().alias("count"), first)
    return [Problem.model_validate(group) for group in groups.iter_rows(named=True)]
