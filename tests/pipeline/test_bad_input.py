"""Broken files, and what the message must say of each: file, line, column, remedy."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from resources.sources.listing import list_source
from step_scripts import validate_source
from step_scripts.runner.contract import StepError
from step_scripts.runner.ray_session import RaySession
from step_scripts.runner.storage import read_bytes
from tests.source_steps import HEADER, CollectingReporter, sale, sales, table_text, validate, write_source

GOOD = table_text(sales(5))
NOTED = HEADER + ",NOTE"
STRAY_BEGIN = sale(1).replace("1000.25", '"1000.25')
STRAY_END = sale(6).replace("1001.5", '1001.5"')
LATIN = table_text([*(f"{row},x" for row in sales(3)), f"{sale(3)},Orléans"], header=f"{HEADER},CITY")


def _with_cell(row: int, position: int, text: str, count: int = 20) -> str:
    """A table in which one cell is replaced; the first row is row 0, in line 2."""
    rows = [line.split(",") for line in sales(count)]
    rows[row][position] = text
    return table_text([",".join(cells) for cells in rows])


def _parquet() -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame({"PRICE": [1.0]}).write_parquet(buffer)
    return buffer.getvalue()


def _zip(member: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, GOOD)
    return buffer.getvalue()


def _without(column: str) -> str:
    position = HEADER.split(",").index(column)
    return "\n".join(
        ",".join(cell for i, cell in enumerate(line.split(",")) if i != position) for line in GOOD.splitlines()
    )


# What is wrong: (content, settings, fragments of the message besides the file's name).
STRUCTURE: dict[str, tuple[str | bytes, dict[str, Any], list[str]]] = {
    "empty": ("", {}, ["is empty (0 bytes)", "export it again"]),
    "blanks only": ("\n \r\n\n", {}, ["nothing but blanks", "header line"]),
    "header only": (HEADER + "\n", {}, ["a header (line 1) and no rows", "export it again"]),
    "header only, no line end": (HEADER, {}, ["a header (line 1) and no rows"]),
    "blank lines instead of rows": (HEADER + "\n\n  \n\n", {}, ["no rows"]),
    "no header": (
        "\n".join(sales(3)),
        {},
        ["line 1 holds data, not column names", "Add a first line: PRICE,YEAR_BUILT"],
    ),
    "semicolons": (GOOD.replace(",", ";"), {}, ["line 1", "separated by ';', not by ','", 'Set delimiter to ";"']),
    "tabs": (GOOD.replace(",", "\t"), {}, ["separated by a tab", 'Set delimiter to "\\t"']),
    "bars": (GOOD.replace(",", "|"), {}, ["separated by '|'", 'Set delimiter to "|"']),
    "commas, semicolons expected": (GOOD, {"delimiter": ";"}, ["separated by ',', not by ';'", 'Set delimiter to ","']),
    "missing column": (_without("LOT_ACRES"), {}, ["line 1", "column LOT_ACRES missing", "Add or rename the column"]),
    "column of a similar name": (
        GOOD.replace("SQUARE_FEET", "SQUARE_FOOT"),
        {},
        ["column SQUARE_FEET missing", "is 'SQUARE_FOOT' meant to be SQUARE_FEET?"],
    ),
    "two missing columns": (
        GOOD.replace("PRICE", "COST").replace("DECK", "TERRACE"),
        {},
        ["columns PRICE, DECK missing", "'COST'", "'TERRACE'"],
    ),
    "column twice": (
        GOOD.replace("DECK", "price", 1),
        {},
        ["line 1", "column PRICE is there 2 times", "field 1 ('PRICE'), field 9 ('price')"],
    ),
    "UTF-16": (GOOD.encode("utf-16"), {}, ["UTF-16 (byte order mark at byte 0, line 1)", "iconv -f UTF-16 -t UTF-8"]),
    "UTF-16 without mark": (GOOD.encode("utf-16-le"), {}, ["line 1", "byte 0x00 at offset 1", "UTF-16"]),
    "UTF-32": (GOOD.encode("utf-32"), {}, ["UTF-32", "iconv"]),
    "Latin-1 in a row": (
        LATIN.encode("latin-1"),
        {},
        ["line 5", "byte 0xE9 at offset", "is not UTF-8", "iconv -f ISO-8859-1 -t UTF-8"],
    ),
    "Latin-1 in the header": (
        (HEADER + ",Größe\n" + sale(1) + ",2\n").encode("latin-1"),
        {},
        ["line 1", "byte 0xF6", "iconv"],
    ),
    "Parquet": (_parquet(), {}, ["is a Parquet file, not a CSV file", "export it as CSV"]),
    "gzip": (gzip.compress(GOOD.encode()), {}, ["gzip-compressed", "gunzip"]),
    "xz": (lzma.compress(GOOD.encode()), {}, ["xz-compressed", "unxz"]),
    "zip": (_zip("sales.csv"), {}, ["is a ZIP archive", "unzip"]),
    "Excel workbook": (_zip("xl/workbook.xml"), {}, ["is an Excel workbook", "export the sheet as CSV"]),
    "error page": ("<!DOCTYPE html><html>404</html>", {}, ["HTML or XML page", "download"]),
    "JSON": ('[{"PRICE": 1}]', {}, ["is JSON", "export the table as CSV"]),
    "NUL byte in a row": (
        GOOD.replace(sale(3), sale(3)[:4] + "\0" + sale(3)[5:]),
        {},
        ["line 5", "byte 0x00 at offset", "binary, damaged"],
    ),
    "huge first line": (
        "x" * 3000,
        {"max_line_bytes": 1024},
        ["line 1 is longer than max_line_bytes (1,024)", "raise"],
    ),
    "huge line": (
        table_text([*sales(4), "9" * 3000, *sales(3)]),
        {"max_line_bytes": 1024},
        ["line 6", "longer than max_line_bytes (1,024)"],
    ),
    "huge last line": (
        table_text([*sales(60), "9" * 9000]),
        {"max_line_bytes": 1024, "chunk_bytes": 1024},
        ["line 62", "longer than"],
    ),
    "quote not closed": (
        table_text([*sales(2), '"' + sale(2), *sales(3)]),
        {},
        ["line 4", "quoted field", "never closed", "Add the closing quote"],
    ),
    "quote not closed, others are": (
        table_text([sale(0), '"' + sale(1), '"200002",' + sale(2).partition(",")[2], sale(3)]),
        {},
        ["line 3", "not closed"],
    ),
    "two quotes not closed": (
        table_text([sale(0), '"' + sale(1), sale(2), '"' + sale(3)]),
        {},
        ["line 3", "not closed"],
    ),
    "quote inside a field": (
        table_text([sale(0), sale(1).replace(",", '",', 1).replace(",1", ',"1', 1)]),
        {},
        ["line 3", "inside a field", '""'],
    ),
    "stray quotes in the same column": (
        table_text([sale(0), STRAY_BEGIN, *sales(9)[2:6], STRAY_END, sale(7)]),
        {"max_rejected_fraction": 1.0, "chunk_bytes": 1024},
        ["lines 3 to 8", "a quoted field of column SQUARE_FEET", "Remove the quote characters"],
    ),
    "stray quotes in different columns": (
        table_text([sale(0), STRAY_BEGIN, *sales(60)[2:], sale(1).replace(",0.5", '",0.5')]),
        {"max_rejected_fraction": 1.0, "chunk_bytes": 1024},
        ["lines 3 to 62", "a quoted field of column SQUARE_FEET"],
    ),
    "stray quotes, Macintosh line ends": (
        table_text([sale(0), STRAY_BEGIN, *sales(9)[2:6], STRAY_END, sale(7)], end="\r"),
        {"max_rejected_fraction": 1.0},
        ["lines 3 to 8", "a quoted field of column SQUARE_FEET"],
    ),
    "stray quotes in a column that the table lacks": (
        table_text([f"{sale(0)},x", f'{sale(1)},"x', *(f"{row},x" for row in sales(60)[2:]), f'{sale(60)},x"'], NOTED),
        {"max_rejected_fraction": 1.0, "max_line_bytes": 1024},
        ["lines 3 to 62", "the row, in which a quoted field spans lines, is longer than max_line_bytes (1,024)"],
    ),
    "the same, in small pieces": (
        table_text([f"{sale(0)},x", f'{sale(1)},"x', *(f"{row},x" for row in sales(60)[2:]), f'{sale(60)},x"'], NOTED),
        {"max_rejected_fraction": 1.0, "max_line_bytes": 1024, "chunk_bytes": 1024},
        ["lines 3 to 62", "the row, in which a quoted field spans lines, is longer than max_line_bytes (1,024)"],
    ),
    "stray quotes in header and row": (
        table_text([f"{sale(0)},x", f'{sale(1)},x"', f"{sale(2)},x"], f'{HEADER},"NOTE'),
        {},
        ["lines 1 to 3", "a quoted column name holds rows of the table"],
    ),
    "quote inside a column name": (
        table_text([f"{sale(0)},x", f'{sale(1)},"x', f"{sale(2)},x"], f'{HEADER},NO"TE'),
        {},
        ["lines 1 to 3", "Remove the quote character"],
    ),
    "cut off in its last number": (
        GOOD[:-2],
        {"max_rejected_fraction": 1.0},
        ["line 6", "the last row ends in", "was the file cut off?", "set unterminated_last_row to accept"],
    ),
    "cut off in its last number, quoted": (
        GOOD[:-1].replace(",0.5,", ',"0.5",'),
        {"max_rejected_fraction": 1.0, "chunk_bytes": 1024},
        ["line 6", "was the file cut off?"],
    ),
    "quoted column name not closed": (GOOD.replace("DECK", '"DECK', 1), {}, ["line 1", "column name is not closed"]),
    "too few fields in all rows": (
        table_text(["", *(row.rpartition(",")[0] for row in sales(4))]),
        {},
        ["line 3", "row has 8 fields, the header 9", "4 rows"],
    ),
    "too many fields in all rows": (
        table_text([row + "," for row in sales(4)]),
        {},
        ["line 2", "row has 10 fields, the header 9", "each line end with a delimiter"],
    ),
}

# Too many rejected rows: (content, settings, fragments).
REJECTED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "negative price": (
        _with_cell(6, 0, "-60901"),
        {},
        ["1 of 20 rows", "(5%)", "PRICE is outside 0 <= value <= 1000000000", "'-60901' in line 8", "column_ranges"],
    ),
    "text for a number": (_with_cell(1, 1, "unknown"), {}, ["YEAR_BUILT is not a whole number", "'unknown' in line 3"]),
    "fraction for a whole number": (
        _with_cell(2, 3, "2.5"),
        {},
        ["NUM_BEDROOMS is not a whole number", "'2.5' in line 4"],
    ),
    "empty cell": (_with_cell(3, 2, ""), {}, ["SQUARE_FEET is empty, but a value is required", "line 5"]),
    "missing value marker": (_with_cell(3, 2, "NA"), {}, ["SQUARE_FEET is not a number", "'NA' in line 5"]),
    "not a number": (_with_cell(4, 0, "nan"), {}, ["PRICE is not a finite number", "'nan' in line 6"]),
    "infinite": (_with_cell(4, 5, "-inf"), {}, ["LOT_ACRES is not a finite number", "'-inf' in line 6"]),
    "too large for a number": (_with_cell(4, 0, "1e999"), {}, ["PRICE is not a finite number", "'1e999'"]),
    "too large for 64 bits": (_with_cell(4, 1, "9" * 30), {}, ["YEAR_BUILT is not a whole number", "line 6"]),
    "value not allowed": (_with_cell(5, 8, "2"), {}, ["DECK is not one of 0, 1", "'2' in line 7"]),
    "thousands separators": (_with_cell(5, 0, '"430,000"'), {}, ["PRICE is not a number", "'430,000' in line 7"]),
    "year of two digits": (_with_cell(19, 1, "65"), {}, ["YEAR_BUILT is outside 1600 <= value <= 2100", "line 21"]),
    "row too short": (table_text([*sales(9), "1,2"]), {}, ["the row has 2 fields, the header 9", "line 11"]),
    "row too long": (table_text([sale(0), sale(1) + ",1,1", *sales(9)[2:]]), {}, ["row has 11 fields", "line 3"]),
    "as many missing as surplus, the first row too long": (
        table_text([sale(0) + ",7", *sales(9)[1:], sale(10).rpartition(",")[0]]),
        {},
        ["2 of 10 rows", "row has 10 fields", "line 2", "row has 8 fields", "line 11"],
    ),
    "row of many lines": (
        table_text([*(f"{row},x" for row in sales(97)), f'-{sale(97)},"x\n\n\n{sale(98)}"', f"{sale(99)},x"], NOTED),
        {"max_rejected_fraction": 0.02},
        ["1 of 99 rows, 4 of 102 lines, is rejected (3.92157%)", "in line 99"],
    ),
    "as many missing as surplus": (
        table_text([*sales(9), sale(9) + ",7", sale(10).rpartition(",")[0]]),
        {},
        ["2 of 11 rows", "row has 10 fields", "line 11", "row has 8 fields", "line 12"],
    ),
    "equal rows": (
        table_text([*sales(9), sale(4)]),
        {},
        ["1 of 10 rows", "row equals an earlier row", "line 11", "duplicate_rows: keep"],
    ),
    "all rows": (
        table_text([f"-{row}" for row in sales(3)]),
        {"max_rejected_fraction": 1.0},
        ["3 of 3 rows", "(100%)"],
    ),
}


@pytest.mark.parametrize("fault", STRUCTURE)
def test_file_that_is_no_such_table(fault: str, ray_session: RaySession, tmp_path: Path) -> None:
    content, settings, fragments = STRUCTURE[fault]
    source = write_source(tmp_path, content, "broken.csv")
    with pytest.raises(StepError) as raised:
        validate(ray_session, tmp_path, [source], **settings)
    message = str(raised.value)
    assert source.uri in message
    for fragment in fragments:
        assert fragment in message
    assert _leftovers(tmp_path) == []


@pytest.mark.parametrize("fault", REJECTED)
def test_too_many_rejected_rows(fault: str, ray_session: RaySession, tmp_path: Path) -> None:
    content, settings, fragments = REJECTED[fault]
    source = write_source(tmp_path, content, "broken.csv")
    with pytest.raises(StepError) as raised:
        validate(ray_session, tmp_path, [source], **settings)
    message = str(raised.value)
    for fragment in [source.uri, "max_rejected_fraction", "correct the rows", *fragments]:
        assert fragment in message
    kept = str(raised.value.details["rejected_rows.csv"])
    assert read_bytes(kept).startswith(b"file,line,column,value,reason\n" + source.uri.encode())
    assert _leftovers(tmp_path) == [kept]


def _leftovers(folder: Path) -> list[str]:
    return sorted(str(path) for path in (folder / "output").rglob("*") if path.is_file())


def test_file_that_disappeared(ray_session: RaySession, tmp_path: Path) -> None:
    source = write_source(tmp_path, GOOD)
    Path(source.uri).unlink()
    with pytest.raises(StepError, match=r"sales\.csv does not exist any more"):
        validate(ray_session, tmp_path, [source])


def test_file_that_is_still_being_written(ray_session: RaySession, tmp_path: Path) -> None:
    source = write_source(tmp_path, GOOD)
    with Path(source.uri).open("a") as file:
        file.write(sale(9))
    with pytest.raises(StepError, match="Wait until it is completely written"):
        validate(ray_session, tmp_path, [source])


@pytest.mark.parametrize("kept", ["size and time", "neither"])
def test_file_that_is_written_while_it_is_read(
    kept: str, ray_session: RaySession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look for files and the end of the reading; by whom, and when, does not matter."""
    path = Path(write_source(tmp_path / "in", table_text(sales(300))).uri)
    [found] = list_source(str(path)).files
    check_rows = validate_source.check_rows

    def write(*arguments: Any) -> None:
        check_rows(*arguments)
        if kept == "neither":
            path.write_text(table_text(sales(301)))
        else:
            path.write_text(path.read_text().replace("1950", "1951", 1))
            os.utime(path, (found.modified, found.modified))

    monkeypatch.setattr(validate_source, "check_rows", write)
    with pytest.raises(StepError, match=r"since the run looked for files: .*sales\.csv"):
        validate(ray_session, tmp_path, [found])


