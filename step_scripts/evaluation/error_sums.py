"""Errors of predictions, of all rows and of groups of rows: sums that merge, and the figures that follow from them.

An error is prediction minus actual value, a residual is actual value minus prediction, both in the target's unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from step_scripts.parameters import Slice
from step_scripts.runner.contract import StepError
from step_scripts.table.spec import TableSpec

_MOST_GROUPS = 200
_MISSING = -(2**62)


class ErrorSums(NamedTuple):
    """Sums over rows. Percentage errors are fractions of the actual value; rows whose actual value is 0 have none."""

    rows: int
    error: float
    absolute: float
    squared: float
    percentage: float
    percentage_rows: int
    largest: float

    @classmethod
    def of(cls, actual: np.ndarray, predicted: np.ndarray) -> ErrorSums:
        """Of float64 arrays of shape (rows,)."""
        error = predicted - actual
        absolute = np.abs(error)
        usable = actual != 0
        return cls(
            rows=len(error),
            error=float(error.sum()),
            absolute=float(absolute.sum()),
            squared=float(np.square(error).sum()),
            percentage=float((absolute[usable] / np.abs(actual[usable])).sum()),
            percentage_rows=int(usable.sum()),
            largest=float(absolute.max(initial=0.0)),
        )

    def merge(self, other: ErrorSums) -> ErrorSums:
        """Of the rows of both."""
        sums = [mine + others for mine, others in zip(self[:-1], other[:-1], strict=True)]
        return ErrorSums._make([*sums, max(self.largest, other.largest)])

    @property
    def rmse(self) -> float:
        """Root of the mean squared error."""
        return math.sqrt(self.squared / self.rows)

    def figures(self) -> dict[str, float]:
        """The metrics that follow from the sums. `bias` is positive if predictions are too high.

        `mape`, a fraction, is NaN if all actual values are 0.
        """
        return {
            "rmse": self.rmse,
            "mse": self.squared / self.rows,
            "mae": self.absolute / self.rows,
            "mape": self.percentage / self.percentage_rows if self.percentage_rows else math.nan,
            "max_error": self.largest,
            "bias": self.error / self.rows,
        }


def merged(first: Mapping[Any, ErrorSums], second: Mapping[Any, ErrorSums]) -> dict[Any, ErrorSums]:
    """Sums of the rows of both, by key."""
    return {**first, **{key: sums.merge(first[key]) if key in first else sums for key, sums in second.items()}}


def standard_deviations(actual: np.ndarray, predicted: np.ndarray, rows: int) -> dict[str, float]:
    """Standard deviations of mse, rmse, mae, mape, r2 and bias as estimates, by the delta method.

    The test rows are taken as a random sample: a mean over n rows has the standard deviation of its terms, divided by
    the root of n; a smooth function of means has that of its linear approximation. `actual` and `predicted` are all
    rows, or a sample of them; `rows` is the number of all. Undefined values are NaN.
    """
    names = ("mse", "rmse", "mae", "mape", "r2", "bias")
    if len(actual) < 2:
        return dict.fromkeys(names, float("nan"))
    error = predicted - actual
    squared = np.square(error)
    spread = np.square(actual - actual.mean())
    usable = actual != 0
    percentages = np.abs(error[usable] / actual[usable])

    def of_mean(terms: np.ndarray) -> float:
        return float(terms.std(ddof=1) / np.sqrt(rows * len(terms) / len(actual))) if len(terms) > 1 else float("nan")

    mse = of_mean(squared)
    rmse = float(np.sqrt(squared.mean()))
    variance = float(spread.mean())
    r2 = of_mean(squared - squared.mean() / variance * spread) / variance if variance else float("nan")
    return {
        "mse": mse,
        "rmse": mse / (2 * rmse) if rmse else 0.0,
        "mae": of_mean(np.abs(error)),
        "mape": of_mean(percentages),
        "r2": r2,
        "bias": of_mean(error),
    }


class Grouping(Slice):
    """How the values of a column are grouped: at `edges`, each the upper end of a group, or in bins of `width`."""

    edges: tuple[float, ...] = ()
    whole_numbers: bool = False

    def sums(self, values: np.ndarray, actual: np.ndarray, predicted: np.ndarray) -> dict[int, ErrorSums]:
        """Errors of each group; the keys are in the order of the values. Raises `StepError` if there are too many."""
        if self.width is None:
            keys = np.searchsorted(np.asarray(self.edges), values, side="left").astype(np.int64)
        else:
            keys = np.floor(np.nan_to_num(values) / self.width).astype(np.int64)
        keys[np.isnan(values)] = _MISSING
        found, group = np.unique(keys, return_inverse=True)
        self.require_few(len(found))
        return {int(key): ErrorSums.of(actual[group == i], predicted[group == i]) for i, key in enumerate(found)}

    def require_few(self, groups: int) -> None:
        """Raise `StepError` if there are more groups than can be read."""
        if groups > _MOST_GROUPS:
            raise StepError(
                f"slice {self.name!r}: column {self.column} with width {self.width:g} makes more than "
                f"{_MOST_GROUPS} groups; choose a larger width, or bands"
            )

    def label(self, key: int) -> str:
        """The group in words, for example `1990 to 1999` or `over 550,000`."""
        if key == _MISSING:
            return "missing"
        if self.width is not None:
            low, high = key * self.width, (key + 1) * self.width
            if self.whole_numbers and float(self.width).is_integer():
                return _number(low) if self.width == 1 else f"{_number(low)} to {_number(high - 1)}"
            return f"{_number(low)} to below {_number(high)}"
        if not self.edges:
            return "all"
        if key == 0:
            return f"up to {_number(self.edges[0])}"
        if key == len(self.edges):
            return f"over {_number(self.edges[-1])}"
        return f"over {_number(self.edges[key - 1])} to {_number(self.edges[key])}"


def _number(value: float) -> str:
    """A number for people: four significant digits, or whole with thousands separated from 10,000 on."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def groupings(slices: Sequence[Slice], table: TableSpec, banded: Mapping[str, np.ndarray]) -> tuple[Grouping, ...]:
    """One grouping a slice. `banded` holds a sample of each column that is cut into bands."""
    made = []
    for item in slices:
        whole = table.column(item.column).dtype == "int64"
        edges: tuple[float, ...] = ()
        if item.bands is not None:
            values = banded[item.column]
            values = values[~np.isnan(values)]
            inner = np.arange(1, item.bands) / item.bands
            edges = tuple(np.unique(np.quantile(values, inner)).tolist()) if len(values) else ()
            # An edge at the maximum would leave nothing above it.
            edges = tuple(edge for edge in edges if edge < values.max())
        made.append(Grouping(**item.model_dump(), edges=edges, whole_numbers=whole))
    return tuple(made)
