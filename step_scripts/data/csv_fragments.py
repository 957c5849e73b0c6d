"""Fragments of CSV files, a source of Ray Data. A task reads one, writes what is accepted, and lists what is rejected.

Where a file is cut may be inside of a quoted field. A fragment is read as if it began outside, and tells how many quote
characters it holds; from those of all fragments before it follows whether that was right. Where it was not, the
fragment is read again (`step_scripts.data.source_pass`).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial, reduce
from itertools import pairwise
from typing import Any

import polars as pl
import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from step_scripts.data.csv_header import DIGEST_BLOCK, CsvFile, block_sum
from step_scripts.data.csv_rows import LINE, RowCounts, read_rows
from step_scripts.data.csv_text import (
    QUOTE,
    DamagedText,
    count_byte,
    count_lines,
    count_records,
    record_end,
    with_newlines,
)
from step_scripts.data.row_files import without_duplicates, write_ids, write_parquet
from step_scripts.parameters import ValidateSourceParams
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, FileInfo
from step_scripts.table.column_types import TIMESTAMP
from step_scripts.table.hashes import Hash128, RowSetDigest, distinct_hashes, hashes_of_ids, ids_of_hashes, row_hashes
from step_scripts.table.spec import TableSpec

LISTED_REJECTIONS = 100_000
_READ_BYTES = 1 << 23
_LONGEST_RECORD = 1 << 26  # as far as the end of a record is looked for; bytes, no less than `max_line_bytes` may be


@dataclass(frozen=True)
class Fragment:
    """The records of `file` that follow the line ends in bytes `start` to `end`; `index` counts over all files.

    `quoted`: byte `start` is inside of a quoted field.
    """

    index: int
    file: CsvFile
    start: int
    end: int
    quoted: bool = False


@dataclass
class WrittenRows:
    """The rows of a fragment that were written; how many, tells their digest. `file` is None if there are none.

    `statistics`: smallest value, largest value and number of nulls, by column.
    """

    file: FileInfo | None = None
    digest: RowSetDigest = field(default_factory=RowSetDigest)
    statistics: dict[str, tuple[Any, Any, int]] = field(default_factory=dict)


@dataclass
class FragmentReport:
    """What became of a fragment. Lines count from 1 at its start.

    `start`, `end`: the bytes of the file that were read. `odd_quotes`: the next fragment begins inside of quotes if
    this one begins outside. `content`: the sum of its blocks (`block_sum`). `fault`: what is wrong with the fragment as
    a whole; there are no rows then. `counted` rows were found by line ends alone, those of `counts` by parsing.
    `problems`: of each column and problem, how many cells have it, and the first one's line and value.
    """

    fragment: Fragment
    odd_quotes: bool = False
    fault: DamagedText | None = None
    start: int = 0
    end: int = 0
    lines: int = 0
    content: int = 0
    counted: int = 0
    counts: RowCounts = field(default_factory=RowCounts)
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

    def rejections_uri(self, fragment: int) -> str:
        """Where the rejected cells of a fragment are listed, the first `LISTED_REJECTIONS` of them."""
        return storage.join(self.scratch_uri, f"rejected-{fragment:05d}.parquet")


def plan_fragments(files: Sequence[CsvFile], fragment_bytes: int) -> list[Fragment]:
    """Fragments of equal size for each file, no larger than `fragment_bytes`, in the order of the rows."""
    fragments: list[Fragment] = []
    for file in files:
        size = file.bytes - file.data_start
        count = max(1, -(-size // fragment_bytes))
        cuts = [file.data_start - 1 + size * i // count for i in range(count + 1)]
        fragments += [Fragment(len(fragments) + i, file, a, b) for i, (a, b) in enumerate(pairwise(cuts))]
    return fragments


class CsvFragments(Datasource):
    """A source of Ray Data: a block a fragment, of one row. `text`: its lines; `report`: what reading it has told."""

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        super().__init__()
        self._fragments = fragments

    def estimate_inmemory_data_size(self) -> int | None:
        """See `Datasource`."""
        return sum(fragment.end - fragment.start for fragment in self._fragments)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One a fragment, whatever the parallelism: results must not depend on the number of CPUs."""
        return [
            ReadTask(
                partial(_blocks, fragment),
                BlockMetadata(num_rows=1, size_bytes=fragment.end - fragment.start, input_files=None, exec_stats=None),
            )
            for fragment in self._fragments
        ]


