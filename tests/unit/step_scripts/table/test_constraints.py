"""One meaning of a constraint: what pandera's checks say is what ingestion, endpoint and checks of files apply."""

from __future__ import annotations

import operator
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandera.polars as pa
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandera.errors import SchemaErrors

from housing_assets.schema import HOUSING_TABLE, HouseSale
from step_scripts.data.row_files import schema_violations
from step_scripts.serving.feature_parser import FeatureParser
from step_scripts.serving.request_rows import RequestError
from step_scripts.table.column_types import polars_schema, table_from_pandera, violations
from step_scripts.table.spec import ColumnRange, ColumnSpec, DType, TableSpec
from tests import ROOT

ROW = {
    "PRICE": 1.0, "YEAR_BUILT": 1872, "SQUARE_FEET": 334.0, "NUM_BEDROOMS": 0, "NUM_BATHROOMS": 3.5,
    "LOT_ACRES": 5.0, "GARAGE_SPACES": 0, "FRONT_PORCH": 1, "DECK": 0,
}  # fmt: skip


def frame(**changes: object) -> pl.DataFrame:
    return pl.DataFrame([ROW | changes], schema=polars_schema(HOUSING_TABLE))


def with_column(**declared: Any) -> TableSpec:
    """A table of column x, as declared, and target y."""
    limited = ColumnSpec.model_validate({"name": "x", **declared})
    return TableSpec(name="numbers", columns=(limited, ColumnSpec(name="y", dtype="float64")), target="y")


def refused_rows(values: list[Any], table: TableSpec) -> list[int]:
    """Which of the values of x are refused in a frame."""
    rows = pl.DataFrame({"x": values, "y": [0.0] * len(values)}, schema=polars_schema(table))
    return sorted(set(violations(rows, table)["row"]))


def refused_requests(values: list[Any], table: TableSpec) -> list[int]:
    """Which of the values of x the endpoint refuses: alone, and in one request of all."""
    parser, refused = FeatureParser(table), []
    for index, value in enumerate(values):
        try:
            parser.parse(f"{value!r}\n".encode(), "text/csv")
        except RequestError:
            refused.append(index)
    together = []
    try:
        parser.parse("\n".join(map(repr, values)).encode(), "text/csv")
    except RequestError as error:
        together = [problem["row"] - 1 for problem in error.rows]
    assert together == refused
    return refused


LOWS: list[dict[str, float]] = [{}, {"ge": 0.0}, {"gt": 0.0}, {"gt": 0.5}, {"ge": 0.0, "gt": 1.0}]
HIGHS: list[dict[str, float]] = [{}, {"le": 2.0}, {"lt": 2.0}, {"lt": 1.5}, {"le": -3.0}, {"le": 2.0, "lt": 1.0}]


@pytest.mark.parametrize("dtype", ["int64", "float64"])
@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("high", HIGHS)
def test_bounds_are_those_of_the_table(dtype: DType, low: dict[str, float], high: dict[str, float]) -> None:
    table = with_column(dtype=dtype, **low, **high)
    values = [value for value in (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0) if dtype == "float64" or value.is_integer()]
    compare = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
    outside = [
        i for i, v in enumerate(values) if not all(compare[name](v, bound) for name, bound in (low | high).items())
    ]
    typed = [int(value) for value in values] if dtype == "int64" else values
    assert refused_rows(typed, table) == outside
    assert refused_requests(typed, table) == outside


CHECKS: dict[str, tuple[type, dict[str, Any]]] = {
    "whole, closed": (int, {"ge": -2, "le": 3}),
    "whole, open": (int, {"gt": -2, "lt": 3}),
    "whole, between whole numbers": (int, {"gt": -1.5, "lt": 2.5}),
    "whole, a range": (int, {"in_range": {"min_value": -1, "max_value": 2, "include_max": False}}),
    "whole, listed": (int, {"isin": [0, 2, 5]}),
    "whole, listed and bounded": (int, {"isin": [0, 2, 5], "lt": 5}),
    "number, closed": (float, {"ge": -2, "le": 3}),
    "number, open": (float, {"gt": -2, "lt": 3}),
    "number, a range": (float, {"in_range": {"min_value": -1, "max_value": 2, "include_min": False}}),
    "number, listed": (float, {"isin": [0.5, 2.0]}),
    "nothing": (float, {}),
}


