"""A table's columns in Polars: their types, what their values may be, and from one type to another.

This is the only place that knows pandera's checks. `ColumnSpec.limits` carries them to the steps, into model artifacts
and to the endpoint, none of which needs pandera. A check that `_LIMITS` does not list is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl

from step_scripts.table.spec import ColumnSpec, DType, TableSpec

TIMESTAMP = pl.Datetime("us", "UTC")
_POLARS_TYPES: dict[DType, pl.DataType] = {
    "int64": pl.Int64(),
    "float64": pl.Float64(),
    "bool": pl.Boolean(),
    "string": pl.String(),
    "datetime": TIMESTAMP,
}
# Times as text: ISO 8601 in UTC with microseconds, so that the order of texts is that of times.
_TEXT_TIME = "%Y-%m-%dT%H:%M:%S%.6fZ"
VIOLATION_SCHEMA = {"row": pl.UInt32(), "column": pl.String(), "problem": pl.String()}

# From the arguments of a check of pandera to fields of `ColumnSpec`.
_LIMITS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "greater_than_or_equal_to": lambda check: {"ge": check["min_value"]},
    "greater_than": lambda check: {"gt": check["min_value"]},
    "less_than_or_equal_to": lambda check: {"le": check["max_value"]},
    "less_than": lambda check: {"lt": check["max_value"]},
    "in_range": lambda check: {
        "ge" if check["include_min"] else "gt": check["min_value"],
        "le" if check["include_max"] else "lt": check["max_value"],
    },
    "isin": lambda check: {"isin": tuple(check["allowed_values"])},
}
# What else a model may declare of a column, and the value that means nothing.
_PLAIN_COLUMN: dict[str, Any] = {"unique": False, "required": True, "regex": False, "default": None, "parsers": []}
_PLAIN_CHECK: dict[str, Any] = {"raise_warning": False, "ignore_na": True}


def table_from_pandera(model: Any, **roles: Any) -> TableSpec:
    """The table whose columns `model`, a `pandera.polars.DataFrameModel`, declares; `roles` as in `TableSpec`.

    Raises `ValueError` for a type, a check or an option that cannot be applied everywhere: nothing is ignored.
    """
    schema = model.to_schema()
    if schema.checks or schema.parsers or schema.unique:
        raise ValueError(f"{model.__name__}: checks, parsers and `unique` over several columns are not supported")
    columns = tuple(_column_from_pandera(model.__name__, column) for column in schema.columns.values())
    return TableSpec(columns=columns, **roles)


def _column_from_pandera(model: str, column: Any) -> ColumnSpec:
    where, native = f"{model}.{column.name}", column.dtype.type
    for dtype, candidate in _POLARS_TYPES.items():
        if native == candidate or (dtype == "datetime" and isinstance(native, pl.Datetime)):
            break
    else:
        raise ValueError(f"{where}: type {native} is none of {list(_POLARS_TYPES)}")
    _require_plain(where, column, _PLAIN_COLUMN)
    limits: dict[str, Any] = {}
    for check in column.checks:
        _require_plain(f"{where}: check {check.name}", check, _PLAIN_CHECK)
        try:
            found = _LIMITS[check.name](check.statistics)
        except KeyError as error:
            supported = "use ge, gt, le, lt, in_range or isin"
            raise ValueError(f"{where}: check {check.name} is not supported; {supported}") from error
        if twice := sorted(set(found) & set(limits)):
            raise ValueError(f"{where}: {', '.join(twice)} is given twice")
        limits |= found
    try:
        return ColumnSpec(
            name=column.name, dtype=dtype, description=column.description or "", nullable=column.nullable, **limits
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _require_plain(where: str, declared: Any, plain: Mapping[str, Any]) -> None:
    for option, value in plain.items():
        if getattr(declared, option) != value:
            raise ValueError(f"{where}: option {option}={getattr(declared, option)!r} is not supported")


def polars_schema(table: TableSpec) -> dict[str, pl.DataType]:
    """Polars types of the columns, in the schema's order."""
    return {column.name: _POLARS_TYPES[column.dtype] for column in table.columns}


def columns_as(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[pl.Expr]:
    """The columns `wanted`, by name and type, of a frame whose columns are `found`; null where it lacks one."""
    return [
        (converted(pl.col(name), found[name], kind) if name in found else pl.lit(None, kind)).alias(name)
        for name, kind in wanted.items()
    ]


def converted(column: pl.Expr, found: Any, wanted: Any) -> pl.Expr:
    """A column of type `found` in type `wanted`. Also between times and texts, and between truth values and 0 and 1."""
    if found == wanted:
        return column
    if found == pl.String() and isinstance(wanted, pl.Datetime):
        return column.str.to_datetime(_TEXT_TIME, time_unit="us", time_zone="UTC")
    if isinstance(found, pl.Datetime) and wanted == pl.String():
        return column.dt.strftime(_TEXT_TIME)
    if isinstance(found, pl.Datetime) and isinstance(wanted, pl.Datetime):
        return column.dt.replace_time_zone(wanted.time_zone).dt.cast_time_unit(wanted.time_unit or "us")
    return column.cast(wanted)


def read_csv(source: Any, **options: Any) -> pl.DataFrame:
    """`polars.read_csv`. Raises `polars.exceptions.ComputeError` also where Polars panics.

    A panic, as on a last field that is one quote, is no `Exception`, and would end whatever the reader is part of.
    """
    try:
        return pl.read_csv(source, **options)
    except pl.exceptions.PanicException as panic:
        raise pl.exceptions.ComputeError(f"Polars cannot read it: {panic}") from panic


def violations(frame: pl.DataFrame, table: TableSpec) -> pl.DataFrame:
    """Each cell of `frame` that the table does not permit: row (from 0), column and problem, column by column.

    The columns of `frame` have the types of the table.
    """
    problems = [
        (column.name, problem, wrong) for column in table.columns for problem, wrong in _problems(column, table)
    ]
    # One query, so that Polars looks through the columns in parallel.
    rows = frame.select(wrong.arg_true().implode().alias(str(i)) for i, (*_, wrong) in enumerate(problems)).row(0)
    found = [
        pl.DataFrame({"row": numbers, "column": column, "problem": problem}, schema=VIOLATION_SCHEMA)
        for (column, problem, _), numbers in zip(problems, rows, strict=True)
        if len(numbers)
    ]
    return pl.concat([pl.DataFrame(schema=VIOLATION_SCHEMA), *found])


def _problems(column: ColumnSpec, table: TableSpec) -> Sequence[tuple[str, pl.Expr]]:
    """What may be wrong with a cell of the column, and where it is."""
    cells = pl.col(column.name)
    problems = [("is empty, but a value is required", cells.is_null())] if table.requires(column) else []
    if column.dtype == "float64":
        problems.append(("is not a finite number", ~cells.is_finite()))
        cells = pl.when(cells.is_finite()).then(cells)
    if allowed := column.constraint():
        problem = f"is not {allowed}" if column.isin is not None else f"is outside {allowed}"
        problems.append((problem, ~column.limits.permit(cells)))
    return problems
