"""Numbers in messages and in the UI: counts with the right noun, six significant digits, one order."""

from __future__ import annotations

import ast
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.compute.base import as_metadata
from resources.sagemaker.jobs import PROCESSING, TRAINING, Job
from step_scripts.data.csv_rows import RowCounts
from step_scripts.data.source_pass import Reason, rejection_message
from step_scripts.parameters import ValidateSourceParams
from step_scripts.runner.wording import are, counted, megabytes, number, percent, rounded
from step_scripts.table.spec import ColumnSpec, TableSpec
from tests import ROOT

TABLE = TableSpec(
    name="t", columns=(ColumnSpec(name="X", dtype="float64"), ColumnSpec(name="Y", dtype="float64")), target="Y"
)
NOUNS = "rows|times|files|workers|trials|rounds|records|versions|lines|values|fields"
NOUNS += "|features|predictions|entries|errors|objects|things"
# Constants, and what is said of more than one only.
ALLOWED = {
    *("{_RESTARTS + 1} times", "{_RETRIES + 1} times", "{_COMMIT_ATTEMPTS} times", "{len(positions)} times"),
    "{m.lines:,} lines",
}


def test_counts() -> None:
    assert [counted(n, "row") for n in (0, 1, 2, 2000)] == ["0 rows", "1 row", "2 rows", "2,000 rows"]
    assert counted(1, "entry", "entries") + counted(2, "entry", "entries") == "1 entry2 entries"
    assert (are(1), are(0), are(2)) == ("is", "are", "are")


def test_small_numbers_keep_their_digits() -> None:
    assert [number(v) for v in (11989.9432, 15000.0, 0.000123456789, 1e-9)] == [
        "11,989.9",
        "15,000",
        "0.000123457",
        "1e-09",
    ]
    assert percent(1 / 3e6) == "3.33333e-05%"
    assert (percent(0.02), percent(1.0)) == ("2%", "100%")
    assert (megabytes(412), megabytes(12_345_678)) == ("0.000412 MB", "12.3 MB")
    assert (number(float("nan")), number(float("inf"))) == ("nan", "inf")


@given(st.floats())
def test_rounding_changes_at_most_the_seventh_digit(value: float) -> None:
    assert rounded(value) == pytest.approx(value, rel=5.1e-6, nan_ok=True)
    assert rounded(rounded(value)) == rounded(value) or value != value


@given(st.integers(-(10**15), 10**15))
def test_counts_that_are_floats_stay_exact(value: int) -> None:
    assert rounded(float(value)) == value


def test_metadata_shows_six_significant_digits_at_every_depth() -> None:
    value = 11989.943211
    shown = as_metadata({"a": value, "t": [{"b": value, "n": 12_345_678.0}], "j": {"c": [value]}, "none": None})
    assert shown["a"] == 11989.9
    assert shown["t"].records[0].data == {"b": 11989.9, "n": 12_345_678.0}
    assert shown["j"].value == {"c": [11989.9]}
    assert list(shown) == ["a", "t", "j"]


def test_a_table_has_a_column_for_each_entry_of_a_dictionary() -> None:
    """As the table of trials, of which one has failed."""
    shown = as_metadata(
        {
            "trials": [
                {"trial": 2, "parameters": {"eta": 0.1234567, "max_depth": 3, "trial": "x"}, "rmse": None, "on": ["a"]},
                {"trial": 1, "parameters": {"eta": 0.2, "max_depth": 4, "trial": "y"}, "rmse": 2.0, "on": ["b"]},
            ]
        }
    )["trials"]
    kinds = {column.name: column.type for column in shown.schema.columns}
    assert kinds == {
        **{"trial": "int", "eta": "float", "max_depth": "int"},
        **{"parameters.trial": "string", "rmse": "float", "on": "string"},
    }
    assert list(kinds) == ["trial", "eta", "max_depth", "parameters.trial", "rmse", "on"]
    assert list(shown.records[0].data.values()) == [2, 0.123457, 3, "x", None, "['a']"]


def test_no_message_has_a_count_with_a_plural_that_is_written_out() -> None:
    """`{n} rows` reads `1 rows`, one day: `counted` knows better. A number of a constant is as it is."""
    bare = re.compile(rf"\{{[^{{}}]*\}} (?:{NOUNS})\b|\w\(s\)")
    found = []
    for folder in ("housing_assets", "resources", "step_scripts"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    text = ast.unparse(node)
                    if (hit := bare.search(text)) and hit[0] not in ALLOWED:
                        found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {hit[0]}")
    assert found == []


def message(rejected: int, total: int) -> str:
    why = [Reason("X", "is no number", rejected, "/a.csv", 7, "?")]
    params = ValidateSourceParams(table=TABLE, files=())
    counts = RowCounts(total, total, rejected, rejected)
    return rejection_message(counts, why, params, "/out/failed/rejected_rows.csv")


def test_rejected_rows_are_told_with_the_file_that_lists_them() -> None:
    assert "/out/failed/rejected_rows.csv lists them" in message(20, 100)
    assert "(1 time, first" in message(1, 2)
    assert message(1, 2).startswith("1 of 2 rows is rejected (50%)")
    assert message(1, 3_000_000).startswith("1 of 3,000,000 rows is rejected (3.33333e-05%)")


@pytest.mark.parametrize(("rejected", "advised"), [(1, True), (50, True), (51, False), (100, False)])
def test_nobody_is_advised_to_reject_most_of_a_file(rejected: int, advised: bool) -> None:
    assert ("raise max_rejected_fraction" in message(rejected, 100)) == advised


@pytest.mark.parametrize(
    ("variable", "value", "there"),
    [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:5112", False),
        ("AWS_ENDPOINT_URL_SAGEMAKER", "http://localhost:1", False),
        ("AWS_ENDPOINT_URL", "https://vpce-1.api.sagemaker.eu-west-1.vpce.amazonaws.com", True),
        ("AWS_ENDPOINT_URL", "", True),
    ],
)
def test_links_to_the_console_are_left_out_where_it_cannot_show_the_job(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, there: bool
) -> None:
    monkeypatch.setenv(variable, value)
    for kind in (TRAINING, PROCESSING):
        job = Job(kind, "j", "arn:aws:sagemaker:eu-west-1:1:training-job/j", "InProgress", {})
        assert sorted(job.links()) == (["console", "logs"] if there else [])
        assert ("https://" in job.started_text()) == there