@pytest.mark.parametrize("name", CHECKS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_ingestion_and_endpoint_refuse_what_pandera_refuses(name: str, data: st.DataObject) -> None:
    kind, checks = CHECKS[name]
    model = type(
        "Declared",
        (pa.DataFrameModel,),
        {"__annotations__": {"x": kind, "y": float}, "x": pa.Field(**checks), "y": pa.Field()},
    )
    table = table_from_pandera(model, name="t", target="y")
    assert TableSpec.model_validate_json(table.model_dump_json()) == table
    some = st.integers(-4, 6) if kind is int else st.sampled_from([-2.0, -1.0, -0.0, 0.5, 2.0, 3.0]) | st.floats(-4, 6)
    values = data.draw(st.lists(some, min_size=1, max_size=8))
    rows = pl.DataFrame({"x": values, "y": [0.0] * len(values)}, schema=polars_schema(table))
    expected = []
    for index in range(rows.height):
        try:
            model.to_schema().validate(rows[index], lazy=True)
        except SchemaErrors:
            expected.append(index)
    assert refused_rows(values, table) == expected
    assert refused_requests(values, table) == expected
    words = table.columns[0].constraint()
    assert (words == "") == (not checks)
    problems = set(violations(rows, table)["problem"])
    assert problems <= {f"is outside {words}", f"is not {words}"}


def test_large_whole_numbers_are_compared_in_all_their_digits() -> None:
    table = with_column(dtype="int64", ge=-(2.0**62), lt=2.0**62)
    assert refused_rows([2**62 - 1, 2**62, -(2**62), -(2**62) - 1], table) == [1, 3]
    assert refused_rows([2**63 - 1, -(2**63)], with_column(dtype="int64", ge=-1e300, le=1e300)) == []


def test_nulls_infinities_and_nan() -> None:
    table = with_column(dtype="float64", ge=0, nullable=True)
    rows = pl.DataFrame({"x": [None, float("nan"), float("inf"), 1.0], "y": [None, 1.0, 1.0, 1.0]})
    assert violations(rows, table).rows() == [
        (1, "x", "is not a finite number"),
        (2, "x", "is not a finite number"),
        (0, "y", "is empty, but a value is required"),
    ]
    keyed = TableSpec(
        name="keyed", target="y", key_columns=("k",),
        columns=(*table.columns[1:], ColumnSpec(name="k", dtype="string", nullable=True, isin=("a", "b"))),
    )  # fmt: skip
    rows = pl.DataFrame({"y": [1.0, 2.0, 3.0], "k": ["a", None, "c"]})
    assert violations(rows, keyed).rows() == [
        (1, "k", "is empty, but a value is required"),
        (2, "k", "is not one of a, b"),
    ]


@given(value=st.floats(), low=st.floats(-10, 10), high=st.none() | st.floats(-10, 10))
def test_numbers_arrays_and_columns_have_the_same_limits(value: float, low: float, high: float | None) -> None:
    limits = with_column(dtype="float64", gt=low, le=high).columns[0].limits
    alone, array = limits.permit(value), limits.permit(np.array([value]))
    assert alone == array[0]
    if value == value:
        assert pl.DataFrame({"x": [value]}).select(limits.permit(pl.col("x"))).item() == alone


def test_the_table_carries_everything_that_the_schema_declares() -> None:
    carried = TableSpec.model_validate_json(HOUSING_TABLE.model_dump_json())
    assert carried == HOUSING_TABLE
    for name, column in HouseSale.to_schema().columns.items():
        found = carried.column(name)
        assert (found.description, found.nullable) == (column.description, column.nullable)
        assert len(column.checks) == sum(getattr(found, f) is not None for f in ("ge", "gt", "le", "lt", "isin"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"NUM_BEDROOMS": 8}, None),
        ({"PRICE": -1.0}, "is outside 0 <= value <= 1000000000"),
        ({"YEAR_BUILT": 1599}, "is outside 1600 <= value <= 2100"),
        ({"SQUARE_FEET": 0.0}, "is outside 0 < value <= 1000000"),
        ({"DECK": 2}, "is not one of 0, 1"),
        ({"PRICE": None}, "is empty, but a value is required"),
    ],
)
def test_the_schema_and_the_table_accept_and_refuse_the_same_rows(changes: dict[str, object], problem: str) -> None:
    row = frame(**changes)
    try:
        HouseSale.to_schema().validate(row, lazy=True)
        accepted = True
    except SchemaErrors:
        accepted = False
    assert violations(row, HOUSING_TABLE)["problem"].to_list() == ([] if accepted else [problem])
    assert accepted == (problem is None)


