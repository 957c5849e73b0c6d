"""What a table may be."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from housing_assets.schema import HOUSING_TABLE
from step_scripts.table.spec import ColumnSpec, TableSpec

NUMBER, TEXT = ColumnSpec(name="a", dtype="float64"), ColumnSpec(name="b", dtype="string")


def test_features_are_all_columns_but_the_target() -> None:
    assert HOUSING_TABLE.target == "PRICE"
    assert HOUSING_TABLE.features == HOUSING_TABLE.column_names[1:]
    keyed = TableSpec(name="t", columns=(NUMBER, TEXT), target="a", key_columns=("b",))
    assert keyed.features == ()


def test_roles_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"columns \['b'\].*are not numeric"):
        TableSpec(name="t", columns=(NUMBER, TEXT), target="a")
    with pytest.raises(ValidationError, match=r"has no column \['c'\]"):
        TableSpec(name="t", columns=(NUMBER, TEXT), target="c")
    with pytest.raises(ValidationError, match="declares a column twice"):
        TableSpec(name="t", columns=(NUMBER, NUMBER), target="a")
