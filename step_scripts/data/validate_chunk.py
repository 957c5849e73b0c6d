"""The task on one piece of a CSV file: read, parse, validate, identify, write. Runs in a Ray worker."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np
import polars as pl
from pydantic import BaseModel

from step_scripts.runner import storage
from step_scripts.data.cell_parsing import ParsedRows, parse_rows
from step_scripts.data.csv_chunks import Chunk, Records, has_odd_quotes, read_chunk, split_records
from step_scripts.data.csv_lines import blank_bytes, count_lines, count_records
from step_scripts.data.csv_records import ChunkFault
from step_scripts.data.duplicate_rows import write_ids
from step_scripts.parameters import ValidateSourceParams
from step_scripts.table.record_ids import ids_of_lanes, record_lanes
from step_scripts.data.source_parts import PartReport, write_parquet, write_part
from step_scripts.table.spec import TableSpec

LISTED_REJECTIONS = 100_000
_SHOWN_BYTES = 60
REJECTION_SCHEMA = {"line": pl.Int64(), "column": pl.String(), "value": pl.String(), "reason": pl.String()}


class Problem(BaseModel):
    """How many cells of a column have a problem, and the first of them. `line` counts from the start of the piece."""

    column: str
    problem: str
    count: int
    line: int
    value: str


class ChunkReport(BaseModel):
    """What became of a piece. Lines count from 1 at its start.

    `start`, `end`: the bytes of the file that were read. `counted` records were found by the line ends alone, blank
    lines left out; `records` is what was parsed. `fault`: first and last line, and what is wrong. `record_lines` and
    `rejected_lines`: lines that all and the rejected records take. `content`: the sum of its blocks.
    """

    index: int
    odd_quotes: bool = False
    fault: tuple[int, int, str] | None = None
    start: int = 0
    end: int = 0
    lines: int = 0
    counted: int = 0
    records: int = 0
    misfits: int = 0
    rejected_rows: int = 0
    record_lines: int = 0
    rejected_lines: int = 0
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
        return ChunkReport(index=task.chunk.index, fault=(fault.line, fault.last, fault.problem))
    except FileNotFoundError:
        problem = "the file disappeared while it was read. Restore it, then start again"
        return ChunkReport(index=task.chunk.index, fault=(1, 1, problem))


def _validate(task: ChunkTask) -> ChunkReport:
    chunk, params = task.chunk, task.params
    data, start, content = read_chunk(chunk, params.max_line_bytes)
    if has_odd_quotes(data):
        return ChunkReport(index=chunk.index, odd_quotes=True)
    if not data:  # no line begins in the piece
        return ChunkReport(index=chunk.index, start=start, end=start, content=content)
    end, lines_total, counted = start + len(data), count_lines(data), count_records(data, params.delimiter)
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
    misfit_lines = sum(m.lines for m in records.misfits)
    return ChunkReport(
        index=chunk.index,
        start=start,
        end=end,
        lines=lines_total,
        counted=counted,
        records=records.count + len(records.misfits),
        misfits=len(records.misfits),
        rejected_rows=len(rejected) + len(records.misfits),
        record_lines=misfit_lines + (records.count if records.spans is None else int(records.spans.sum())),
        rejected_lines=misfit_lines + (len(rejected) if records.spans is None else int(records.spans[~keep].sum())),
        problems=_problems(rejections),
        part=part,
        content=content,
    )


def _parse(data: bytes, chunk: Chunk, params: ValidateSourceParams) -> tuple[Records, ParsedRows]:
    file, table = chunk.file, params.table
    columns = zip(table.columns, file.positions, strict=True)
    limits = {
        "max_line_bytes": params.max_line_bytes,
        "single_line": {position: column.name for column, position in columns if column.dtype != "string"},
    }
    split = partial(split_records, delimiter=params.delimiter, fields=file.fields, **limits)
    layout = (file.positions, file.fields, params.delimiter, table)
    terminated = data if data.endswith(b"\n") else data + b"\n"  # Polars is lax on a last line without
    records = split(terminated)
    if terminated is not data and params.unterminated_last_row == "refuse":
        _check_last_line(data, params.delimiter)
    try:
        return records, parse_rows(records, *layout)
    except pl.exceptions.PolarsError:
        if records.lines is not None:
            raise
    # As many fields are missing in some records as others have too many.
    records = split(terminated, exact=True)
    return records, parse_rows(records, *layout)


def _check_last_line(data: bytes, delimiter: str) -> None:
    """Raise `ChunkFault` if the text, which has no line end at its end, may have been cut off in a row."""
    text = data[data.rfind(b"\n") + 1 :]
    if text.strip(blank_bytes(delimiter)):
        shown = text[-_SHOWN_BYTES:].decode("utf-8", errors="ignore")
        problem = (
            f"the last row ends in {shown!r}, without the line end that other rows have: was the file cut off? "
            "Copy or export it again, or set unterminated_last_row to accept if it is complete"
        )
        raise ChunkFault(count_lines(data) + 1, problem)


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
    if records.spans is not None:
        spans = pl.lit(pl.Series(records.spans[faults["row"].to_numpy()]))
        spanning = pl.format("{}; the row takes {} lines", "reason", spans)
        cells = cells.with_columns(reason=pl.when(spans > 1).then(spanning).otherwise("reason"))
    if not records.misfits:
        return cells
    counts = [f"has {m.fields} field{'s' if m.fields != 1 else ''}, the header {fields}" for m in records.misfits]
    takes = [f"; it takes {m.lines:,} lines" if m.lines > 1 else "" for m in records.misfits]
    misfits = pl.DataFrame(
        {
            "line": [m.line for m in records.misfits],
            "column": "",
            "value": [m.text for m in records.misfits],
            "reason": [f"the row {count}{lines}" for count, lines in zip(counts, takes, strict=True)],
            "problem": [f"row {count}" for count in counts],
        },
        schema={**REJECTION_SCHEMA, "problem": pl.String()},
    )
    return pl.concat([cells, misfits]).sort("line", maintain_order=True)


def _problems(rejections: pl.DataFrame) -> list[Problem]:
    first = pl.col("line", "value").first()
    groups = rejections.group_by("column", "problem", maintain_order=True).agg(pl.len().alias("count"), first)
    return [Problem.model_validate(group) for group in groups.iter_rows(named=True)]
