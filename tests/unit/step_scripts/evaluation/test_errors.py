"""Errors of predictions: sums, groups and the linear model against figures of all rows at once; blocks do not show."""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_scripts.evaluation.error_sums import ErrorSums, Grouping, groupings, merged, standard_deviations
from step_scripts.evaluation.report import EvaluationPlan, errors_of_rows, least_squares, merge_errors, products
from step_scripts.parameters import Slice
from step_scripts.runner.contract import StepError
from tests.split_files import TABLE, sales, scaler_of
from tests.unit.step_scripts.test_model import small_model

NAMES = ("a", "b", "c")


def frame_of(features: np.ndarray, target: np.ndarray) -> pl.DataFrame:
    return pl.DataFrame(features, schema=list(NAMES)).with_columns(pl.Series("y", target))


@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 10**6), max_size=6))
def test_least_squares_equals_numpy(seed: int, cuts: list[int]) -> None:
    random = np.random.default_rng(seed)
    scales, centres = np.array([1.0, 1000.0, 1e-3]), np.array([2000.0, -5e4, 0.0])
    features = centres + scales * random.standard_normal((80, 3))
    target = features @ np.array([150.0, -2.0, 4e4]) + 1e5 + random.normal(0, 50, 80)
    table = frame_of(features, target)
    bounds = [0, *sorted(cut % 81 for cut in cuts), 80]
    means = features.mean(axis=0)
    sums = np.sum([products(table[a:b], NAMES, "y", means) for a, b in pairwise(bounds)], axis=0)
    fitted = least_squares(sums, NAMES, means)
    expected, *_ = np.linalg.lstsq(np.column_stack([features, np.ones(80)]), target, rcond=None)
    assert fitted.coefficients == pytest.approx(expected[:3], rel=1e-6)
    assert fitted.intercept == pytest.approx(expected[3], rel=1e-6)
    assert fitted.predict(table) == pytest.approx(np.column_stack([features, np.ones(80)]) @ expected, rel=1e-9)
    missing = frame_of(np.full((1, 3), np.nan), np.zeros(1))
    assert fitted.predict(missing) == pytest.approx(fitted.predict(frame_of(means[None], np.zeros(1))))


def test_least_squares_survives_constant_and_repeated_columns() -> None:
    random = np.random.default_rng(0)
    one = random.normal(0, 1, 100)
    features = np.column_stack([one, np.full(100, 0.1), 3 * one])
    target = 5 + 2 * one
    table, means = frame_of(features, target), features.mean(axis=0)
    fitted = least_squares(products(table, NAMES, "y", means), NAMES, means)
    assert fitted.predict(table) == pytest.approx(target, rel=1e-9)
    assert fitted.coefficients[1] == 0
    assert np.abs(fitted.coefficients).max() < 3  # not two huge numbers that cancel
    table, means = frame_of(np.full((5, 3), 7.0), np.full(5, 7.0)), np.full(3, 7.0)
    assert least_squares(products(table, NAMES, "y", means), NAMES, means).predict(table) == pytest.approx([7.0] * 5)


def test_error_sums_by_hand() -> None:
    actual, predicted = np.array([100.0, 0.0, -50.0, 10.0]), np.array([110.0, 5.0, -60.0, 10.0])
    merged = ErrorSums.of(actual[:1], predicted[:1]).merge(ErrorSums.of(actual[1:], predicted[1:]))
    assert merged == ErrorSums.of(actual, predicted)
    figures = merged.figures()
    assert figures.pop("mape") == pytest.approx((0.1 + 0.2 + 0) / 3)
    assert figures == {"mse": (100 + 25 + 100) / 4, "rmse": 7.5, "mae": 25 / 4, "bias": 5 / 4, "max_error": 10}
    assert (merged.rows, merged.percentage_rows) == (4, 3)


def test_standard_deviations_of_a_sample_are_those_of_all_rows() -> None:
    random = np.random.default_rng(1)
    actual = np.round(random.normal(100, 50, 500))
    actual[:5] = 0
    predicted = actual + random.normal(3, 10, 500)
    from_all = standard_deviations(np.tile(actual, 9), np.tile(predicted, 9), 4500)
    assert standard_deviations(actual, predicted, 4500) == pytest.approx(from_all, rel=0.01)


def test_standard_deviations_of_one_row_are_undefined() -> None:
    assert all(math.isnan(value) for value in standard_deviations(np.array([1.0]), np.array([2.0]), 1).values())


