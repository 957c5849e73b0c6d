"""Cuts CSV files into fragments, and reads each on its own: its rows, typed, and what is wrong with them.

Where a file is cut may be inside of a quoted field. A fragment is read as if it began outside, and tells how many quote
characters it holds; from those of all fragments before it follows whether that was right. Where it was not, the
fragment is read again (`step_scripts.data.source_pass`).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import polars as pl
import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from step_scripts.data.cell_parsing import parse_rows
from step_scripts.data.csv_header import DIGEST_BLOCK, CsvFile, block_sum, encoding_fault, nul_fault
from step_scripts.data.csv_text import (
    QUOTE,
    DamagedText,
    Records,
    blank_bytes,
    count_byte,
    count_lines,
    count_records,
    record_end,
    split_records,
    with_newlines,
)
from step_scripts.parameters import ValidateSourceParams
from step_scripts.runner import storage
from step_scripts.runner.wording import counted

_READ_BYTES = 1 << 23
_LONGEST_RECORD = 1 << 26  # as far as the end of a record is looked for; bytes, no less than `max_line_bytes` may be
_SHOWN_BYTES = 60
LINE = "_line"
REJECTIONS = {
    "line": pl.Int64(),
    "column": pl.String(),
    "value": pl.String(),
    "reason": pl.String(),
    "problem": pl.String(),
}
"""Columns of a table of rejected cells. `problem` is the reason without what belongs to one row only."""


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
class FragmentFacts:
    """What was read of a fragment. Lines count from 1 at its start.

    `start`, `end`: the bytes of the file that were read. `odd_quotes`: the next fragment begins inside of quotes if
    this one begins outside. `content`: the sum of its blocks (`block_sum`). `fault`: what is wrong with the fragment as
    a whole; there are no rows then. `counted` rows were found by line ends alone, `records` were parsed or are
    `malformed_rows`, without the header's number of fields. `record_lines` and `rejected_lines` are the lines that all
    and the rejected rows take.
    """

    fragment: Fragment
    odd_quotes: bool = False
    fault: DamagedText | None = None
    start: int = 0
    end: int = 0
    lines: int = 0
    content: int = 0
    counted: int = 0
    records: int = 0
    malformed_rows: int = 0
    rejected_rows: int = 0
    record_lines: int = 0
    rejected_lines: int = 0


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
    """Fragments of CSV files as a source of Ray Data. Each is a block of one row: its text, and what is known of it."""

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        super().__init__()
        self._fragments = fragments

    def get_name(self) -> str:
        """See `Datasource`; shown in statistics."""
        return "Csv"

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
    facts, text = FragmentFacts(fragment), b""
    try:
        text = _read_text(facts)
    except FileNotFoundError:
        facts.fault = DamagedText(1, "the file disappeared while it was read. Restore it, then start again")
    yield pa.table({"facts": [pickle.dumps(facts)], "text": pa.array([text], pa.large_binary())})


def facts_and_text(block: pa.Table) -> tuple[FragmentFacts, bytes]:
    """What a block of `CsvFragments` holds."""
    return pickle.loads(block["facts"][0].as_py()), block["text"][0].as_py()  # noqa: S301  # by a task of this session


def read_rows(facts: FragmentFacts, data: bytes, params: ValidateSourceParams) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The accepted rows of a fragment, with the table's columns and `LINE`, and the rejected cells (`REJECTIONS`).

    Completes the facts. Raises `DamagedText` for a fault that makes other lines doubtful, too.
    """
    facts.lines, facts.counted = count_lines(data), count_records(data, params.delimiter)
    _check_text(data, facts.start)
    records, frame, faults = _parse(data, facts.fragment.file, params)
    malformed_lines = sum(row.lines for row in records.malformed_rows)
    wrong = faults["row"].unique()
    rows = frame.with_columns(pl.Series(LINE, records.lines))
    accepted = rows.filter(~pl.int_range(pl.len(), dtype=pl.UInt32).is_in(wrong.implode())) if len(wrong) else rows
    facts.malformed_rows = len(records.malformed_rows)
    facts.records = rows.height + facts.malformed_rows
    facts.rejected_rows = len(wrong) + facts.malformed_rows
    facts.record_lines = int(records.spans.sum()) + malformed_lines
    facts.rejected_lines = int(records.spans[wrong.to_numpy()].sum()) + malformed_lines
    return accepted, _rejected(records, faults, facts.fragment.file.fields)


