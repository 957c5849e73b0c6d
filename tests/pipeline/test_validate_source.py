"""Step `validate_source` on files that are good, or good enough."""

from __future__ import annotations

import io
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from housing_assets.sample_data import write_sample
from housing_assets.schema import HOUSING_TABLE
from resources.sources.listing import list_source
from step_scripts.data.csv_header import block_sum, content_digest
from step_scripts.runner.contract import FileInfo, StepError, file_info
from step_scripts.runner.ray_session import RaySession
from step_scripts.table.column_types import polars_schema
from step_scripts.table.spec import ColumnRange, ColumnSpec, TableSpec
from tests.feature_rows import record_ids
from tests.source_steps import (
    HEADER,
    MODIFIED,
    CollectingReporter,
    rejected_of,
    rows_of,
    sale,
    sales,
    source_file,
    table_text,
    validate,
    write_source,
)

REAL_FILE = Path("../shared/data/house_pricing.csv")
COLUMNS = list(HOUSING_TABLE.column_names)
KEYED = TableSpec(
    name="visits",
    columns=(
        ColumnSpec(name="ID", dtype="string"),
        ColumnSpec(name="AT", dtype="datetime"),
        ColumnSpec(name="OK", dtype="bool", nullable=True),
        ColumnSpec(name="X", dtype="float64", nullable=True),
        ColumnSpec(name="N", dtype="int64", ge=0),
    ),
    target="X",
    key_columns=("ID",),
    event_time_column="AT",
)


def _expected(rows: list[str]) -> pl.DataFrame:
    """The rows as polars reads them."""
    text = table_text(rows)
    return pl.read_csv(io.BytesIO(text.encode()), schema=polars_schema(HOUSING_TABLE))


def _reversed_columns(text: str) -> str:
    return "".join(",".join(reversed(line.split(","))) + "\n" for line in text.splitlines())


GOOD = table_text(sales(30))
QUOTED = "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in GOOD.splitlines()) + "\n"
ODD_BUT_GOOD: dict[str, str | bytes] = {
    "plain": GOOD,
    "CRLF": GOOD.replace("\n", "\r\n"),
    "byte order mark": b"\xef\xbb\xbf" + GOOD.encode(),
    "CR (Macintosh)": GOOD.replace("\n", "\r"),
    "header ends with CR": GOOD.replace("\n", "\r", 1),
    "header ends with LF, rows with CR": GOOD.replace("\n", "\r").replace("\r", "\n", 1),
    "CR, then LF, then CRLF": GOOD.replace("\n", "\r", 10).replace("\n", "\r\n").replace("\r\n", "\n", 10),
    "CR CR LF": GOOD.replace("\n", "\r\r\n"),
    "cut off between CR and LF": GOOD.replace("\n", "\r\n")[:-1],
    "blank lines": "\n \n" + GOOD.replace("\n", "\n\n  \n") + "\n\n",
    "header in another order": _reversed_columns(GOOD),
    "header in another case": GOOD.replace(HEADER, HEADER.lower()),
    "blanks around names": GOOD.replace(HEADER, " " + HEADER.replace(",", " , ") + " "),
    "quoted cells": QUOTED,
    "quoted cells, CRLF": QUOTED.replace("\n", "\r\n"),
    "extra columns": "".join(f"{n},{line},note {n}\n" for n, line in enumerate(GOOD.splitlines())),
    "whole numbers with a point": table_text(
        [f"{a}.0,{b}.0,{c}" for a, b, c in (row.split(",", 2) for row in sales(30))]
    ),
    "blanks around numbers": table_text([f" {row} ".replace(",", " , ") for row in sales(30)]),
    "plus signs and exponents": table_text(["+" + row.replace(",0.5,", ",5e-1,") for row in sales(30)]),
}


@pytest.mark.parametrize("form", ODD_BUT_GOOD)
def test_good_file_in_an_odd_form(form: str, ray_session: RaySession, tmp_path: Path) -> None:
    result = validate(ray_session, tmp_path, [write_source(tmp_path, ODD_BUT_GOOD[form])])
    rows = rows_of(result)
    assert rows.select(COLUMNS).equals(_expected(sales(30)))
    assert rejected_of(result) == []
    assert result.metrics["rows"] == 30
    assert result.metrics["extra_columns"] == (2 if form == "extra columns" else 0)