@given(cuts=st.lists(st.integers(0, 60), max_size=4), width=st.sampled_from([0.5, 1.0, 7.0]), holes=st.booleans())
def test_groups_of_blocks_are_those_of_all_rows(cuts: list[int], width: float, holes: bool) -> None:
    random = np.random.default_rng(len(cuts))
    values, actual, predicted = np.round(random.normal(0, 9, 60), 1), random.normal(9, 1, 60), random.normal(9, 1, 60)
    values[:: 7 if holes else 60] = np.nan
    grouping = Grouping(name="g", column="x", width=width)
    blocks = [slice(a, b) for a, b in pairwise([0, *sorted(cuts), 60])]
    found = reduce(merged, [grouping.sums(values[b], actual[b], predicted[b]) for b in blocks])
    assert sum(sums.rows for sums in found.values()) == 60
    for key, sums in found.items():
        low = key * width
        here = np.isnan(values) if grouping.label(key) == "missing" else (values >= low) & (values < low + width)
        assert sums.rows == here.sum()
        expected = np.sqrt(np.mean((predicted - actual)[here] ** 2))
        assert sums.rmse == pytest.approx(expected, rel=1e-12)


def test_labels_of_groups() -> None:
    rooms, ages, areas = groupings(
        (
            Slice(name="rooms", column="rooms", width=2),
            Slice(name="ages", column="age", width=0.5),
            Slice(name="areas", column="area", bands=4),
        ),
        TABLE,
        {"area": np.array([*range(10_000, 10_009), np.nan])},
    )
    assert [rooms.label(key) for key in (0, 3)] == ["0 to 1", "6 to 7"]
    assert [ages.label(key) for key in (-1, 0)] == ["-0.5 to below 0", "0 to below 0.5"]
    assert areas.edges == (10_002, 10_004, 10_006)
    labels = [areas.label(key) for key in range(4)]
    assert labels == ["up to 10,002", "over 10,002 to 10,004", "over 10,004 to 10,006", "over 10,006"]
    (constant,) = groupings((Slice(name="areas", column="area", bands=4),), TABLE, {"area": np.full(9, 5.0)})
    assert constant.label(0) == "all"


def test_too_many_groups_are_refused() -> None:
    values = np.arange(201.0)
    with pytest.raises(StepError, match=r"slice 'g': column x with width 1 makes more than 200 groups"):
        Grouping(name="g", column="x", width=1).sums(values, values, values)
    assert len(Grouping(name="g", column="x", width=1).sums(values[1:], values[1:], values[1:])) == 200


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> EvaluationPlan:
    train = sales(500)
    model, means = small_model(tmp_path_factory.mktemp("model"), train), scaler_of(train).mean
    sums = products(train, TABLE.features, TABLE.target, means)
    return EvaluationPlan(
        table=TABLE,
        models={"model": model.uri},
        linear=least_squares(sums, TABLE.features, means),
        target_mean=train["price"].to_numpy().mean(),
        slices=(Grouping(name="rooms", column="rooms", width=2.0, whole_numbers=True),),
        plotted_rows=40,
        sampled=0.5,
    )


@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_blocks_do_not_show(plan: EvaluationPlan, blocks: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = sales(300, seed=1).with_columns(pl.when(pl.int_range(300) > 4).then("price").alias("price"))
    whole = errors_of_rows(rows, plan)
    monkeypatch.setattr("step_scripts.evaluation.report._BATCH_ROWS", 29)
    found = merge_errors([errors_of_rows(rows[n::blocks], plan) for n in range(blocks)])
    assert found.rows_without_target == 5
    assert set(found.sums) == {"model", "mean", "linear"}
    for name, sums in found.sums.items():
        assert sums == pytest.approx(whole.sums[name], rel=1e-12)
    assert found.sums["model"].rmse < found.sums["linear"].rmse < found.sums["mean"].rmse
    assert sum(sums.rows for sums in found.groups[0].values()) == found.sums["model"].rows == 295
    assert found.target.squares[0] == pytest.approx(whole.target.squares[0], rel=1e-12)
    for mine, others in ((found.plotted.values, whole.plotted.values), (found.sample, whole.sample)):
        assert sorted(map(tuple, mine)) == sorted(map(tuple, others))
    assert len(found.plotted.values) == 40
    assert len(found.sample) == pytest.approx(150, abs=30)
