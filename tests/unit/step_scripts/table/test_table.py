"""The pandera schema, the table derived from it, and the schema rebuilt from the table."""

from __future__ import annotations

import operator
from typing import Any

import pandera.polars as pa
import polars as pl
import pytest
from pandera.errors import SchemaErrors

from housing_assets.schema import HOUSING_TABLE, HouseSale
from step_scripts.table.spec import ColumnRange, ColumnSpec, DType, TableSpec
from step_scripts.table.validation import pandera_schema, polars_schema, table_from_pandera

ROW = {
    "PRICE": 1.0, "YEAR_BUILT": 1872, "SQUARE_FEET": 334.0, "NUM_BEDROOMS": 0, "NUM_BATHROOMS": 3.5,
    "LOT_ACRES": 5.0, "GARAGE_SPACES": 0, "FRONT_PORCH": 1, "DECK": 0,
}  # fmt: skip


def frame(**changes: object) -> pl.DataFrame:
    return pl.DataFrame([ROW | changes], schema=polars_schema(HOUSING_TABLE))


def limits(column: pa.Column) -> dict[str, Any]:
    """The statistics of its checks by name; a range is two limits."""
    found = {check.name: dict(check.statistics) for check in column.checks}
    if range_ := found.pop("in_range", None):
        low = "greater_than_or_equal_to" if range_["include_min"] else "greater_than"
        high = "less_than_or_equal_to" if range_["include_max"] else "less_than"
        found |= {low: {"min_value": range_["min_value"]}, high: {"max_value": range_["max_value"]}}
    return found


@pytest.mark.parametrize("dtype", ["int64", "float64"])
@pytest.mark.parametrize("low", [{}, {"ge": 0.0}, {"gt": 0.0}, {"gt": 0.5}, {"ge": 0.0, "gt": 1.0}])
@pytest.mark.parametrize("high", [{}, {"le": 2.0}, {"lt": 2.0}, {"lt": 1.5}, {"le": -3.0}, {"le": 2.0, "lt": 1.0}])
def test_limits_are_those_of_the_table(dtype: DType, low: dict[str, float], high: dict[str, float]) -> None:
    limited = ColumnSpec.model_validate({"name": "x", "dtype": dtype, **low, **high})
    columns = (limited, ColumnSpec(name="y", dtype="float64"))
    table = TableSpec(name="numbers", columns=columns, target="y")
    values = [value for value in (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0) if dtype == "float64" or value.is_integer()]
    compare = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
    outside = [v for v in values if not all(compare[name](v, bound) for name, bound in (low | high).items())]
    rows = pl.DataFrame({"x": values, "y": [0.0] * len(values)}).cast(pl.Schema(polars_schema(table)))
    try:
        pandera_schema(table).validate(rows, lazy=True)
        found = []
    except SchemaErrors as errors:
        found = sorted({values[index] for index in errors.failure_cases["index"]})
    assert found == outside


def test_the_table_carries_everything_that_the_schema_declares() -> None:
    again = pandera_schema(TableSpec.model_validate_json(HOUSING_TABLE.model_dump_json()))
    original = HouseSale.to_schema()
    assert list(again.columns) == list(original.columns)
    for name, column in original.columns.items():
        other = again.columns[name]
        assert other.dtype == column.dtype
        assert other.nullable == column.nullable
        assert limits(other) == limits(column)


def test_features_are_all_columns_but_the_target() -> None:
    assert HOUSING_TABLE.target == "PRICE"
    assert HOUSING_TABLE.features == HOUSING_TABLE.column_names[1:]


@pytest.mark.parametrize(
    ("changes", "valid"),
    [
        ({}, True),
        ({"NUM_BEDROOMS": 8}, True),
        ({"PRICE": -1.0}, False),
        ({"YEAR_BUILT": 1599}, False),
        ({"SQUARE_FEET": 0.0}, False),
        ({"DECK": 2}, False),
        ({"PRICE": None}, False),
    ],
)
def test_both_schemas_accept_and_refuse_the_same_rows(changes: dict[str, object], valid: bool) -> None:
    for schema in (HouseSale.to_schema(), pandera_schema(HOUSING_TABLE)):
        try:
            schema.validate(frame(**changes), lazy=True)
            accepted = True
        except pa.errors.SchemaErrors:
            accepted = False
        assert accepted == valid


def test_configured_ranges_replace_those_of_the_schema() -> None:
    table = HOUSING_TABLE.with_ranges({"PRICE": ColumnRange(minimum=-100.0)})
    assert table.column("PRICE").constraint() == "-100 <= value"
    pandera_schema(table).validate(frame(PRICE=-100.0), lazy=True)
    with pytest.raises(ValueError, match=r"column_ranges names \['PRIZE'\].*it has \['PRICE'"):
        HOUSING_TABLE.with_ranges({"PRIZE": ColumnRange()})


def test_what_a_table_cannot_carry_is_refused() -> None:
    class Custom(pa.DataFrameModel):
        a: float = pa.Field(str_length={"max_value": 3})
        b: float

    class Text(pa.DataFrameModel):
        a: float
        b: str

    with pytest.raises(ValueError, match=r"Custom\.a: check str_length is not supported"):
        table_from_pandera(Custom, name="t", target="b")
    with pytest.raises(ValueError, match=r"columns \['b'\].*are not numeric"):
        table_from_pandera(Text, name="t", target="a")
    with pytest.raises(ValueError, match=r"has no column \['c'\]"):
        table_from_pandera(Text, name="t", target="c")
    assert table_from_pandera(Text, name="t", target="a", key_columns=("b",)).features == ()