def test_a_last_row_without_a_line_end_is_accepted_if_configured(ray_session: RaySession, tmp_path: Path) -> None:
    for end in ("\n", "\r\n"):
        source = write_source(tmp_path, GOOD.replace("\n", end).rstrip())
        result = validate(ray_session, tmp_path, [source], unterminated_last_row="accept")
        assert rows_of(result).select(COLUMNS).equals(_expected(sales(30)))


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_configured_delimiter(delimiter: str, ray_session: RaySession, tmp_path: Path) -> None:
    source = write_source(tmp_path, GOOD.replace(",", delimiter))
    result = validate(ray_session, tmp_path, [source], delimiter=delimiter)
    assert rows_of(result).select(COLUMNS).equals(_expected(sales(30)))


def test_output_format(ray_session: RaySession, tmp_path: Path) -> None:
    source = write_source(tmp_path, GOOD)
    result = validate(ray_session, tmp_path, [source])
    rows, artifact = rows_of(result), result.outputs["rows"]
    assert rows.schema == {
        "record_id": pl.String,
        "event_time": pl.Datetime("us", "UTC"),
        **polars_schema(HOUSING_TABLE),
    }
    assert rows["record_id"].equals(record_ids(_expected(sales(30)), COLUMNS))
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=MODIFIED)
    assert rows["event_time"].unique().to_list() == [moment]
    assert [f.path for f in artifact.files] == ["part-00000.parquet"]
    assert artifact.files[0] == file_info(artifact.file_uris()[0], artifact.uri, rows=30)
    assert isinstance(artifact.files[0], FileInfo)
    assert not list(tmp_path.rglob("scratch"))
    assert result.details["statistics"]["PRICE"] == {"minimum": 200_000.0, "maximum": 200_029.0, "nulls": 0}
    content = Path(source.uri).read_bytes()
    digest = content_digest(len(content), [block_sum(content, 0, 0, len(content))])
    described = {"file": source.uri, "bytes": source.bytes, "rows": 30, "rejected_rows": 0, "content": digest}
    assert result.details["files"] == [described]


def test_houses_that_are_unusual_but_real(ray_session: RaySession, tmp_path: Path) -> None:
    rows = [
        "105000,1872,896,0,1.0,0.07,0,0,0",
        "755000,1892,4476,8,3.5,5.0,3,1,1",
        "0,2024,334,1,0,0,0,1,0",
    ]
    result = validate(ray_session, tmp_path, [write_source(tmp_path, table_text(rows))])
    assert rows_of(result).select(COLUMNS).equals(_expected(rows))


def test_sample_of_1460_rows(ray_session: RaySession, tmp_path: Path) -> None:
    path = write_sample(tmp_path / "sales.csv", rows=1460)
    result = validate(ray_session, tmp_path, [source_file(path)])
    assert result.metrics["rows"] + result.metrics["rejected_rows"] == 1460
    assert 0 < result.metrics["rejected_fraction"] < 0.005


@pytest.mark.skipif(not REAL_FILE.exists(), reason="the data file is not beside the checkout")
def test_real_file(ray_session: RaySession, tmp_path: Path) -> None:
    result = validate(ray_session, tmp_path, list_source(str(REAL_FILE)).files)
    assert result.metrics["rows"] == 9999
    (rejected,) = rejected_of(result)
    assert (rejected["line"], rejected["column"], rejected["value"]) == (7819, "PRICE", "-60901")
    assert rejected["reason"] == "-60901 is outside 0 <= value <= 1000000000"
    wider = HOUSING_TABLE.with_ranges({"PRICE": ColumnRange(minimum=None)})
    assert validate(ray_session, tmp_path, list_source(str(REAL_FILE)).files, table=wider).metrics["rows"] == 10_000


