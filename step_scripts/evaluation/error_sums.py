"""Errors of predictions: sums that merge, and the figures that follow from them.

An error is prediction minus actual value, a residual is actual value minus prediction, both in the target's unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ErrorSums:
    """Sums over rows. Percentage errors are fractions of the actual value; rows whose actual value is 0 have none."""

    rows: int = 0
    error: float = 0.0
    absolute: float = 0.0
    squared: float = 0.0
    largest: float = 0.0
    percentage: float = 0.0
    percentage_rows: int = 0

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
            largest=float(absolute.max(initial=0.0)),
            percentage=float((absolute[usable] / np.abs(actual[usable])).sum()),
            percentage_rows=int(usable.sum()),
        )

    def merge(self, other: ErrorSums) -> ErrorSums:
        """Of the rows of both."""
        return ErrorSums(
            self.rows + other.rows,
            self.error + other.error,
            self.absolute + other.absolute,
            self.squared + other.squared,
            max(self.largest, other.largest),
            self.percentage + other.percentage,
            self.percentage_rows + other.percentage_rows,
        )

    @property
    def mse(self) -> float:
        """Mean squared error."""
        return self.squared / self.rows

    @property
    def rmse(self) -> float:
        """Root of the mean squared error."""
        return float(np.sqrt(self.mse))

    @property
    def mae(self) -> float:
        """Mean absolute error."""
        return self.absolute / self.rows

    @property
    def bias(self) -> float:
        """Mean error; positive if predictions are too high."""
        return self.error / self.rows

    @property
    def mape(self) -> float:
        """Mean absolute percentage error, as a fraction; NaN if all actual values are 0."""
        return self.percentage / self.percentage_rows if self.percentage_rows else float("nan")


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
