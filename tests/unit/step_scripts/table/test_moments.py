"""Merged means, variances and linear fits against numpy on all rows at once, and digests of sets of rows."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_scripts.evaluation.baselines import least_squares
from step_scripts.evaluation.error_sums import ErrorSums, standard_deviations
from step_scripts.table.hashes import RowSetDigest, text_hashes
from step_scripts.table.moments import CoMoments, Moments


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
    merged = reduce(Moments.merge, map(Moments.of, pieces_of(values, cuts)), Moments.empty(3))
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


@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 10**6), max_size=6))
def test_least_squares_equals_numpy(seed: int, cuts: list[int]) -> None:
    random = np.random.default_rng(seed)
    scales, centres = np.array([1.0, 1000.0, 1e-3]), np.array([2000.0, -5e4, 0.0])
    features = centres + scales * random.standard_normal((80, 3))
    target = features @ np.array([150.0, -2.0, 4e4]) + 1e5 + random.normal(0, 50, 80)
    table = np.column_stack([features, target])
    merged = reduce(CoMoments.merge, map(CoMoments.of, pieces_of(table, cuts)))
    fitted = least_squares(merged, ("a", "b", "c"))
    expected, *_ = np.linalg.lstsq(np.column_stack([features, np.ones(80)]), target, rcond=None)
    assert fitted.coefficients == pytest.approx(expected[:3], rel=1e-6)
    assert fitted.predict(features) == pytest.approx(np.column_stack([features, np.ones(80)]) @ expected, rel=1e-9)


def test_least_squares_survives_constant_and_repeated_columns() -> None:
    random = np.random.default_rng(0)
    one = random.normal(0, 1, 100)
    features = np.column_stack([one, np.full(100, 0.1), 3 * one])
    target = 5 + 2 * one
    fitted = least_squares(CoMoments.of(np.column_stack([features, target])), ("one", "constant", "thrice"))
    assert fitted.predict(features) == pytest.approx(target, rel=1e-9)
    assert fitted.coefficients[1] == 0
    assert np.abs(fitted.coefficients).max() < 3  # not two huge numbers that cancel
    constant = least_squares(CoMoments.of(np.full((5, 2), 7.0)), ("x",))
    assert constant.predict(np.array([[7.0]])) == pytest.approx([7.0])


def test_error_sums_by_hand() -> None:
    actual, predicted = np.array([100.0, 0.0, -50.0, 10.0]), np.array([110.0, 5.0, -60.0, 10.0])
    merged = ErrorSums.of(actual[:1], predicted[:1]).merge(ErrorSums.of(actual[1:], predicted[1:]))
    assert merged == ErrorSums.of(actual, predicted)
    assert merged.mse == (100 + 25 + 100) / 4
    assert merged.rmse == 7.5
    assert merged.mae == 25 / 4
    assert merged.bias == 5 / 4
    assert merged.largest == 10
    assert merged.mape == pytest.approx((0.1 + 0.2 + 0) / 3)
    assert merged.percentage_rows == 3


def test_standard_deviations_of_a_sample_are_those_of_all_rows() -> None:
    random = np.random.default_rng(1)
    actual = np.round(random.normal(100, 50, 500))
    actual[:5] = 0
    predicted = actual + random.normal(3, 10, 500)
    from_all = standard_deviations(np.tile(actual, 9), np.tile(predicted, 9), 4500)
    assert standard_deviations(actual, predicted, 4500) == pytest.approx(from_all, rel=0.01)


def test_standard_deviations_of_one_row_are_undefined() -> None:
    assert all(math.isnan(value) for value in standard_deviations(np.array([1.0]), np.array([2.0]), 1).values())


ROWS = st.lists(
    st.tuples(
        st.text("0123456789abcdef", min_size=32, max_size=32),
        st.one_of(st.none(), st.floats()),
        st.one_of(st.none(), st.integers(-(2**62), 2**62)),
        st.one_of(st.none(), st.text(max_size=12)),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda row: row[0],
)
SCHEMA = {"record_id": pl.String, "a": pl.Float64, "b": pl.Int64, "c": pl.String}


def digest(rows: list[tuple[object, ...]]) -> RowSetDigest:
    frame = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    return RowSetDigest.of(text_hashes(frame["record_id"]), frame, ["a", "b", "c"])


@given(rows=ROWS, order=st.randoms(use_true_random=False), cut=st.integers(0, 12))
def test_digest_depends_on_the_rows_alone(rows: list[tuple[object, ...]], order: object, cut: int) -> None:
    shuffled = list(rows)
    order.shuffle(shuffled)  # pyright: ignore[reportAttributeAccessIssue]  # hypothesis' Random
    assert digest(rows[:cut]).merge(digest(rows[cut:])) == digest(shuffled)


@given(rows=ROWS, row=st.integers(0, 11), value=st.floats(allow_nan=False), other=st.integers(0, 11))
def test_digest_sees_changed_and_exchanged_values(
    rows: list[tuple[object, ...]], row: int, value: float, other: int
) -> None:
    row, other = row % len(rows), other % len(rows)
    changed = [(r[0], value, *r[2:]) if i == row else r for i, r in enumerate(rows)]
    assert (digest(changed) == digest(rows)) == (rows[row][1] == value)
    assert digest(rows[:-1]) != digest(rows)
    swapped = list(rows)
    swapped[row] = (rows[row][0], *rows[other][1:])
    swapped[other] = (rows[other][0], *rows[row][1:])
    same = str(rows[row][1:]).replace("-0.0", "0.0") == str(rows[other][1:]).replace("-0.0", "0.0")
    assert (digest(swapped) == digest(rows)) == same