def _mixed_file(count: int) -> tuple[str, list[tuple[int, str, str]]]:
    """A file with faults of all kinds and blank lines, and line, column and reason of each fault."""
    lines, faults = [HEADER], []
    for number in range(count):
        row = sale(number)
        if number % 9 == 4:
            row = "-" + row
            faults.append((len(lines) + 1, "PRICE", f"-{200_000 + number} is outside 0 <= value <= 1000000000"))
        if number % 11 == 5:
            row = row.replace(",0.5,", ",much,").rpartition(",")[0] + ",2"
            faults.append((len(lines) + 1, "LOT_ACRES", "much is not a number"))
            faults.append((len(lines) + 1, "DECK", "2 is not one of 0, 1"))
        if number % 13 == 6:
            row += ",9"
            faults = [f for f in faults if f[0] != len(lines) + 1]
            faults.append((len(lines) + 1, "", "the row has 10 fields, the header 9"))
        if number % 17 == 7:
            lines.append("")
            faults = [(line + 1 if line == len(lines) else line, c, r) for line, c, r in faults]
        lines.append(row)
    return "\n".join(lines) + "\n", faults


def test_rejected_rows_have_file_line_column_value_and_reason(ray_session: RaySession, tmp_path: Path) -> None:
    text, faults = _mixed_file(300)
    source = write_source(tmp_path, text)
    result = validate(ray_session, tmp_path, [source], max_rejected_fraction=0.5)
    rejected = rejected_of(result)
    assert [(r["line"], r["column"], r["reason"]) for r in rejected] == faults
    assert {r["file"] for r in rejected} == {source.uri}
    lines = text.splitlines()
    assert all(r["value"] in lines[r["line"] - 1] for r in rejected)
    assert result.metrics["rejected_rows"] == len({r["line"] for r in rejected})
    assert result.metrics["rows"] + result.metrics["rejected_rows"] == 300
    assert result.details["rejected_rows"] == rejected[:50]
    counts = {(r["column"], r["problem"]): r["count"] for r in result.details["rejection_reasons"]}
    assert counts["LOT_ACRES", "is not a number"] == sum(c == "LOT_ACRES" for _, c, _ in faults)


@pytest.mark.parametrize("quoted", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1024, 1500, 4096])
def test_pieces_do_not_show(ray_session: RaySession, tmp_path: Path, chunk_bytes: int, quoted: bool) -> None:
    text, _ = _mixed_file(300)
    if quoted:
        text = text.replace(",0.5,", ',"0.5",')
    source = write_source(tmp_path, text + sale(3) + "\n" + sale(200) + "\n")
    whole = validate(ray_session, tmp_path, [source], max_rejected_fraction=0.5)
    pieces = validate(ray_session, tmp_path, [source], max_rejected_fraction=0.5, chunk_bytes=chunk_bytes)
    assert len(pieces.outputs["rows"].files) > len(whole.outputs["rows"].files) == 1
    assert rows_of(pieces).equals(rows_of(whole))
    assert rejected_of(pieces) == rejected_of(whole)
    assert pieces.outputs["rows"].digest == whole.outputs["rows"].digest
    assert pieces.metrics == whole.metrics
    for name in ("statistics", "rejection_reasons", "files"):
        assert pieces.details[name] == whole.details[name]


@pytest.mark.parametrize("rows", [1, 60, 9000])
def test_the_content_digest_is_that_of_the_file(ray_session: RaySession, tmp_path: Path, rows: int) -> None:
    """A copy has another inode and time of change, is read once more, and is known as the same; a change is seen."""
    text = table_text(sales(rows))
    one = write_source(tmp_path / "one", text)
    copy = write_source(tmp_path / "copy", text)
    other = write_source(tmp_path / "other", text.replace("1950", "1951", 1))
    found = [list_source(file.uri).files[0] for file in (one, copy, other)]
    assert len({file.change for file in found}) == 3
    results = [
        validate(ray_session, tmp_path / str(i), [file], chunk_bytes=size)
        for i, (file, size) in enumerate(zip((found[0], *found), (1 << 25, 1 << 17, 70_000, 1 << 25), strict=True))
    ]
    content = [result.details["files"][0]["content"] for result in results]
    assert content[0] == content[1] == content[2] != content[3]
    data = [result.outputs["rows"].digest for result in results]
    assert data[0] == data[1] == data[2] != data[3]