@pytest.mark.parametrize("delimiter", ['"', "\n", "¦"])
def test_impossible_delimiter(delimiter: str, ray_session: RaySession, tmp_path: Path) -> None:
    source = write_source(tmp_path, GOOD)
    with pytest.raises(StepError, match=r"delimiter .* must be one ASCII character"):
        validate(ray_session, tmp_path, [source], delimiter=delimiter)


def test_no_files(ray_session: RaySession, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="no source files"):
        validate(ray_session, tmp_path, [])


def test_broken_file_among_good_ones_is_named(ray_session: RaySession, tmp_path: Path) -> None:
    write_source(tmp_path / "in", GOOD, "a.csv")
    write_source(tmp_path / "in", table_text([*sales(8), "caf\xe9"]).encode("latin-1"), "b.csv")
    with pytest.raises(StepError, match=r"b\.csv, line 10: byte 0xE9"):
        validate(ray_session, tmp_path, list_source(str(tmp_path / "in")).files, chunk_bytes=1024)


def test_configured_bounds_and_limit_let_rows_pass(ray_session: RaySession, tmp_path: Path) -> None:
    content, _, _ = REJECTED["negative price"]
    source = write_source(tmp_path, content)
    reporter = CollectingReporter()
    result = validate(ray_session, tmp_path, [source], reporter=reporter, max_rejected_fraction=0.05)
    assert (result.metrics["rows"], result.metrics["rejected_rows"]) == (19, 1)
    assert "PRICE is outside" in reporter.warnings[0]
