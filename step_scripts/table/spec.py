"""What a step knows of the table it works on: names, types, ranges and roles of the columns.

A `TableSpec` is plain data, so that it travels in a step's parameters and in a model artifact. It is derived from the
pandera schema in `housing_assets/schema.py`, which stays the only place where columns are declared.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DType = Literal["int64", "float64", "bool", "string", "datetime"]
NUMERIC_DTYPES = frozenset({"int64", "float64", "bool"})


class ColumnRange(BaseModel):
    """Bounds of one column that replace those of the schema. `None` removes the bound."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    minimum: float | None = None
    maximum: float | None = None


class ColumnSpec(BaseModel):
    """One column. Bounds are inclusive (`ge`, `le`) or exclusive (`gt`, `lt`), in the column's own unit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: DType
    description: str = ""
    nullable: bool = False
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    isin: tuple[float | str, ...] | None = None

    def constraint(self) -> str:
        """The allowed values in words, for example `1700 <= value <= 2100`; empty if there is no limit."""
        if self.isin is not None:
            return "one of " + ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in self.isin)
        low = f"{self.ge:.15g} <= " if self.ge is not None else f"{self.gt:.15g} < " if self.gt is not None else ""
        high = f" <= {self.le:.15g}" if self.le is not None else f" < {self.lt:.15g}" if self.lt is not None else ""
        return f"{low}value{high}" if low or high else ""


class TableSpec(BaseModel):
    """Columns and their roles.

    `key_columns` identify a record; if there are none, a record is identified by its content. `event_time_column` says
    when a row became true; if there is none, the modification time of its file does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    columns: tuple[ColumnSpec, ...] = Field(min_length=2)
    target: str
    key_columns: tuple[str, ...] = ()
    event_time_column: str | None = None

    @model_validator(mode="after")
    def _roles_name_columns(self) -> TableSpec:
        names = self.column_names
        if len(set(names)) != len(names):
            raise ValueError(f"table {self.name!r} declares a column twice: {list(names)}")
        roles = [self.target, *self.key_columns, *([self.event_time_column] if self.event_time_column else [])]
        if missing := [name for name in roles if name not in names]:
            raise ValueError(f"table {self.name!r} has no column {missing}; it has {list(names)}")
        modelled = {*self.features, self.target}
        if text := [c.name for c in self.columns if c.name in modelled and c.dtype not in NUMERIC_DTYPES]:
            raise ValueError(f"columns {text} of table {self.name!r} are not numeric: make them keys, or encode them")
        return self

    @property
    def column_names(self) -> tuple[str, ...]:
        """All columns, in the schema's order."""
        return tuple(c.name for c in self.columns)

    @property
    def features(self) -> tuple[str, ...]:
        """The model's inputs, in the schema's order: every column that is neither target, key nor event time."""
        return tuple(n for n in self.column_names if n not in (self.target, *self.key_columns, self.event_time_column))

    def column(self, name: str) -> ColumnSpec:
        """The column called `name`. Raises `KeyError` if there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)

    def with_ranges(self, ranges: dict[str, ColumnRange]) -> TableSpec:
        """This table with other bounds for the columns named. Raises `ValueError` for a column it does not have."""
        if unknown := sorted(set(ranges) - set(self.column_names)):
            raise ValueError(f"column_ranges names {unknown}, which the table lacks; it has {list(self.column_names)}")
        columns = tuple(
            c.model_copy(update={"ge": ranges[c.name].minimum, "gt": None, "le": ranges[c.name].maximum, "lt": None})
            if c.name in ranges
            else c
            for c in self.columns
        )
        return self.model_copy(update={"columns": columns})
