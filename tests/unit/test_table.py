"""The pandera schema, the table derived from it, and the schema rebuilt from the table."""

from __future__ import annotations

import pandera.polars as pa
import polars as pl
import pytest

from housing_assets.schema import HOUSING_TABLE, HouseSale
from step_scripts.table import ColumnRange, TableSpec
from step_scripts.validation import pandera_schema, polars_schema, table_from_pandera

ROW = {
    "PRICE": 1.0, "YEAR_BUILT": 1872, "SQUARE_FEET": 334.0, "NUM_BEDROOMS": 0, "NUM_BATHROOMS": 3.5,
    "LOT_ACRES": 5.0, "GARAGE_SPACES": 0, "FRONT_PORCH": 1, "DECK": 0,
}  # fmt: skip


def frame(**changes: object) -> pl.DataFrame:
    return pl.DataFrame([ROW | changes], schema=polars_schema(HOUSING_TABLE))


def test_the_table_carries_everything_that_the_schema_declares() -> None:
    again = pandera_schema(TableSpec.model_validate_json(HOUSING_TABLE.model_dump_json()))
    original = HouseSale.to_schema()
    assert list(again.columns) == list(original.columns)
    for name, column in original.columns.items():
        other = again.columns[name]
        assert other.dtype == column.dtype
        assert other.nullable == column.nullable
        assert {c.name: c.statistics for c in other.checks} == {c.name: c.statistics for c in column.checks}


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
