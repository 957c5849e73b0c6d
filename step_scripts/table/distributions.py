"""Statistics of columns that are gathered block by block and merged: moments, samples, distributions.

A distribution is a small JSON object. One of at most 64 distinct values is exact:
`{"kind": "counts", "rows": n, "missing": m, "values": [...], "counts": [...]}`. Any other is
`{"kind": "quantiles", "rows": n, "missing": m, "points": [...]}` with 257 points: minimum, 1/256 … 255/256 quantiles,
maximum. The quantiles are those of a sample of at most `SAMPLE_ROWS` rows, chosen by a hash of the record, so that they
do not depend on how the rows are divided; minimum and maximum are exact. `missing` counts nulls and NaN, which are not
part of `rows`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Distribution = dict[str, Any]

SAMPLE_ROWS = 20_000
MOST_VALUES = 64
_POINTS = 257
# Population stability index: up to this many distinct values, each is a bin of its own.
_MOST_CATEGORIES = 20
_PSEUDO_COUNT = 0.5


def _without_nan(values: np.ndarray) -> np.ndarray:
    """The values of a float array that are not NaN; the array itself if all are."""
    # The sum is NaN if any value is, or if there are infinities of both signs.
    return values[~np.isnan(values)] if np.isnan(values.sum()) else values


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of each column; NaN values are left out. Arrays of shape (columns,).

    Sums of squares of raw values would cancel when the mean is large against the spread, as it is for years and prices.
    The mean is kept as `origin + offset`, where the origin is one of the column's values: differences of means then
    keep their digits, too.
    """

    count: np.ndarray
    origin: np.ndarray
    offset: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Of a float64 array of shape (rows, columns)."""
        found = np.zeros((4, values.shape[1]))
        for index, column in enumerate(values.T):
            if (present := _without_nan(column)).size:
                distances = present - present[0]
                offset = distances.mean()
                found[:, index] = present.size, present[0], offset, np.square(distances - offset).sum()
        return cls(*found)

    def merge(self, other: Moments) -> Moments:
        """Of the rows of both, by the pairwise formula of Chan, Golub and LeVeque (1979)."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        delta = (other.origin - self.origin) + (other.offset - self.offset)
        return Moments(
            count,
            np.where(self.count > 0, self.origin, other.origin),
            np.where(self.count > 0, self.offset + np.where(other.count > 0, delta * share, 0.0), other.offset),
            self.squares + other.squares + delta * delta * self.count * share,
        )

    @property
    def mean(self) -> np.ndarray:
        """Means; NaN for a column without values."""
        return np.where(self.count > 0, self.origin + self.offset, np.nan)

    @property
    def deviation(self) -> np.ndarray:
        """Population standard deviations; NaN for a column without values."""
        return np.sqrt(
            np.divide(self.squares, self.count, out=np.full_like(self.squares, np.nan), where=self.count > 0)
        )


@dataclass(frozen=True)
class Sample:
    """At most `size` rows: those with the smallest hashes, whatever blocks they come from.

    `hashes` has shape (rows,) and holds numbers that are uniform and independent of the rows' values; `values` has
    shape (rows, columns).
    """

    size: int
    hashes: np.ndarray
    values: np.ndarray

    def merge(self, *others: Sample) -> Sample:
        """Of the rows of all."""
        hashes = np.concatenate([self.hashes, *(other.hashes for other in others)])
        values = np.concatenate([self.values, *(other.values for other in others)])
        if len(hashes) <= self.size:
            return Sample(self.size, hashes, values)
        kept = np.argpartition(hashes, self.size - 1)[: self.size]
        return Sample(self.size, hashes[kept], values[kept])


