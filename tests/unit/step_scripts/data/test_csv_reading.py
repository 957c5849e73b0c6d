"""No row of a CSV file is lost or made up, however its lines end, whatever is quoted, wherever it is cut.

The step's own code runs, its tasks one after the other in this process, with blocks of a few bytes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.data import Datasource

from step_scripts import validate_source
from step_scripts.data import csv_fragments, csv_header, csv_text, source_pass
from step_scripts.data.csv_text import count_lines, count_records, line_ends, with_newlines
from step_scripts.parameters import ValidateSourceParams
from step_scripts.runner.contract import StepContext, StepError, StepOutcome, StepRequest
from step_scripts.table.spec import ColumnSpec, TableSpec
from tests.source_steps import CollectingReporter, write_source

NUMBERS = TableSpec(
    name="numbers",
    columns=(ColumnSpec(name="A", dtype="int64"), ColumnSpec(name="B", dtype="float64")),
    target="B",
)
TEXTS = NUMBERS.model_copy(
    update={"columns": (*NUMBERS.columns, ColumnSpec(name="T", dtype="string")), "key_columns": ("T",)}
)


@pytest.fixture(scope="module", autouse=True)
def in_this_process_by_a_few_bytes() -> Iterator[None]:
    """No Ray, and blocks so small that everything that can be cut is cut."""

    def one_after_the_other(function: Callable[..., Any], calls: Any) -> Iterator[tuple[int, Any]]:
        yield from ((index, function(*call)) for index, call in enumerate(calls))

    def block_after_block(source: Datasource, count: int, function: Callable[..., Any], *args: Any) -> Iterator[Any]:
        tasks = source.get_read_tasks(1)
        assert len(tasks) == count
        yield from (function(block, *args) for task in tasks for block in task())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validate_source, "each_call", one_after_the_other)
        patch.setattr(source_pass, "source_reports", block_after_block)
        patch.setattr(source_pass.ray, "cluster_resources", lambda: {"CPU": 2})
        patch.setattr(csv_header, "_FIRST_READ", 4)
        patch.setattr(csv_fragments, "DIGEST_BLOCK", 2)
        patch.setattr(csv_fragments, "_READ_BYTES", 3)
        yield


@dataclass(frozen=True)
class Outcome:
    """What people see of a run."""

    rows: list[tuple[Any, ...]]
    rejected: list[tuple[int, str, str]]
    metrics: dict[str, float]
    problem: str = ""


def run(text: str, table: TableSpec, *, chunk_bytes: int, **given: Any) -> Outcome:
    folder = Path(tempfile.mkdtemp(prefix="csv-reading-"))
    try:
        source = write_source(folder, text.encode())
        params = ValidateSourceParams(
            table=table, files=(source,), duplicate_rows="keep", max_rejected_fraction=1
        ).model_copy(update={"chunk_bytes": chunk_bytes, **given})
        request = StepRequest(step="validate_source", params={}, output_root=str(folder), code_version="test")
        context = StepContext(request, str(folder / "attempt"), CollectingReporter())
        try:
            return _outcome(validate_source.run(context, params), table)
        except StepError as error:
            return Outcome([], [], {}, str(error).replace(source.uri, "FILE").replace(str(folder), "FOLDER"))
    finally:
        shutil.rmtree(folder)


def _outcome(outcome: StepOutcome, table: TableSpec) -> Outcome:
    frames = [pl.read_parquet(uri) for uri in outcome.outputs["rows"].file_uris(".parquet")]
    rejected = outcome.details["rejected_rows"]
    assert len(rejected) < 50, "not all of them are listed"
    listed = [(r["line"], r["column"], r["reason"]) for r in rejected]
    return Outcome(pl.concat(frames).select(table.column_names).rows(), listed, outcome.metrics)


WHOLE = {"1": 1, " 2 ": 2, "3.0": 3, '"4"': 4, '" 5"': 5, "x": None, "": None, '""': None}
REAL = {"0.5": 0.5, "-1": -1.0, '"2.5"': 2.5, "1e3": 1000.0, "1;5": None, '"a,b"': None, "": None}
TEXT = {
    t: t[1:-1].replace('""', '"') if t.startswith('"') else t
    for t in ("a", " b c", '"q"', '"1\n2"', '"1\r2"', '"\r\nx\r\n"', '"say ""x"""', '","', '"1,2\n3,4\r5"', '"\n"""')
}  # fmt: skip
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


@st.composite
def files(draw: st.DrawFn, table: TableSpec, note: bool) -> tuple[str, list[tuple[int, int, Any]]]:
    """A file, and of each record its line, how many lines it takes, and its values; None if it is to be rejected."""
    lines, records = 1, []
    one_end = draw(st.none() | ENDS)
    names = [*table.column_names, *(["NOTE"] if note else [])]

    def end(content: str, text: str) -> str:
        chosen = one_end or draw(ENDS)
        return "\r" if chosen == "\n" and content == "" and text.endswith("\r") else chosen  # it would join that CR

    text = ",".join(draw(st.permutations(names)) if not note else names)
    order = text.split(",")
    text += end(text, "")
    for _ in range(draw(st.integers(1, 8))):
        if draw(st.booleans()) and draw(st.booleans()):
            blank = draw(st.sampled_from(["", "  ", "\t"]))
            text, lines = text + blank + end(blank, text), lines + 1
        kinds = {"A": WHOLE, "B": REAL, "T": TEXT, "NOTE": TEXT | {"": ""}}
        cells = {name: draw(st.sampled_from(sorted(kinds[name]))) for name in order}
        values = tuple(kinds[name][cells[name]] for name in table.column_names)
        fields = [cells[name] for name in order]
        malformed = draw(st.sampled_from([0, 0, 0, -1, 1, 2]))
        fields = fields[:malformed] if malformed < 0 else [*fields, *["7"] * malformed]
        record = ",".join(fields)
        if malformed or None in values:
            values = None
        taken = record.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1
        if record == "":  # the only field of a row too short
            values, taken = (), 1
        records += [(lines + 1, taken, values)] if values != () else []
        text, lines = text + record + end(record, text), lines + taken
    if draw(st.booleans()) and records and records[-1][0] + records[-1][1] - 1 == lines:
        text = text.rstrip("\r\n") if not text.rstrip("\r\n").endswith('"') or text[-2:] == "\r\n" else text[:-1]
    return text, records


