"""Groups of rows whose errors are reported beside those of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl

from step_scripts.evaluation.error_sums import ErrorSums
from step_scripts.parameters import Slice
from step_scripts.runner.contract import StepError
from step_scripts.table.distributions import smallest
from step_scripts.table.record_ids import split_fraction
from step_scripts.table.spec import TableSpec

MOST_GROUPS = 200
_MISSING = -(2**62)
_SAMPLE_ROWS = 50_000


@dataclass(frozen=True)
class Grouping:
    """How the values of a column are grouped: at `edges`, each the upper end of a group, or in bins of `width`."""

    name: str
    column: str
    edges: tuple[float, ...] = ()
    width: float | None = None
    whole_numbers: bool = False

    def sums(self, values: np.ndarray, actual: np.ndarray, predicted: np.ndarray) -> dict[int, ErrorSums]:
        """Errors of each group; the keys are in the order of the values.

        Raises `StepError` if there are more than `MOST_GROUPS`.
        """
        if self.width is None:
            keys = np.searchsorted(np.asarray(self.edges), values, side="left").astype(np.int64)
        else:
            keys = np.floor(np.nan_to_num(values) / self.width).astype(np.int64)
        keys[np.isnan(values)] = _MISSING
        found, group = np.unique(keys, return_inverse=True)
        if len(found) > MOST_GROUPS:
            raise too_many_groups(self)
        return {int(key): ErrorSums.of(actual[group == i], predicted[group == i]) for i, key in enumerate(found)}

    def label(self, key: int) -> str:
        """The group in words, for example `1990 to 1999` or `over 550,000`."""
        if key == _MISSING:
            return "missing"
        if self.width is not None:
            low, high = key * self.width, (key + 1) * self.width
            if self.whole_numbers and float(self.width).is_integer():
                return number(low) if self.width == 1 else f"{number(low)} to {number(high - 1)}"
            return f"{number(low)} to below {number(high)}"
        if not self.edges:
            return "all"
        if key == 0:
            return f"up to {number(self.edges[0])}"
        if key == len(self.edges):
            return f"over {number(self.edges[-1])}"
        return f"over {number(self.edges[key - 1])} to {number(self.edges[key])}"


def too_many_groups(grouping: Grouping) -> StepError:
    """The error for a grouping that is too fine to be read."""
    return StepError(
        f"slice {grouping.name!r}: column {grouping.column} with width {grouping.width:g} makes more than "
        f"{MOST_GROUPS} groups; choose a larger width, or bands"
    )


def number(value: float) -> str:
    """A number for people: four significant digits, or whole with thousands separated from 10,000 on."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


class Sample(NamedTuple):
    """The rows with the smallest hashes: hashes, shape (rows,), and values, shape (rows, columns)."""

    hashes: np.ndarray
    values: np.ndarray


def sample_of(frame: pl.DataFrame, columns: Sequence[str], salt: str) -> Sample:
    """A sample of rows with `record_id` and `columns`."""
    sample = Sample(split_fraction(frame["record_id"], salt), frame.select(pl.col(columns).cast(pl.Float64)).to_numpy())
    return merge_samples(sample, Sample(np.empty(0), np.empty((0, len(columns)))))


def merge_samples(first: Sample, second: Sample) -> Sample:
    """A sample of the rows of both, no larger than 50,000 rows."""
    hashes = np.concatenate([first.hashes, second.hashes])
    kept = smallest(hashes, _SAMPLE_ROWS)
    return Sample(hashes[kept], np.concatenate([first.values, second.values])[kept])


def groupings(slices: Sequence[Slice], table: TableSpec, banded: dict[str, np.ndarray]) -> list[Grouping]:
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
        made.append(Grouping(item.name, item.column, edges, item.width, whole))
    return made


def merge_groups(first: dict[int, ErrorSums], second: dict[int, ErrorSums]) -> dict[int, ErrorSums]:
    """Sums of the groups of both."""
    merged = dict(first)
    for key, sums in second.items():
        merged[key] = merged[key].merge(sums) if key in merged else sums
    return merged
