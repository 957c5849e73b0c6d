"""CSV files as a source of Ray Data: a block for each fragment, with typed columns and what is wrong with a row.

A block begins with a row that is none of the file's: its `facts` are those of the fragment. All other rows are records.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import polars as pl
import pyarrow as pa
from pydantic import BaseModel
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from step_scripts.data.cell_parsing import ParsedRows, parse_rows
from step_scripts.data.csv_fragments import Fragment, has_odd_quotes, read_fragment
from step_scripts.data.csv_records import MalformedRow, Records, split_records
from step_scripts.data.csv_text import DamagedText, blank_bytes, count_lines, count_records
from step_scripts.parameters import ValidateSourceParams
from step_scripts.runner.wording import counted
from step_scripts.table.column_types import polars_schema

FACTS, LINE, LINES, FAULTS = "_facts", "_line", "_lines", "_faults"
"""Columns beside the table's: facts (JSON, first row only), line from 1, how many lines the row takes, its faults."""
FAULT = pl.Struct({"column": pl.String(), "value": pl.String(), "reason": pl.String(), "problem": pl.String()})
_SHOWN_BYTES = 60


class FragmentFacts(BaseModel):
    """What was read of a fragment. Lines count from 1 at its start.

    `start`, `end`: the bytes of the file that were read. `counted` records were found by the line ends alone, blank
    lines left out. `malformed_rows` do not have the header's number of fields. `fault`: what is wrong with the fragment
    as a whole, between its first and its last line; there are no rows then. `content`: the sum of its blocks.
    """

    index: int
    odd_quotes: bool = False
    fault: tuple[int, str, int] | None = None
    start: int = 0
    end: int = 0
    lines: int = 0
    counted: int = 0
    malformed_rows: int = 0
    content: int = 0


class CsvFragments(Datasource):
    """Reads fragments of CSV files, each as one block (see `read_rows`)."""

    def __init__(self, fragments: Sequence[Fragment], params: ValidateSourceParams) -> None:
        super().__init__()
        self._fragments, self._params = fragments, params

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
                partial(_blocks, fragment, self._params),
                BlockMetadata(
                    num_rows=None, size_bytes=fragment.end - fragment.start, input_files=None, exec_stats=None
                ),
            )
            for fragment in self._fragments
        ]


def _blocks(fragment: Fragment, params: ValidateSourceParams) -> Iterable[pa.Table]:
    yield read_rows(fragment, params)


def read_rows(fragment: Fragment, params: ValidateSourceParams) -> pa.Table:
    """The records of a fragment: the table's columns, `LINE`, `LINES`, and `FAULTS`, null for a row without any.

    Cells that are wrong are null. What is wrong with the fragment as a whole is in its facts, in the first row.
    """
    try:
        facts, rows = _read(fragment, params)
    except DamagedText as fault:
        facts, rows = FragmentFacts(index=fragment.index, fault=(fault.line, fault.problem, fault.last)), None
    except FileNotFoundError:
        problem = "the file disappeared while it was read. Restore it, then start again"
        facts, rows = FragmentFacts(index=fragment.index, fault=(1, problem, 1)), None
    first = pl.DataFrame({FACTS: [facts.model_dump_json()]}, schema={FACTS: pl.String()})
    schema = {**polars_schema(params.table), LINE: pl.UInt32(), LINES: pl.UInt32(), FAULTS: pl.List(FAULT)}
    rows = pl.DataFrame(schema=schema) if rows is None else rows.select(list(schema))
    return pl.concat([first, rows], how="diagonal").to_arrow(compat_level=pl.CompatLevel.oldest())


def facts_and_rows(block: pa.Table) -> tuple[FragmentFacts, pl.DataFrame]:
    """The two parts of a block that `read_rows` has made."""
    facts = FragmentFacts.model_validate_json(block[FACTS][0].as_py())
    rows = pl.from_arrow(block.slice(1).drop_columns([FACTS]))
    assert isinstance(rows, pl.DataFrame)
    return facts, rows


def _read(fragment: Fragment, params: ValidateSourceParams) -> tuple[FragmentFacts, pl.DataFrame | None]:
    data, start, content = read_fragment(fragment, params.max_line_bytes)
    if has_odd_quotes(data, params.max_line_bytes):
        return FragmentFacts(index=fragment.index, odd_quotes=True), None
    if not data:  # no line begins in the fragment
        return FragmentFacts(index=fragment.index, start=start, end=start, content=content), None
    facts = FragmentFacts(
        index=fragment.index,
        start=start,
        end=start + len(data),
        lines=count_lines(data),
        counted=count_records(data, params.delimiter),
        content=content,
    )
    records, parsed = _parse(data, fragment, params)
    rows = _with_faults(records, parsed, fragment.file.fields)
    return facts.model_copy(update={"malformed_rows": len(records.malformed_rows)}), rows


def _parse(data: bytes, fragment: Fragment, params: ValidateSourceParams) -> tuple[Records, ParsedRows]:
    file, table = fragment.file, params.table
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
    except pl.exceptions.PolarsError:  # as many fields are missing in some records as others have too many
        records = split(terminated, exact=True)
        return records, parse_rows(records, *layout)


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


def _with_faults(records: Records, parsed: ParsedRows, fields: int) -> pl.DataFrame:
    """The parsed rows with lines and faults, and a row without values for each malformed row; in order of line."""
    rows = parsed.frame.with_columns(pl.Series(LINE, records.lines), pl.Series(LINES, records.spans))
    if parsed.faults.is_empty():
        rows = rows.with_columns(pl.lit(None, pl.List(FAULT)).alias(FAULTS))
    else:
        cell = pl.col("value").fill_null("")
        takes = pl.lit(pl.Series(records.spans[parsed.faults["row"].to_numpy()]))
        reason = pl.concat_str(pl.when(cell != "").then(cell + " ").otherwise(pl.lit("")), "problem")
        spanning = pl.format("{}; the row takes {} lines", reason, takes)
        reason = pl.when(takes > 1).then(spanning).otherwise(reason).alias("reason")
        faults = parsed.faults.select("row", pl.struct("column", "value", reason, "problem").alias(FAULTS))
        by_row = faults.group_by("row", maintain_order=True).agg(FAULTS)
        rows = rows.with_row_index("row").join(by_row, on="row", how="left", maintain_order="left").drop("row")
    if not records.malformed_rows:
        return rows
    malformed = pl.DataFrame(
        {
            LINE: [m.line for m in records.malformed_rows],
            LINES: [m.lines for m in records.malformed_rows],
            FAULTS: [[_malformed(m, fields)] for m in records.malformed_rows],
        },
        schema={LINE: pl.UInt32(), LINES: pl.UInt32(), FAULTS: pl.List(FAULT)},
    )
    return pl.concat([rows, malformed], how="diagonal").sort(LINE, maintain_order=True)


def _malformed(row: MalformedRow, fields: int) -> dict[str, str]:
    count = f"has {counted(row.fields, 'field')}, the header {fields}"
    takes = f"; it takes {counted(row.lines, 'line')}" if row.lines > 1 else ""
    return {"column": "", "value": row.text, "reason": f"the row {count}{takes}", "problem": f"row {count}"}
