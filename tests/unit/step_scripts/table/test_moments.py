"""Merged means and variances against those of all rows at once."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_scripts.table.distributions import Moments


def pieces_of(values: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    return np.split(values, sorted(cut % (len(values) + 1) for cut in cuts))


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 200),
    cuts=st.lists(st.integers(0, 10**6), max_size=12),
    centre=st.floats(-1e9, 1e9),
    spread=st.floats(1e-3, 1e6),
    holes=st.floats(0, 0.5),
)
def test_any_partition_gives_the_same_mean_and_deviation(
    seed: int, rows: int, cuts: list[int], centre: float, spread: float, holes: float
) -> None:
    random = np.random.default_rng(seed)
    values = centre + spread * random.standard_normal((rows, 3))
    values[random.random((rows, 3)) < holes] = np.nan
    values[:, 2] = centre
    merged = reduce(Moments.merge, map(Moments.of, pieces_of(values, cuts)), Moments.of(np.empty((0, 3))))
    for column in range(3):
        present = [value for value in values[:, column].tolist() if not math.isnan(value)]
        assert merged.count[column] == len(present)
        if not present:
            assert np.isnan(merged.mean[column])
            continue
        mean = math.fsum(present) / len(present)
        deviations = [value - present[0] for value in present]  # exact enough: the values are close to each other
        offset = math.fsum(deviations) / len(deviations)
        deviation = math.sqrt(math.fsum((d - offset) ** 2 for d in deviations) / len(deviations))
        assert merged.mean[column] == pytest.approx(mean, rel=1e-9, abs=1e-9 * spread)
        assert merged.deviation[column] == pytest.approx(deviation, rel=1e-9, abs=1e-12 * spread)
    assert merged.deviation[2] == 0.0  # a constant column has no spread at all, whatever the rounding


def test_a_small_spread_on_large_values_is_kept() -> None:
    values = (1e12 + np.array([0.0, 1.0, 2.0, 3.0])).reshape(-1, 1)
    merged = reduce(Moments.merge, [Moments.of(row.reshape(1, 1)) for row in values])
    assert merged.deviation[0] == pytest.approx(math.sqrt(1.25), rel=1e-12)