def test_fields_that_span_lines(ray_session: RaySession, tmp_path: Path) -> None:
    """The extra column holds line ends, delimiters and quotes, in places where the pieces are cut."""
    note = '"first line\nsecond, ""quoted""\r\n\n' + sale(1) + '\n"'
    rows = [f"{sale(n)},{note if n % 3 else 'x'}" for n in range(60)]
    text = table_text(rows, header=HEADER + ",NOTE")
    source = write_source(tmp_path, text)
    result = validate(ray_session, tmp_path, [source], chunk_bytes=1024)
    assert rows_of(result).select(COLUMNS).equals(_expected(sales(60)))
    assert len(result.outputs["rows"].files) > 3
    broken = write_source(tmp_path, text.replace(sale(40), "-" + sale(40)), "broken.csv")
    (rejected,) = rejected_of(validate(ray_session, tmp_path, [broken], chunk_bytes=1024, max_rejected_fraction=0.1))
    assert rejected["line"] == text[: text.index(sale(40))].count("\n") + 1


def test_files_of_different_headers(ray_session: RaySession, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_source(folder, table_text(sales(30)[:10]), "a.csv")
    write_source(folder, _reversed_columns(table_text(sales(30)[10:20])), "b.csv")
    extra = [f"x,{row}" for row in sales(30)[20:]]
    write_source(folder, table_text(extra, header="SELLER," + HEADER.lower()), "c.csv")
    reporter = CollectingReporter()
    result = validate(ray_session, tmp_path, list_source(f"{folder}/*.csv").files, reporter=reporter)
    assert rows_of(result).select(COLUMNS).equals(_expected(sales(30)))
    assert result.details["extra_columns"] == {f"{folder}/c.csv": ["SELLER"]}
    assert any("c.csv" in w and "SELLER" in w for w in reporter.warnings)
    assert any("30 rows validated" in m for m in reporter.messages)
    assert [f["rows"] for f in result.details["files"]] == [10, 10, 10]


@pytest.mark.parametrize("chunk_bytes", [1024, 1 << 20])
def test_duplicates_are_rejected_with_the_line_they_equal(
    ray_session: RaySession, tmp_path: Path, chunk_bytes: int
) -> None:
    rows = sales(60)
    first = write_source(tmp_path, table_text([*rows, rows[50].replace(",1.", ", 1.")]), "a.csv")
    second = write_source(tmp_path, table_text(["", rows[2], sale(70), rows[2]]), "b.csv")
    limits = {"max_rejected_fraction": 0.1, "chunk_bytes": chunk_bytes}
    result = validate(ray_session, tmp_path, [first, second], **limits)
    assert rows_of(result).select(COLUMNS).equals(_expected([*rows, sale(70)]))
    assert [(r["file"], r["line"], r["reason"]) for r in rejected_of(result)] == [
        (first.uri, 62, f"the row equals line 52 of {first.uri}"),
        (second.uri, 3, f"the row equals line 4 of {first.uri}"),
        (second.uri, 5, f"the row equals line 4 of {first.uri}"),
    ]
    assert (result.metrics["rejected_rows"], result.metrics["duplicate_rows"]) == (3, 3)
    with pytest.raises(StepError, match="3 of 64 rows"):
        validate(ray_session, tmp_path, [first, second], chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("chunk_bytes", [1024, 1 << 20])
def test_duplicates_are_kept_under_ids_of_their_own(ray_session: RaySession, tmp_path: Path, chunk_bytes: int) -> None:
    rows = [*sales(60), sale(3), sale(3), sale(59)]
    source = write_source(tmp_path, table_text(rows))
    result = validate(ray_session, tmp_path, [source], duplicate_rows="keep", chunk_bytes=chunk_bytes)
    written = rows_of(result)
    assert written.select(COLUMNS).equals(_expected(rows))
    ids = written["record_id"].to_list()
    assert ids[60:] == [f"{ids[3]}-1", f"{ids[3]}-2", f"{ids[59]}-1"]
    assert len(set(ids)) == 63
    assert rejected_of(result) == []
    assert (result.metrics["rejected_rows"], result.metrics["duplicate_rows"]) == (0, 3)


def test_keys_times_truth_values_and_nulls(ray_session: RaySession, tmp_path: Path) -> None:
    text = (
        "ID,AT,OK,X,N\n"
        "a,2024-05-01T12:00:00Z,true,1.5,1\n"
        "b,2024-05-01 14:00:00+02:00,0,,2\n"
        "c,2024-05-01,,2,3.0\n"
        '"d ""e"", f",2024-05-01T12:00:00.25,FALSE, ,4\n'
        "a,2025-01-01T00:00,1,9,5\n"
        ",2024-05-01,1,1,1\n"
        "g,yesterday,maybe,1,-1\n"
    )
    source = write_source(tmp_path, text)
    result = validate(ray_session, tmp_path, [source], table=KEYED, max_rejected_fraction=0.5)
    rows = rows_of(result)
    noon = datetime(2024, 5, 1, 12, tzinfo=UTC)
    assert rows.drop("record_id").rows() == [
        (noon, "a", noon, True, 1.5, 1),
        (noon, "b", noon, False, None, 2),
        (noon.replace(hour=0), "c", noon.replace(hour=0), None, 2.0, 3),
        (noon.replace(microsecond=250_000), 'd "e", f', noon.replace(microsecond=250_000), False, None, 4),
    ]
    assert rows["record_id"].equals(record_ids(rows, ["ID"]))
    assert [(r["line"], r["column"], r["value"], r["reason"]) for r in rejected_of(result)] == [
        (6, "ID", "", f"the row has the same key as line 2 of {source.uri}"),
        (7, "ID", "", "is empty, but a value is required"),
        (8, "AT", "yesterday", "yesterday is not a time such as 2024-05-01T12:00:00Z"),
        (8, "OK", "maybe", "maybe is none of true, false, 1, 0"),
        (8, "N", "-1", "-1 is outside 0 <= value"),
    ]
    assert result.metrics["rejected_rows"] == 3


def test_digest_tells_contents_apart(ray_session: RaySession, tmp_path: Path) -> None:
    base = sales(20)
    variants = {
        "same": base,
        "other order": base[::-1],
        "other value": [*base[:19], sale(99)],
        "row less": base[:19],
    }
    digests = {
        name: validate(ray_session, tmp_path / name, [write_source(tmp_path / name, table_text(rows))])
        .outputs["rows"]
        .digest
        for name, rows in variants.items()
    }
    assert digests["same"] == digests["other order"]
    assert len(set(digests.values())) == 3


def _floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


valid_row = st.tuples(
    _floats(0, 1e9),
    st.integers(1600, 2100),
    _floats(0.001, 1e6),
    st.integers(0, 100),
    _floats(0, 100),
    _floats(0, 1e5),
    st.integers(0, 100),
    st.integers(0, 1),
    st.integers(0, 1),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(valid_row, min_size=1, max_size=120, unique=True),
    chunk_bytes=st.integers(1024, 5000),
    line_end=st.sampled_from(["\n", "\r\n"]),
    quote=st.booleans(),
)
def test_every_valid_table_comes_back(
    ray_session: RaySession, rows: list[tuple[Any, ...]], chunk_bytes: int, line_end: str, quote: bool
) -> None:
    frame = pl.DataFrame(rows, schema=polars_schema(HOUSING_TABLE), orient="row")
    text = frame.write_csv(quote_style="always" if quote else "necessary", line_terminator=line_end)
    with tempfile.TemporaryDirectory() as folder:
        result = validate(ray_session, Path(folder), [write_source(Path(folder), text)], chunk_bytes=chunk_bytes)
        written = rows_of(result)
    assert written.select(COLUMNS).equals(frame)
    assert written["record_id"].equals(record_ids(frame, COLUMNS))