@dataclass(frozen=True)
class TableSketch:
    """What is exact about columns, and a sample of the rows.

    Of each column: rows with a value and without, smallest, largest, counts of its values if they are few.
    """

    rows: np.ndarray
    missing: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray
    counts: tuple[Counter[float] | None, ...]
    sample: Sample

    @classmethod
    def empty(cls, columns: int) -> TableSketch:
        """Of no rows."""
        return cls.of(np.empty((0, columns)), np.empty(0))

    @classmethod
    def of(cls, values: np.ndarray, hashes: np.ndarray, size: int = SAMPLE_ROWS) -> TableSketch:
        """Of float64 `values` of shape (rows, columns), with one hash a row, and a sample of at most `size` rows."""
        columns = [_without_nan(column) for column in values.T]
        rows = np.array([len(column) for column in columns], np.int64)
        return cls(
            rows=rows,
            missing=len(values) - rows,
            minimum=np.array([column.min(initial=np.inf) for column in columns]),
            maximum=np.array([column.max(initial=-np.inf) for column in columns]),
            counts=tuple(map(_counts, columns)),
            sample=Sample(size, hashes, values).merge(),
        )

    def merge(self, other: TableSketch) -> TableSketch:
        """Of the rows of both."""
        both = [None if a is None or b is None else a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return TableSketch(
            rows=self.rows + other.rows,
            missing=self.missing + other.missing,
            minimum=np.minimum(self.minimum, other.minimum),
            maximum=np.maximum(self.maximum, other.maximum),
            counts=tuple(None if counts is None or len(counts) > MOST_VALUES else counts for counts in both),
            sample=self.sample.merge(other.sample),
        )

    def distributions(self, names: Sequence[str]) -> dict[str, Distribution]:
        """One distribution a column, under the names given."""
        return {name: self._distribution(column) for column, name in enumerate(names)}

    def _distribution(self, column: int) -> Distribution:
        common = {"rows": int(self.rows[column]), "missing": int(self.missing[column])}
        if (counts := self.counts[column]) is not None:
            values = sorted(counts)
            return {"kind": "counts", **common, "values": values, "counts": [counts[value] for value in values]}
        present = _without_nan(self.sample.values[:, column])
        points = np.quantile(present, np.linspace(0, 1, _POINTS)) if len(present) else np.empty(_POINTS)
        points[0], points[-1] = self.minimum[column], self.maximum[column]
        return {"kind": "quantiles", **common, "points": points.tolist()}


def _counts(values: np.ndarray) -> Counter[float] | None:
    """How often there is each of the values, if they are few."""
    if len(np.unique(values[:1000])) > MOST_VALUES:  # spares counting what is continuous anyway
        return None
    import polars as pl  # here, because asset checks use this module without it

    counted = pl.Series("value", values).value_counts()  # numpy sorts
    # Adding zero makes -0.0 the same text as 0.0; Polars leaves such an addition out.
    return Counter({v + 0.0: n for v, n in counted.rows()}) if counted.height <= MOST_VALUES else None


def distribution_of(values: np.ndarray) -> Distribution:
    """The distribution of a float array of shape (rows,), its quantiles from all values."""
    column = np.asarray(values, dtype=np.float64)[:, np.newaxis]
    return TableSketch.of(column, np.zeros(len(column)), len(column)).distributions([""])[""]


def quantile(distribution: Distribution, fraction: float) -> float:
    """The value that `fraction` of the rows do not exceed; NaN without rows."""
    if not distribution["rows"]:
        return float("nan")
    if distribution["kind"] == "counts":
        reached = np.cumsum(distribution["counts"]) / distribution["rows"]
        # The tolerance keeps a sum such as 0.1 + 0.2 from missing its own level.
        return float(distribution["values"][min(int(np.searchsorted(reached, fraction - 1e-12)), len(reached) - 1)])
    return float(np.interp(fraction, np.linspace(0, 1, _POINTS), distribution["points"]))


def shares_up_to(distribution: Distribution, values: np.ndarray) -> np.ndarray:
    """Share of the rows at or below each of `values`; linear between quantiles."""
    if distribution["kind"] == "counts":
        reached = np.concatenate([[0.0], np.cumsum(distribution["counts"])]) / max(distribution["rows"], 1)
        return reached[np.searchsorted(distribution["values"], values, side="right")]
    return np.interp(values, distribution["points"], np.linspace(0, 1, _POINTS), left=0.0)


def psi(reference: Distribution, current: Distribution) -> float:
    """Population stability index: the sum of (p − q) ln(p / q) over bins, p and q being the bins' shares.

    Bins are the distinct values if both have at most 20 together, else the deciles of the reference; missing values are
    one more bin. Half a row is added to each bin, so that an empty one does not make the index infinite. Customary
    reading: below 0.1 stable, above 0.2 shifted. Raises `ValueError` if one has no rows at all.
    """
    before, now = _bin_counts(reference, current)
    if not before.sum() or not now.sum():
        raise ValueError("a distribution without rows cannot be compared")
    p = (before + _PSEUDO_COUNT) / (before.sum() + _PSEUDO_COUNT * len(before))
    q = (now + _PSEUDO_COUNT) / (now.sum() + _PSEUDO_COUNT * len(now))
    return float(np.sum((p - q) * np.log(p / q)))


def _bin_counts(reference: Distribution, current: Distribution) -> Sequence[np.ndarray]:
    both = (reference, current)
    values = sorted({value for d in both if d["kind"] == "counts" for value in d["values"]})
    if reference["kind"] == current["kind"] == "counts" and len(values) <= _MOST_CATEGORIES:
        counted = [dict(zip(d["values"], d["counts"], strict=True)) for d in both]
        bins = [np.array([counts.get(value, 0) for value in values], dtype=np.float64) for counts in counted]
    else:
        known = reference if reference["rows"] else current
        edges = np.unique([quantile(known, i / 10) for i in range(1, 10)])
        bins = [np.diff(shares_up_to(d, edges), prepend=0.0, append=1.0) * d["rows"] for d in both]
    if not any(d["missing"] for d in both):
        return bins
    return [np.append(rows, d["missing"]) for rows, d in zip(bins, both, strict=True)]
