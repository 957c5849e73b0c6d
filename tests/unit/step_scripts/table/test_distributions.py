"""Sketches of columns, and how far they are apart at known shifts."""

from __future__ import annotations

import json
import math
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_scripts.table.distributions import (
    SAMPLE_ROWS,
    Distribution,
    TableSketch,
    distribution_of,
    psi,
    quantile,
    shares_up_to,
)


def normal(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, count)


def largest_difference(one: Distribution, other: Distribution, at: np.ndarray) -> float:
    """Between the shares of the rows up to each of these values."""
    return float(np.abs(shares_up_to(one, at) - shares_up_to(other, at)).max())


def test_few_values_are_counted_exactly() -> None:
    found = distribution_of(np.array([2.0, 1.0, 2.0, -0.0, 0.0, np.nan]))
    assert found == {"kind": "counts", "rows": 5, "missing": 1, "values": [0.0, 1.0, 2.0], "counts": [2, 1, 2]}
    assert json.dumps(found["values"]) == "[0.0, 1.0, 2.0]"


def test_many_values_become_quantiles() -> None:
    values = np.arange(1025.0)
    found = distribution_of(values)
    assert found["kind"] == "quantiles"
    assert found["points"] == [4.0 * i for i in range(257)]
    assert quantile(found, 0.5) == 512
    assert json.loads(json.dumps(found)) == found


def test_quantiles_of_counts() -> None:
    counts = distribution_of(np.array([1.0] * 3 + [5.0] * 7))
    assert [quantile(counts, f) for f in (0.0, 0.3, 0.31, 1.0)] == [1, 1, 5, 5]
    assert math.isnan(quantile(distribution_of(np.array([np.nan])), 0.5))


@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 3000), max_size=6),
    distinct=st.sampled_from([2, 60, 64, 65, 70, 10**6]),
)
def test_a_sketch_does_not_depend_on_the_partition(seed: int, cuts: list[int], distinct: int) -> None:
    random = np.random.default_rng(seed)
    values = np.column_stack([random.integers(0, distinct, 3000) / 7, normal(3000, seed)])
    values[random.random(3000) < 0.1, 1] = np.nan
    hashes = random.random(3000)
    parts = zip(np.split(values, sorted(cuts)), np.split(hashes, sorted(cuts)), strict=True)
    merged = reduce(TableSketch.merge, [TableSketch.of(*part) for part in parts], TableSketch.empty(2))
    whole = {"x": distribution_of(values[:, 0]), "y": distribution_of(values[:, 1])}
    assert merged.distributions(["x", "y"]) == whole


def test_a_large_column_is_sampled_and_keeps_its_extremes() -> None:
    values = normal(3 * SAMPLE_ROWS, 5).reshape(-1, 1)
    values[17] = 99.0
    hashes = np.random.default_rng(6).random(len(values))
    merged = reduce(
        TableSketch.merge,
        [TableSketch.of(v, h) for v, h in zip(np.split(values, 4), np.split(hashes, 4), strict=True)],
    )
    assert len(merged.sample.values) == SAMPLE_ROWS
    found = merged.distributions(["x"])["x"]
    assert found["rows"] == 3 * SAMPLE_ROWS
    assert found["points"][-1] == 99.0
    assert largest_difference(found, distribution_of(values[:, 0]), values[:, 0]) < 0.01


def test_psi_of_a_shifted_normal() -> None:
    # Ten bins at the deciles of N(0, 1) against N(1/2, 1): the sum, from the normal distribution function, is 0.2404.
    edges = [-1.281552, -0.841621, -0.524401, -0.253347, 0.0, 0.253347, 0.524401, 0.841621, 1.281552]
    reached = [0.0, *(0.5 * (1 + math.erf((e - 0.5) / math.sqrt(2))) for e in edges), 1.0]
    expected = sum((0.1 - q) * math.log(0.1 / q) for q in np.diff(reached))
    reference, shifted = distribution_of(normal(50_000, 1)), distribution_of(normal(50_000, 2, 0.5))
    assert expected == pytest.approx(0.24, abs=0.01)
    assert psi(reference, shifted) == pytest.approx(expected, rel=0.08)
    assert psi(reference, distribution_of(normal(50_000, 3))) < 0.005
    assert psi(reference, reference) == pytest.approx(0, abs=1e-9)


def test_shares_of_a_shifted_normal() -> None:
    # The largest difference of the two distribution functions is at the middle: 2 F(1/4) - 1 = 0.1974.
    reference, shifted = distribution_of(normal(50_000, 1)), distribution_of(normal(50_000, 2, 0.5))
    at = np.linspace(-6, 6, 1201)
    assert largest_difference(reference, shifted, at) == pytest.approx(2 * 0.5987063 - 1, abs=0.01)
    assert largest_difference(reference, distribution_of(normal(50_000, 3)), at) < 0.015
    assert (shares_up_to(reference, at)[0], shares_up_to(reference, at)[-1]) == (0, 1)


def test_categories() -> None:
    before = distribution_of(np.array([0.0] * 5000 + [1.0] * 5000))
    after = distribution_of(np.array([0.0] * 8000 + [1.0] * 2000))
    expected = (0.5 - 0.8) * math.log(0.5 / 0.8) + (0.5 - 0.2) * math.log(0.5 / 0.2)
    assert psi(before, after) == pytest.approx(expected, rel=1e-3)
    assert shares_up_to(after, np.array([-0.1, 0.0, 0.9, 1.0])).tolist() == [0, 0.8, 0.8, 1]
    new = distribution_of(np.array([0.0] * 5000 + [2.0] * 5000))
    assert 5 < psi(before, new) < 20  # finite, although a bin is empty


def test_small_samples_of_one_distribution_do_not_alarm() -> None:
    random = np.random.default_rng(4)
    for distinct in (2, 12, 60, 10_000):
        halves = [distribution_of(random.integers(0, distinct, 876).astype(float)) for _ in range(2)]
        assert psi(*halves) < 0.1, distinct


def test_missing_values_are_a_shift() -> None:
    values = normal(10_000, 1)
    holes = np.where(np.arange(10_000) % 4 == 0, np.nan, values)
    assert psi(distribution_of(values), distribution_of(holes)) > 0.2
    nothing = distribution_of(np.full(100, np.nan))
    assert psi(distribution_of(values), nothing) > 1
    assert psi(nothing, distribution_of(values)) > 1
    assert psi(nothing, nothing) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="without rows"):
        psi(distribution_of(np.empty(0)), nothing)


def test_a_mass_at_one_value_is_kept_apart() -> None:
    values = np.where(np.arange(10_000) < 4000, 0.0, np.abs(normal(10_000, 1)))
    found = distribution_of(values)
    assert found["kind"] == "quantiles"
    assert shares_up_to(found, np.array([-1e-9, 0.0])).tolist() == [0, pytest.approx(0.4, abs=0.005)]
    more = distribution_of(np.where(np.arange(10_000) < 7000, 0.0, values))
    assert shares_up_to(more, np.array([0.0]))[0] == pytest.approx(0.7, abs=0.005)


VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200)


@given(first=VALUES, second=VALUES)
def test_distances_hold_their_bounds(first: list[float], second: list[float]) -> None:
    a, b = distribution_of(np.array(first)), distribution_of(np.array(second))
    shares = shares_up_to(a, np.array([min(first) - 1, *sorted(second), max(first)]))
    assert shares[0] == 0
    assert shares[-1] == 1
    assert (np.diff(shares[:-1]) >= 0).all()
    assert psi(a, b) >= -1e-12
    assert psi(a, a) == pytest.approx(0, abs=1e-9)