def _no_rows(outcome: Outcome, records: list[tuple[int, int, Any]]) -> bool:
    return not any(values is not None for *_, values in records) and outcome.problem != ""


@settings(max_examples=40, deadline=None)
@given(data=st.data(), table=st.sampled_from([NUMBERS, TEXTS]), note=st.booleans(), chunk_bytes=st.integers(1, 40))
def test_every_record_is_accepted_or_rejected(
    data: st.DataObject, table: TableSpec, note: bool, chunk_bytes: int
) -> None:
    text, records = data.draw(files(table, note))
    outcome = run(text, table, chunk_bytes=chunk_bytes, unterminated_last_row="accept")
    assert outcome == run(text, table, chunk_bytes=1 << 20, unterminated_last_row="accept")
    if _no_rows(outcome, records):
        return
    assert outcome.problem == ""
    assert outcome.rows == [values for *_, values in records if values is not None]
    assert {line for line, *_ in outcome.rejected} == {line for line, _, values in records if values is None}
    assert outcome.metrics["rows"] + outcome.metrics["rejected_rows"] == len(records)
    spans = {line: taken for line, taken, values in records if values is None}
    assert all(("takes" in reason) == (spans[line] > 1) for line, _, reason in outcome.rejected)
    lines = sum(spans.values()) / sum(taken for _, taken, _ in records)
    assert outcome.metrics["rejected_fraction"] == max(len(spans) / len(records), lines)
    if not text.endswith(("\n", "\r")):
        refused = run(text, table, chunk_bytes=chunk_bytes)
        last, taken, _ = records[-1]
        assert f"line {last + taken - 1}: the last row ends in" in refused.problem


def records_by_reading(text: str) -> int:
    """Records of a text: line ends outside of quotes, blank lines not counted. Character by character."""
    quoted, record, found = False, "", 0
    for character in text.replace("\r\n", "\n") + "\n":
        quoted ^= character == '"'
        if character in "\r\n" and not quoted:
            found += any(ord(c) > 32 or c == "," for c in record)
            record = ""
        else:
            record += character
    return found


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='a1 \t,"\r\n', max_size=60))
def test_records_and_lines_are_counted(text: str) -> None:
    even = text.count('"') % 2 == 0
    data = with_newlines(text.encode())
    assert len(data) == len(text)
    if even:
        # CR LF within quotes is two characters of the text that a record holds, and none outside.
        assert count_records(data, ",") == records_by_reading(text)
        assert count_lines(data) == len(text.replace("\r\n", "\n").replace("\r", "\n").split("\n")) - 1
    for position in range(len(text)):
        ends = line_ends(csv_text.np.frombuffer(text.encode(), csv_text.np.uint8)) + 1
        expected = next((int(end) for end in ends if end > position), -1)
        assert csv_text.line_end(text.encode(), position, complete=True) == expected


@pytest.mark.parametrize("chunk_bytes", [1, 5, 1000])
def test_a_quote_out_of_place_in_a_line_that_is_too_long_is_the_fault_wherever_it_is_cut(chunk_bytes: int) -> None:
    text = 'A,B,T,NOTE\n,"2.5","say """x""",\n,, b c, b c\n,, b c,"\n"""\r\n'
    outcome = run(text, NUMBERS, chunk_bytes=chunk_bytes, unterminated_last_row="accept", max_line_bytes=12)
    assert outcome.problem.startswith("FILE, line 2: a quoted field is not closed before the next delimiter")


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    table=st.sampled_from([NUMBERS, TEXTS]),
    chunk_bytes=st.integers(1, 40),
    longest=st.sampled_from([12, 30, 1000]),
    strays=st.lists(st.floats(0, 1), min_size=1, max_size=3),
)
def test_stray_quotes_swallow_nothing(
    data: st.DataObject, table: TableSpec, chunk_bytes: int, longest: int, strays: list[float]
) -> None:
    """Refused with its lines, whatever the cuts; or else everything is accounted for and no number spans lines."""
    text, _ = data.draw(files(table, note=table is TEXTS))
    begin = len(text.splitlines(keepends=True)[0])
    for place in sorted(strays, reverse=True):
        position = begin + round(place * (len(text) - begin))
        text = text[:position] + '"' + text[position:]
    given = {"unterminated_last_row": "accept", "max_line_bytes": longest}
    outcome = run(text, table, chunk_bytes=chunk_bytes, **given)
    assert outcome == run(text, table, chunk_bytes=1 << 20, **given)
    if outcome.problem:
        assert outcome.problem.startswith("FILE") or " rejected (" in outcome.problem
        return
    assert outcome.metrics["rows"] + outcome.metrics["rejected_rows"] == records_by_reading(text[begin:])
    if table is NUMBERS:
        lines = [line for line in text[begin:].replace("\r", "\n").split("\n") if line.strip()]
        assert outcome.metrics["rows"] + outcome.metrics["rejected_rows"] == len(lines)
