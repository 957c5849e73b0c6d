"""What a step knows of the table it works on: names, types, ranges and roles of the columns.

A `TableSpec` is plain data, so that it travels in a step's parameters and in a model artifact. It is derived from the
pandera model in `housing_assets/schema.py`, which stays the only place where columns are declared.
"""

from __future__ import annotations

import math
import operator
from functools import reduce
from typing import Any, Literal, NamedTuple

from pydantic import Field, FiniteFloat, model_validator

from step_scripts.runner.contract import FrozenModel

DType = Literal["int64", "float64", "bool", "string", "datetime"]
NUMERIC_DTYPES = frozenset({"int64", "float64", "bool"})


class ColumnRange(FrozenModel):
    """Bounds of one column that replace those of the schema. `None` removes the bound."""

    minimum: FiniteFloat | None = None
    maximum: FiniteFloat | None = None


class Limits(NamedTuple):
    """The values that a column may hold: from `low` to `high`, both included, or one of `allowed`.

    `None`: no such limit. Those of a whole-number column are whole numbers.
    """

    low: float | None = None
    high: float | None = None
    allowed: tuple[float | str, ...] | None = None

    def permit(self, values: Any) -> Any:
        """Whether a value is within the limits; of an array of numpy or a column of Polars, which of the values are.

        All of them compare alike, so that there is one rule for them. NaN is not permitted where there is a limit.
        """
        if self.allowed is not None:
            if hasattr(values, "is_in"):  # Polars looks them up in one go
                return values.is_in(self.allowed)
            return reduce(operator.or_, (values == value for value in self.allowed), values < values)
        if self.low is None:
            return values <= (self.high if self.high is not None else values)
        return values >= self.low if self.high is None else (values >= self.low) & (values <= self.high)


class ColumnSpec(FrozenModel):
    """One column. Bounds are inclusive (`ge`, `le`) or exclusive (`gt`, `lt`), in the column's own unit."""

    name: str
    dtype: DType
    description: str = ""
    nullable: bool = False
    ge: FiniteFloat | None = None
    gt: FiniteFloat | None = None
    le: FiniteFloat | None = None
    lt: FiniteFloat | None = None
    isin: tuple[FiniteFloat | str, ...] | None = None

    @model_validator(mode="after")
    def _limits_fit_the_type(self) -> ColumnSpec:
        """A limit that could not be applied is refused."""
        bounded = any(bound is not None for bound in (self.ge, self.gt, self.le, self.lt))
        numeric = self.dtype in ("int64", "float64")
        if bounded and not numeric:
            raise ValueError(f"column {self.name} of type {self.dtype} cannot have bounds")
        if self.isin is not None:
            texts = self.dtype == "string"
            if not (numeric or texts) or any(isinstance(value, str) != texts for value in self.isin):
                raise ValueError(f"column {self.name} of type {self.dtype} cannot hold one of {list(self.isin)}")
        return self

    @property
    def limits(self) -> Limits:
        """The limits in one form, whatever they were declared with."""
        if self.dtype == "int64":
            lows = [math.ceil(self.ge)] if self.ge is not None else []
            lows += [math.floor(self.gt) + 1] if self.gt is not None else []
            highs = [math.floor(self.le)] if self.le is not None else []
            highs += [math.ceil(self.lt) - 1] if self.lt is not None else []
            lows, highs = ([min(max(x, -(2**63)), 2**63 - 1) for x in bounds] for bounds in (lows, highs))
        else:
            lows = [self.ge] if self.ge is not None else []
            lows += [math.nextafter(self.gt, math.inf)] if self.gt is not None else []
            highs = [self.le] if self.le is not None else []
            highs += [math.nextafter(self.lt, -math.inf)] if self.lt is not None else []
        within = Limits(max(lows, default=None), min(highs, default=None))
        if self.isin is None:
            return Limits(0, 1) if self.dtype == "bool" else within
        if self.dtype == "string":
            return Limits(allowed=self.isin)
        allowed = tuple(value for value in self.isin if within.permit(value))
        # Polars looks for values of the column's own type.
        return Limits(allowed=tuple(int(v) for v in allowed if v == int(v)) if self.dtype == "int64" else allowed)

    def constraint(self) -> str:
        """The allowed values in words, for example `1700 <= value <= 2100`; empty if there is no limit."""
        if (allowed := self.limits.allowed) is not None:
            return "one of " + ", ".join(f"{v:.15g}" if isinstance(v, float) else str(v) for v in allowed)
        low = f"{self.ge:.15g} <= " if self.ge is not None else ""
        if self.gt is not None and (self.ge is None or self.gt >= self.ge):
            low = f"{self.gt:.15g} < "
        high = f" <= {self.le:.15g}" if self.le is not None else ""
        if self.lt is not None and (self.le is None or self.lt <= self.le):
            high = f" < {self.lt:.15g}"
        return f"{low}value{high}" if low or high else ""


class TableSpec(FrozenModel):
    """Columns and their roles.

    `key_columns` identify a record; if there are none, a record is identified by its content. `event_time_column` says
    when a row became true; if there is none, the modification time of its file does.
    """

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
        return {column.name: column for column in self.columns}[name]

    def requires(self, column: ColumnSpec) -> bool:
        """Whether each row must have a value: keys and event times always, whatever the schema says."""
        return not column.nullable or column.name in (*self.key_columns, self.event_time_column)

    def with_ranges(self, ranges: dict[str, ColumnRange]) -> TableSpec:
        """This table with other bounds for the columns named. Raises `ValueError` for a column that has none."""
        if unknown := sorted(set(ranges) - set(self.column_names)):
            raise ValueError(f"column_ranges names {unknown}, which the table lacks; it has {list(self.column_names)}")
        columns = []
        for column in self.columns:
            if (bounds := ranges.get(column.name)) is not None:
                limits = {"ge": bounds.minimum, "gt": None, "le": bounds.maximum, "lt": None}
                try:
                    column = ColumnSpec.model_validate({**column.model_dump(), **limits})
                except ValueError:
                    raise ValueError(f"column_ranges: {column.name} holds {column.dtype}, which has no range") from None
            columns.append(column)
        return self.model_copy(update={"columns": tuple(columns)})