def _read_text(facts: FragmentFacts) -> bytes:
    """The lines of a fragment, each with LF at its end; what ends the last line may be missing.

    If the end of the last record is further away than `_LONGEST_RECORD`, the text ends there.
    """
    file, begin = facts.fragment.file, facts.fragment.start
    length = facts.fragment.end - begin
    with storage.open_input(file.uri) as source:
        source.seek(begin)
        data = source.read(min(length + DIGEST_BLOCK, file.bytes - begin))
        facts.odd_quotes = count_byte(memoryview(data)[:length], QUOTE) % 2 == 1
        quoted = facts.fragment.quoted ^ facts.odd_quotes
        while True:
            complete = begin + len(data) >= file.bytes
            end = record_end(data, length, quoted=quoted, complete=complete)
            if end >= 0 or complete or len(data) > length + _LONGEST_RECORD:
                break
            data += source.read(_READ_BYTES)
    end = end if end >= 0 else len(data)
    start = record_end(data, 0, quoted=facts.fragment.quoted, complete=complete)
    start = end if start < 0 else min(start, end)
    facts.start, facts.end = begin + start, begin + end
    facts.content = block_sum(data, begin, begin + 1, facts.fragment.end + 1)
    return with_newlines(data[start:end])


def _check_text(data: bytes, offset: int) -> None:
    if (position := data.find(b"\0")) >= 0:
        raise DamagedText(count_lines(data[:position]) + 1, nul_fault(offset + position))
    if not data.isascii():
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = count_lines(data[: error.start]) + 1
            raise DamagedText(line, encoding_fault(data, error.start, offset)) from error


def _parse(data: bytes, file: CsvFile, params: ValidateSourceParams) -> tuple[Records, pl.DataFrame, pl.DataFrame]:
    columns = zip(params.table.columns, file.positions, strict=True)
    split = partial(
        split_records,
        delimiter=params.delimiter,
        fields=file.fields,
        max_line_bytes=params.max_line_bytes,
        single_line={position: column.name for column, position in columns if column.dtype != "string"},
    )
    terminated = data if data[-1:] in (b"\n", b"") else data + b"\n"  # Polars is lax on a last line without
    records = split(terminated)
    if terminated is not data and params.unterminated_last_row == "refuse":
        _check_last_line(data, params.delimiter)
    try:
        return records, *parse_rows(records, file, params)
    except pl.exceptions.PolarsError:  # as many fields are missing in some records as others have too many
        records = split(terminated, exact=True)
        return records, *parse_rows(records, file, params)


def _check_last_line(data: bytes, delimiter: str) -> None:
    """Raise `DamagedText` if the text, which has no line end at its end, may have been cut off in a row."""
    text = data[data.rfind(b"\n") + 1 :]
    if text.strip(blank_bytes(delimiter)):
        shown = text[-_SHOWN_BYTES:].decode("utf-8", errors="ignore")
        problem = (
            f"the last row ends in {shown!r}, without the line end that other rows have: was the file cut off? "
            "Copy or export it again, or set unterminated_last_row to accept if it is complete"
        )
        raise DamagedText(count_lines(data) + 1, problem)


def _rejected(records: Records, faults: pl.DataFrame, fields: int) -> pl.DataFrame:
    """The faults of cells and the malformed rows, in order of line."""
    rows = faults["row"].to_numpy()
    takes = pl.lit(pl.Series(records.spans[rows]))
    reason = pl.concat_str(pl.when(pl.col("value") != "").then(pl.col("value") + " ").otherwise(pl.lit("")), "problem")
    reason = pl.when(takes > 1).then(pl.format("{}; the row takes {} lines", reason, takes)).otherwise(reason)
    line = pl.Series("line", records.lines[rows], pl.Int64)
    cells = faults.select(line, "column", "value", reason.alias("reason"), "problem")
    malformed = []
    for row in records.malformed_rows:
        problem = f"row has {counted(row.fields, 'field')}, the header {fields}"
        spanning = f"; it takes {counted(row.lines, 'line')}" if row.lines > 1 else ""
        malformed.append((row.line, "", row.text, f"the {problem}{spanning}", problem))
    rejected = pl.concat([cells, pl.DataFrame(malformed, schema=REJECTIONS, orient="row")])
    return rejected.sort("line", maintain_order=True)