def test_configured_ranges_replace_those_of_the_schema() -> None:
    table = HOUSING_TABLE.with_ranges({"PRICE": ColumnRange(minimum=-100.0)})
    assert table.column("PRICE").constraint() == "-100 <= value"
    assert violations(frame(PRICE=-100.0), table).is_empty()
    assert HOUSING_TABLE.with_ranges({"DECK": ColumnRange(minimum=1)}).column("DECK").constraint() == "one of 1"
    with pytest.raises(ValueError, match=r"column_ranges names \['PRIZE'\].*it has \['PRICE'"):
        HOUSING_TABLE.with_ranges({"PRIZE": ColumnRange()})
    with pytest.raises(ValueError, match="column_ranges: x holds bool, which has no range"):
        with_column(dtype="bool").with_ranges({"x": ColumnRange(minimum=1)})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a check of texts": ({"str_length": {"max_value": 3}}, r"Declared\.x: check str_length is not supported"),
    "another check": ({"ne": 3}, "check not_equal_to is not supported; use ge, gt, le, lt, in_range or isin"),
    "unique": ({"unique": True}, "option unique=True is not supported"),
    "a warning": ({"ge": 1, "raise_warning": True}, "greater_than_or_equal_to: option raise_warning=True"),
    "a default": ({"default": 1.0}, r"option default=1\.0 is not supported"),
    "twice": ({"ge": 1, "in_range": {"min_value": 0, "max_value": 9}}, r"Declared\.x: ge is given twice"),
    "infinite": ({"ge": float("-inf")}, "finite number"),
    "a text for a number": ({"isin": ["a"]}, "cannot hold one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_applied_everywhere_is_refused(name: str) -> None:
    checks, message = REFUSED[name]
    model = type(
        "Declared",
        (pa.DataFrameModel,),
        {"__annotations__": {"x": float, "y": float}, "x": pa.Field(**checks), "y": pa.Field()},
    )
    with pytest.raises(ValueError, match=message):
        table_from_pandera(model, name="t", target="y")


def test_custom_checks_and_checks_of_several_columns_are_refused() -> None:
    class Custom(pa.DataFrameModel):
        x: float
        y: float

        @pa.check("x")
        @classmethod
        def in_range(cls, data: Any) -> Any:
            return data.lazyframe.select(pl.col(data.key) > 0)

    class Several(pa.DataFrameModel):
        x: float
        y: float

        @pa.dataframe_check
        @classmethod
        def ordered(cls, data: Any) -> Any:
            return data.lazyframe.select(pl.col("x") < pl.col("y"))

    with pytest.raises(ValueError, match=r"Custom\.x: check in_range is not supported"):
        table_from_pandera(Custom, name="t", target="y")
    with pytest.raises(ValueError, match="Several: checks, parsers and `unique` over several columns"):
        table_from_pandera(Several, name="t", target="y")


def test_a_parquet_file_that_contradicts_the_table_is_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    rows = pl.concat([frame(YEAR_BUILT=year) for year in range(1900, 1910)])
    rows.write_parquet(good)
    pl.concat([rows, frame(PRICE=-5.0), frame(DECK=2), frame(DECK=3)]).write_parquet(bad)
    found, figures = schema_violations([str(good), str(bad)], HOUSING_TABLE, sample_rows=100)
    assert figures == {"rows": 23, "files": 2, "rows_validated": 23}
    assert found == [
        f"{bad}: PRICE is outside 0 <= value <= 1000000000 in 1 row, first value -5.0",
        f"{bad}: DECK is not one of 0, 1 in 2 rows, first value 2",
    ]
    assert schema_violations([str(good), str(bad)], HOUSING_TABLE, sample_rows=15)[1]["rows_validated"] == 15
    rows.drop("DECK").write_parquet(bad)
    assert schema_violations([str(bad)], HOUSING_TABLE, sample_rows=9)[0] == [f"{bad}: column DECK is missing"]
    rows.with_columns(pl.lit("x").alias("DECK")).write_parquet(bad)
    (problem,) = schema_violations([str(bad)], HOUSING_TABLE, sample_rows=9)[0]
    assert problem.startswith(f"{bad}: a column has another type")


def test_no_step_needs_pandera() -> None:
    program = (
        "import sys, step_scripts.validate_source, step_scripts.serve_model, step_scripts.data.csv_fragments;"
        "print('pandera' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