def _blocks(fragment: Fragment) -> Iterable[pa.Table]:
    report, text = FragmentReport(fragment), b""
    try:
        text = _read_text(report)
    except FileNotFoundError:
        report.fault = DamagedText(1, "the file disappeared while it was read. Restore it, then start again")
    yield pa.table({"report": [pickle.dumps(report)], "text": pa.array([text], pa.large_binary())})


def write_rows(block: pa.Table, plan: RowsPlan) -> FragmentReport:
    """Write what is accepted of a fragment, a block of `CsvFragments`, and list what is rejected."""
    report: FragmentReport = pickle.loads(block["report"][0].as_py())  # noqa: S301  # by a task of this session
    if report.fault:
        return report
    fragment, table, text = report.fragment, plan.params.table, block["text"][0].as_py()
    try:
        report.lines, report.counted = count_lines(text), count_records(text, plan.params.delimiter)
        accepted, rejected, report.counts = read_rows(text, report.start, fragment.file, plan.params)
    except DamagedText as fault:
        report.fault = fault
        return report
    if rejected.height:
        rejected = rejected.with_columns(pl.lit(fragment.index, pl.Int32).alias("fragment"))
        with storage.open_output(plan.rejections_uri(fragment.index)) as file:
            rejected.head(LISTED_REJECTIONS).write_parquet(file)
        groups = rejected.group_by("column", "problem", maintain_order=True)
        report.problems = groups.agg(pl.len().alias("count"), pl.col("line", "value", "fragment").first())
    if accepted.height:
        hashes = row_hashes(accepted, table.key_columns or table.column_names)
        modified = pl.lit(round(fragment.file.modified * 1e6), dtype=pl.Int64)
        time = pl.col(table.event_time_column) if table.event_time_column else modified
        frame = accepted.select(ids_of_hashes(hashes), time.cast(TIMESTAMP).alias("event_time"), *table.column_names)
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


def _read_text(report: FragmentReport) -> bytes:
    """The lines of a fragment, each with LF at its end; what ends the last line may be missing.

    If the end of the last record is further away than `_LONGEST_RECORD`, the text ends there.
    """
    file, begin = report.fragment.file, report.fragment.start
    length = report.fragment.end - begin
    with storage.open_input(file.uri) as source:
        source.seek(begin)
        data = source.read(min(length + DIGEST_BLOCK, file.bytes - begin))
        report.odd_quotes = count_byte(memoryview(data)[:length], QUOTE) % 2 == 1
        quoted = report.fragment.quoted ^ report.odd_quotes
        while True:
            complete = begin + len(data) >= file.bytes
            end = record_end(data, length, quoted=quoted, complete=complete)
            if end >= 0 or complete or len(data) > length + _LONGEST_RECORD:
                break
            data += source.read(_READ_BYTES)
    end = end if end >= 0 else len(data)
    start = record_end(data, 0, quoted=report.fragment.quoted, complete=complete)
    start = end if start < 0 else min(start, end)
    report.start, report.end = begin + start, begin + end
    report.content = block_sum(data, begin, begin + 1, report.fragment.end + 1)
    return with_newlines(data[start:end])


def _write(frame: pl.DataFrame, hashes: Hash128, fragment: int, plan: RowsPlan) -> WrittenRows:
    """Write record_id, event_time and the table's columns. `hashes` are those of the record ids."""
    table = plan.params.table
    # The digits of a hash cost LZ4 time and stay as long as they are.
    compression = {name: "none" if name == "record_id" else "lz4" for name in frame.columns}
    # Without keys the id stands for the whole content.
    content = ["event_time", *(table.column_names if table.key_columns else ())]
    columns = {name: frame[name] for name in table.column_names}
    return WrittenRows(
        file=write_parquet(frame, plan.rows_uri, _file_name(fragment), compression),
        digest=RowSetDigest.of(hashes, frame, content),
        statistics={n: (_plain(c.min()), _plain(c.max()), c.null_count()) for n, c in columns.items()},
    )


def _file_name(fragment: int) -> str:
    return f"part-{fragment:05d}.parquet"


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value
