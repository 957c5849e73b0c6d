"""Bodies that are meant to hurt: refused, at no more cost than a valid body of their size is answered."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from housing_assets.schema import HOUSING_TABLE
from step_scripts.serving import feature_parser
from step_scripts.serving.deployment import CSV, JSON, JSON_LINES
from step_scripts.serving.feature_parser import MAX_REPORTED_PROBLEMS, FeatureParser
from step_scripts.serving.request_rows import RequestError
from step_scripts.table.column_types import read_csv
from step_scripts.table.spec import ColumnSpec, TableSpec

BYTES = 6_291_456 // 4
ROW = "1990,2000.5,3,2.5,0.5,2,1,0"
BAD = ROW.replace("1990", "old")
OBJECT = json.dumps(dict(zip(HOUSING_TABLE.features, json.loads(f"[{ROW}]"), strict=True)))
QUOTED = ",".join(f'"{field}"' for field in ROW.split(","))
PARSER = FeatureParser(HOUSING_TABLE)


def lines_of(line: str, first: str = "") -> str:
    return first + line * ((BYTES - len(first)) // len(line))


def list_of(element: str, first: str = "[", last: str = "]") -> str:
    return first + ",".join([element] * (BYTES // (len(element) + 1))) + last


VALID = {CSV: lines_of(ROW + "\n"), JSON: list_of(f"[{ROW}]"), JSON_LINES: lines_of(f"[{ROW}]\n")}
HOSTILE = {
    "lines of one field": (CSV, lines_of("1\n")),
    "lines of one field, CR": (CSV, lines_of("1\r")),
    "commas": (CSV, "," * BYTES),
    "commas and line ends": (CSV, lines_of(",\n")),
    "one line of texts": (CSV, lines_of("ab,")),
    "lines of a quoted text": (CSV, lines_of('"ab"\n')),
    "an open quote": (CSV, lines_of(ROW + "\n", '1,"')),
    "a bad row in two thousand": (CSV, lines_of((ROW + "\n") * 2000 + BAD + "\n")),
    "every other row bad": (CSV, lines_of(f"{ROW}\n{BAD}\n")),
    "a bad row in two thousand, quoted": (CSV, lines_of((QUOTED + "\n") * 2000 + QUOTED.replace("1990", "old") + "\n")),
    "a short row in two thousand, quoted": (CSV, lines_of((QUOTED + "\n") * 2000 + '"1"\n')),
    "a quoted comma in six hundred": (CSV, lines_of((ROW + "\n") * 600 + '"a,b",2\n')),
    "pieces that begin with a long row": (CSV, lines_of(ROW + ",1\n" + (ROW + "\n") * 580)),
    "a short row in two thousand": (CSV, lines_of((ROW + "\n") * 2000 + "1,2\n")),
    "quotes": (CSV, '"' * BYTES),
    "lines of a quote": (CSV, lines_of('"\n')),
    "huge numbers, CSV": (CSV, lines_of(",".join(["1" * 4000] * 8) + "\n")),
    "empty lists": (JSON, list_of("[]")),
    "empty objects": (JSON, list_of("{}")),
    "instances of empty lists": (JSON, list_of("[]", '{"instances":[', "]}")),
    "numbers": (JSON, list_of("0")),
    "one row of numbers": (JSON, list_of("1.5", "[[", "]]")),
    "texts": (JSON, list_of('"ab"')),
    "deep lists": (JSON, "[" * BYTES),
    "deep objects": (JSON, lines_of('{"a":')),
    "many members": (JSON, "{" + ",".join(f'"{n}":1' for n in range(BYTES // 12)) + "}"),
    "a text without end": (JSON, '["' + "a" * BYTES),
    "one number": (JSON, "1" * BYTES),
    "huge numbers": (JSON, list_of("[" + ",".join(["1" * 4000] * 8) + "]")),
    "a bad row in two thousand, JSON": (JSON, list_of(",".join([*[f"[{ROW}]"] * 2000, "[]"]))),
    "lines of objects": (JSON_LINES, lines_of("{}\n")),
    "lines of numbers": (JSON_LINES, lines_of("1\n")),
    "one JSON line": (JSON_LINES, list_of("1")),
}


def refusal(body: str, media: str) -> RequestError:
    with pytest.raises(RequestError) as caught:
        PARSER.parse(body.encode(), media)
    return caught.value


def seconds(work: Callable[[], Any], times: int = 5) -> float:
    """CPU time of this thread, the least of so many times: other processes only ever add to it."""
    found = []
    for _ in range(times):
        begun = time.thread_time()
        work()
        found.append(time.thread_time() - begun)
    return min(found)


def peak_bytes(work: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def valid_seconds() -> dict[str, float]:
    return {media: seconds(lambda: PARSER.parse(body.encode(), media)) for media, body in VALID.items()}  # noqa: B023


@pytest.mark.parametrize("name", HOSTILE)
def test_a_refused_body_costs_no_more_than_a_valid_one(name: str, valid_seconds: dict[str, float]) -> None:
    media, body = HOSTILE[name]
    error = refusal(body, media)
    assert error.status == 400
    assert len(error.rows) <= MAX_REPORTED_PROBLEMS
    # A valid body of CSV takes about 20 ms, most of these less, none twice as much but for the noise of the clock; a
    # piece of short rows that is read to its end before it is asked for problems takes 100 ms.
    assert seconds(lambda: refusal(body, media)) < 3 * valid_seconds[media] + 0.02
    assert peak_bytes(lambda: refusal(body, media)) < 8 * BYTES + (8 << 20)


def test_rows_that_were_not_looked_at_are_counted_about() -> None:
    error = refusal(lines_of("1\n"), CSV)
    assert f" of about {BYTES // 2:,} rows cannot be used; first: row 1: 1 field," in str(error)
    assert str(error).startswith("at least ")
    assert len(error.rows) == MAX_REPORTED_PROBLEMS < error.problems


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        ('1990,2000,3,2,0.5,2,1,"', "the body is not CSV: line 151: unexpected end of data"),
        ('"1990,2000,3,2,0.5,2,1,1', "the body is not CSV: line 151: unexpected end of data"),
        (ROW[:-1] + '"0"1', "the body is not CSV: line 151: ',' expected after '\"'"),
        (f'"{ROW}\n{ROW},"1', "the body is not CSV: the record of lines 151 to 152: ',' expected after '\"'"),
    ],
)
@pytest.mark.parametrize("rows", [10, 200, 100_000])
def test_a_stray_quote_is_named_with_its_line(damaged: str, reason: str, rows: int) -> None:
    """Polars panics on a last field that is one quote; without the bound of a row, the quote goes on to the end."""
    before = [ROW] * 150
    text = "\n".join([*before, damaged, *([ROW] * rows if rows > 200 else [])])
    if rows > 200 and "end of data" in reason:
        reason = "line 151 begins a row of more than 65536 characters; is a quote or a line end missing?"
    assert reason in str(refusal(text, CSV))


def test_a_stray_quote_behind_many_lines_is_named_with_its_line() -> None:
    assert "the body is not CSV: line 20001: ',' expected" in str(
        refusal((ROW + "\n") * 20_000 + ROW[:-1] + '"0"1', CSV)
    )


def test_polars_panic_is_an_exception() -> None:
    import polars as pl

    text = "1,2\n" * 2000 + '1,"'
    with pytest.raises(BaseException, match="slice index") as raw:
        pl.read_csv(text.encode(), has_header=False, schema={"a": pl.Float64, "b": pl.Float64})
    assert not isinstance(raw.value, Exception)  # once it is one, the wrapper can go
    with pytest.raises(pl.exceptions.ComputeError, match="Polars cannot read it"):
        read_csv(text.encode(), has_header=False, schema={"a": pl.Float64, "b": pl.Float64})


@pytest.mark.parametrize("rows", [3, 400])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_any_kind_are_those_of_the_header_too(rows: int, end: str) -> None:
    header = ",".join(HOUSING_TABLE.features)
    for header_end in ("\n", "\r\n", "\r"):
        body = f"{header}{header_end}" + (ROW + end) * rows
        assert len(PARSER.parse(body.encode(), CSV)) == rows


@pytest.mark.parametrize("rows", [3, 400])
def test_an_empty_surplus_field_is_refused_also_in_an_unterminated_last_line(rows: int) -> None:
    assert f"row {rows + 1}: 9 fields, expected 8" in str(refusal((ROW + "\n") * rows + ROW + ",", CSV))


@pytest.mark.parametrize("rows", [3, 400])
def test_stray_quotes_that_make_lines_one_field_are_named_with_their_lines(rows: int) -> None:
    lines = [ROW] * rows
    lines[1] = ROW.replace(",2000.5", ',"2000.5')
    lines[rows - 1] = ROW.replace(",2000.5", ',2000.5"')
    assert f"the record of lines 2 to {rows} has a line end within quotes" in str(refusal("\n".join(lines), CSV))


def test_a_carriage_return_in_a_row_ends_it() -> None:
    assert "row 1: 1 field, expected 8" in str(refusal(ROW.replace(",", "\r,", 1), CSV))


LINE = st.sampled_from(
    [ROW, BAD, ROW.replace("1990", " 1990"), ROW.replace("1990", '"1990"'), ROW + ",", ROW[:-2], "", ROW + "\r", "1"]
)


@given(st.lists(st.tuples(LINE, st.integers(1, 400)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_csv_in_pieces_is_read_as_line_by_line(runs: list[tuple[str, int]]) -> None:
    """Until a hundred problems are found, all values and problems are those of each line by itself."""
    lines = [line for line, times in runs for _ in range(times)]
    while lines and not lines[-1].strip():
        lines.pop()  # line ends at the end of a body are no rows
    while lines and not lines[0].strip():
        lines.pop(0)  # before one row by itself they are passed over
    singly: dict[str, Any] = {}
    for line in {*lines}:
        try:
            singly[line] = PARSER.parse(f"{ROW}\n{line}\n{ROW}".encode(), CSV)[1].tolist()
        except RequestError as error:
            singly[line] = [(row["column"], row["reason"]) for row in error.rows]
    outcomes = [singly[line] for line in lines]
    wrong = [(n, *p) for n, found in enumerate(outcomes, 1) for p in found if isinstance(p, tuple)]
    body = "\n".join(lines)
    if not body.strip():
        assert str(refusal(body, CSV)) == "the body is empty"
    elif wrong:
        error = refusal(body, CSV)
        assert [(r["row"], r["column"], r["reason"]) for r in error.rows] == wrong[:MAX_REPORTED_PROBLEMS]
        assert error.problems == len(wrong) or MAX_REPORTED_PROBLEMS <= error.problems < len(wrong)
    else:
        assert PARSER.parse(body.encode(), CSV).tolist() == outcomes


SALES = TableSpec(
    name="sales",
    target="price",
    key_columns=("place", "note"),
    columns=(
        *(ColumnSpec(name=name, dtype="float64", nullable=name == "age") for name in ("price", "size", "age")),
        *(ColumnSpec(name=name, dtype="string", nullable=True) for name in ("place", "note")),
    ),
)
SALE = st.sampled_from(
    ["x,3,1,y", "x,,1,y", '"x","","1",""', "x,old,1,y", "x,nan,1,y", ",,1,", '"x,y",3,1', '"x,,z",1,y', "x,3,1"]
) | st.sampled_from(
    ["", '"x,y",,1', "x,3,1,,", '"",3,1,""', '"x\ny",3,1,y', 'x,3,1,"y', 'x,3,"1"0,y', "x,3,,", 'x"y,3,1,"z"']
)


@pytest.mark.parametrize("header", ["place,age,size,note", "age,place,note,size"])
@given(lines=st.lists(SALE, min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_many_rows_are_read_as_few(header: str, lines: list[str]) -> None:
    """With texts and missing values: whether Polars reads the rows or Python does, and where the columns lie."""
    if header.startswith("age"):
        lines = [",".join([*(parts := line.split(","))[1:2], parts[0], *parts[3:], *parts[2:3]]) for line in lines]
    body = "\n".join([header, *lines, *[",".join("7" * 4)] * 9]).encode()

    def outcome(batch: int) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feature_parser, "_BATCH", batch)
            try:
                return np.nan_to_num(FeatureParser(SALES).parse(body, CSV), nan=-1).tolist()
            except RequestError as error:
                return str(error), error.problems, error.rows

    assert outcome(1) == outcome(len(body) + 1)


ELEMENTS = st.sampled_from([f"[{ROW}]", f" [ {ROW} ] ", "[]", '{"DECK": 1}', "5", f"[{BAD}]", '"],["', "[1,"])


@given(
    st.lists(st.tuples(ELEMENTS, st.integers(1, 900)), min_size=1, max_size=6), st.booleans(), st.sampled_from("]} ")
)
@settings(max_examples=60, deadline=None)
def test_json_in_pieces_is_accepted_exactly_where_it_is_json_of_valid_rows(
    runs: list[tuple[str, int]], instances: bool, last: str
) -> None:
    elements = [element for element, times in runs for _ in range(times)]
    body = '{"instances": [' * instances + "[" * (not instances) + ",".join(elements) + "]" * instances + last
    row, value = json.loads(f"[{ROW}]"), []
    try:
        value = json.loads(body)
        value = value["instances"] if instances else value
        valid = value == [row] * len(value)
    except ValueError:
        valid = False
    if valid:
        assert np.array_equal(PARSER.parse(body.encode(), JSON), np.array(value))
    else:
        assert refusal(body, JSON).status == 400


@pytest.mark.parametrize("between", [",", ", ", ",\n", " ,\t", "\n,\n"])
@pytest.mark.parametrize(
    "row", [f"[{ROW}]", json.dumps(dict(zip(HOUSING_TABLE.features, map(float, ROW.split(",")), strict=True)))]
)
def test_large_json_bodies_may_have_white_space_anywhere(row: str, between: str) -> None:
    rows = 3000
    for body in (f"[{between.join([row] * rows)}]", f'{{"instances": [\n{between.join([row] * rows)} ] }}\n'):
        assert len(body) > 1 << 16
        assert len(PARSER.parse(body.encode(), JSON)) == rows


def test_a_text_that_looks_like_the_end_of_a_row_is_a_text() -> None:
    row = '{"size": 1, "age": null, "place": "a],[b},{", "note": "\\"}, {"}'
    body = f"[{','.join([row] * 3000)}]"
    assert FeatureParser(SALES).parse(body.encode(), JSON).shape == (3000, 2)


MUTATION = st.tuples(st.floats(0, 1), st.integers(0, 9), st.sampled_from([*'",[]{}\n\r\\ 9e', '""', "\0", "\xff", ""]))


@given(
    st.sampled_from([(CSV, ROW + "\n"), (CSV, QUOTED + "\n"), (JSON, f"[{ROW}],"), (JSON_LINES, f"[{ROW}]\n")]),
    st.sampled_from([1, 3, 200]),
    st.lists(MUTATION, max_size=6),
)
@settings(max_examples=150, deadline=None)
def test_damaged_bodies_are_read_or_refused(
    kind: tuple[str, str], rows: int, mutations: list[tuple[float, int, str]]
) -> None:
    media, row = kind
    body = (row * rows if media != JSON else f"[{(row * rows)[:-1]}]").encode()
    for place, removed, added in mutations:
        at = int(place * len(body))
        body = body[:at] + added.encode("latin-1") + body[at + removed :]
    try:
        status = 200 if PARSER.parse(body, media).shape[1] == len(HOUSING_TABLE.features) else 0
    except RequestError as error:
        status = error.status
        json.dumps(error.body())
    assert status in (200, 400)
