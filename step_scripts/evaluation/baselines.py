"""Predictors that a model has to beat: the mean of the training split, and a linear model fitted on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from step_scripts.table.moments import CoMoments

# Correlations are known to about 1e-13 after accumulation; directions weaker than this are duplicates of others.
_SINGULAR = 1e-10
_ROUNDING = 1e-12


@dataclass(frozen=True)
class LinearModel:
    """`intercept + features @ coefficients`."""

    features: tuple[str, ...]
    coefficients: np.ndarray
    intercept: float

    def predict(self, values: np.ndarray) -> np.ndarray:
        """Predictions for a float64 array of shape (rows, features) without NaN."""
        return values @ self.coefficients + self.intercept


def least_squares(moments: CoMoments, features: Sequence[str]) -> LinearModel:
    """The linear model of least squared error of the last column on all others.

    Solved on standardized columns. Columns that are constant, or linear functions of others, make the system singular;
    then it is the solution with the smallest coefficients.
    """
    scale = np.sqrt(np.diag(moments.products))
    # What varies by no more than rounding is constant.
    rounding = _ROUNDING * np.sqrt(moments.count) * np.abs(moments.mean[:-1])
    used = np.flatnonzero(scale[:-1] > rounding)
    coefficients = np.zeros(len(features))
    if used.size:
        correlation = moments.products[np.ix_(used, used)] / np.outer(scale[used], scale[used])
        with_target = moments.products[used, -1] / scale[used]
        solution, *_ = np.linalg.lstsq(correlation, with_target, rcond=_SINGULAR)
        coefficients[used] = solution / scale[used]
    intercept = float(moments.mean[-1] - moments.mean[:-1] @ coefficients)
    return LinearModel(tuple(features), coefficients, intercept)


def filled_matrix(frame: pl.DataFrame, features: Sequence[str], means: np.ndarray) -> np.ndarray:
    """The features as float64, shape (rows, features), with nulls and NaN replaced by `means`."""
    values = frame.select(pl.col(features).cast(pl.Float64)).to_numpy()
    return np.where(np.isnan(values), means, values)


def co_moments(frame: pl.DataFrame, features: Sequence[str], target: str, means: np.ndarray) -> CoMoments:
    """Co-moments of the features (nulls replaced by `means`) and, last, the target.

    Rows without a target are left out.
    """
    frame = frame.cast({target: pl.Float64}).filter(pl.col(target).is_finite())
    return CoMoments.of(np.column_stack([filled_matrix(frame, features, means), frame[target].to_numpy()]))
