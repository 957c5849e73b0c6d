"""Means, variances and covariances that are gathered piece by piece and merged.

Both classes keep sums of squared deviations from the mean of their own rows, merged by the pairwise formula of Chan,
Golub and LeVeque ("Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979). Sums of squares
of raw values would cancel when the mean is large against the spread, as it is for years and prices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def without_nan(values: np.ndarray) -> np.ndarray:
    """The values of a float array that are not NaN; the array itself if all are."""
    # The sum is NaN if any value is, or if there are infinities of both signs.
    return values[~np.isnan(values)] if np.isnan(values.sum()) else values


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of each column; NaN values are left out. Arrays of shape (columns,).

    The mean is kept as `origin + offset`, where the origin is one of the column's values: differences of means then
    keep their digits however large the values are against their spread.
    """

    count: np.ndarray
    origin: np.ndarray
    offset: np.ndarray
    squares: np.ndarray

    @classmethod
    def empty(cls, columns: int) -> Moments:
        """Of no rows."""
        return cls(np.zeros(columns), np.zeros(columns), np.zeros(columns), np.zeros(columns))

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Of a float64 array of shape (rows, columns)."""
        parts = [_moments_of_column(without_nan(column)) for column in values.T]
        return cls(*np.array(parts, dtype=np.float64).reshape(-1, 4).T)

    def merge(self, other: Moments) -> Moments:
        """Of the rows of both."""
        count = self.count + other.count
        share = np.divide(other.count, count, out=np.zeros_like(count), where=count > 0)
        delta = (other.origin - self.origin) + (other.offset - self.offset)
        none_here, both = self.count == 0, (self.count > 0) & (other.count > 0)
        return Moments(
            count,
            np.where(none_here, other.origin, self.origin),
            np.where(none_here, other.offset, self.offset + np.where(both, delta * share, 0.0)),
            self.squares + other.squares + np.where(both, delta * delta * self.count * share, 0.0),
        )

    @property
    def mean(self) -> np.ndarray:
        """Means; NaN for a column without values."""
        return np.where(self.count > 0, self.origin + self.offset, np.nan)

    @property
    def deviation(self) -> np.ndarray:
        """Population standard deviations; NaN for a column without values."""
        variance = np.divide(self.squares, self.count, out=np.full_like(self.squares, np.nan), where=self.count > 0)
        return np.sqrt(variance)


def _moments_of_column(values: np.ndarray) -> tuple[float, float, float, float]:
    if not values.size:
        return 0.0, 0.0, 0.0, 0.0
    origin = float(values[0])
    distances = values - origin
    offset = float(distances.mean())
    return float(values.size), origin, offset, float(np.square(distances - offset).sum())


@dataclass(frozen=True)
class CoMoments:
    """Number of rows, mean of each column, and sums of products of deviations, of shape (columns, columns)."""

    count: int
    mean: np.ndarray
    products: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> CoMoments:
        """Of a float64 array of shape (rows, columns) without NaN."""
        if not len(values):
            return cls(0, np.zeros(values.shape[1]), np.zeros((values.shape[1], values.shape[1])))
        mean = values.mean(axis=0)
        deviations = values - mean
        return cls(len(values), mean, deviations.T @ deviations)

    def merge(self, other: CoMoments) -> CoMoments:
        """Of the rows of both."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        share = other.count / count
        products = self.products + other.products + np.outer(delta, delta) * (self.count * share)
        return CoMoments(count, self.mean + delta * share, products)
