"""Between pandera and `TableSpec`: the schema as plain data, and the plain data as a schema for batches."""

from __future__ import annotations

from typing import Any

import pandera.polars as pa
import polars as pl

from step_scripts.table.column_types import POLARS_TYPES
from step_scripts.table.column_types import polars_schema as polars_schema  # part of this module's interface
from step_scripts.table.spec import ColumnSpec, TableSpec

_BOUNDS = {
    "greater_than_or_equal_to": ("ge", "min_value"),
    "greater_than": ("gt", "min_value"),
    "less_than_or_equal_to": ("le", "max_value"),
    "less_than": ("lt", "max_value"),
}


def table_from_pandera(
    model: type[pa.DataFrameModel],
    *,
    name: str,
    target: str,
    key_columns: tuple[str, ...] = (),
    event_time_column: str | None = None,
) -> TableSpec:
    """The table that a pandera model declares.

    Raises `ValueError` for a type or a check that a `TableSpec` cannot carry: nothing is dropped in silence.
    """
    schema = model.to_schema()
    if schema.checks:
        raise ValueError(f"{model.__name__}: checks over several columns cannot be carried to the steps")
    columns = tuple(_column_from_pandera(model.__name__, column) for column in schema.columns.values())
    return TableSpec(
        name=name, columns=columns, target=target, key_columns=key_columns, event_time_column=event_time_column
    )


def _column_from_pandera(owner: str, column: Any) -> ColumnSpec:
    native = column.dtype.type
    for dtype, candidate in POLARS_TYPES.items():
        if native == candidate or (dtype == "datetime" and isinstance(native, pl.Datetime)):
            break
    else:
        raise ValueError(f"{owner}.{column.name}: type {native} is none of {list(POLARS_TYPES)}")
    limits: dict[str, Any] = {}
    for check in column.checks:
        if check.name in _BOUNDS:
            field, statistic = _BOUNDS[check.name]
            limits[field] = check.statistics[statistic]
        elif check.name == "in_range":
            s = check.statistics
            limits["ge" if s.get("include_min", True) else "gt"] = s["min_value"]
            limits["le" if s.get("include_max", True) else "lt"] = s["max_value"]
        elif check.name == "isin":
            limits["isin"] = tuple(check.statistics["allowed_values"])
        else:
            raise ValueError(f"{owner}.{column.name}: check {check.name} is not supported; use ge, gt, le, lt or isin")
    return ColumnSpec(
        name=column.name, dtype=dtype, description=column.description or "", nullable=column.nullable, **limits
    )


def pandera_schema(table: TableSpec) -> pa.DataFrameSchema:
    """The pandera schema of `table`, for batches whose columns already have its types."""
    columns = {
        column.name: pa.Column(POLARS_TYPES[column.dtype], checks=_checks(column), nullable=column.nullable)
        for column in table.columns
    }
    return pa.DataFrameSchema(columns, strict=True)


def _checks(column: ColumnSpec) -> list[pa.Check]:
    whole = column.dtype == "int64"
    # A bound that is no whole number would have Polars cast a column of them first.
    bounds = {
        name: int(bound) if whole and float(bound).is_integer() else bound
        for name in ("ge", "gt", "le", "lt")
        if (bound := getattr(column, name)) is not None
    }
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    checks: list[pa.Check] = []
    if len(bounds) == 2 and low is not None and high is not None and low < high:
        # One pass over the column instead of two.
        checks.append(pa.Check.in_range(low, high, include_min="ge" in bounds, include_max="le" in bounds))
    else:
        checks += [getattr(pa.Check, name)(bound) for name, bound in bounds.items()]
    if column.isin is not None:
        # Polars compares members of a list only with values of the very same type.
        checks.append(pa.Check.isin([int(v) if whole else v for v in column.isin]))
    return checks
