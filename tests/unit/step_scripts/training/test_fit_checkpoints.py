"""Segments of a fit and their checkpoints, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import xgboost as xgb
from hypothesis import given, settings
from hypothesis import strategies as st

from step_scripts.training.boosting import finished, history_of, segment_seed, xgboost_parameters
from step_scripts.training.engines import Checkpoint, FitCheckpoints, FitRequest, boost
from tests.split_files import sales, splits_of, write_inputs

SEGMENT = 25
_PARAMETERS = {"max_depth": 4, "eta": 0.2, "min_child_weight": 1.0, "subsample": 0.7, "colsample_bynode": 0.6}


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> FitRequest:
    folder = tmp_path_factory.mktemp("fit")
    splits = splits_of(write_inputs(folder / "splits", sales(400), sales(150, seed=1)), sales(400))
    parameters = xgboost_parameters(_PARAMETERS, seed=7)
    return FitRequest(*splits, parameters, num_boost_round=110, early_stopping_rounds=30)


def _segments(request: FitRequest) -> tuple[xgb.Booster, list[Checkpoint]]:
    """A fit that is not interrupted, and all its checkpoints."""
    kept: list[Checkpoint] = []

    class Keeping(FitCheckpoints):
        def save(self, booster: xgb.Booster) -> None:
            kept.append(Checkpoint(bytes(booster.save_raw("ubj")), booster.num_boosted_rounds()))

    class Request(FitRequest):
        @property
        def checkpoints(self) -> FitCheckpoints:
            return Keeping("", "")

    return boost(Request(**request.__dict__)), kept


@settings(max_examples=15, deadline=None)
@given(
    sampled=st.fixed_dictionaries(
        {name: st.sampled_from([0.5, 0.8, 1.0]) for name in ("subsample", "colsample_bytree", "colsample_bynode")}
    ),
    eta=st.sampled_from([0.05, 0.3, 0.8]),
    max_depth=st.integers(1, 7),
    patience=st.integers(1, 120),
    limit=st.integers(1, 130),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_fit_that_goes_on_from_any_checkpoint_is_the_whole_fit(
    request_: FitRequest, sampled: dict[str, float], eta: float, max_depth: int, patience: int, limit: int, seed: int
) -> None:
    parameters = request_.parameters | sampled | {"eta": eta, "max_depth": max_depth, "seed": seed}
    request = replace(request_, parameters=parameters, early_stopping_rounds=patience, num_boost_round=limit)
    whole, kept = _segments(request)
    history = history_of(whole)
    for checkpoint in kept:
        resumed = boost(request, checkpoint=checkpoint)
        assert history_of(resumed).train == history.train
        assert history_of(resumed).validation == history.validation
        best, best_of_resumed = (finished(booster, request.train.scaler.features)[0] for booster in (whole, resumed))
        assert best_of_resumed.save_raw() == best.save_raw()
    # One after every segment but the last.
    rounds = len(history.train)
    ended_early = rounds - history.best_rounds >= patience
    assert [c.rounds for c in kept] == list(range(SEGMENT, rounds + (0 if ended_early else 1), SEGMENT))


def test_a_fit_of_one_segment_is_as_xgboost_makes_it(request_: FitRequest) -> None:
    request = replace(request_, num_boost_round=20)
    matrices = [xgb.QuantileDMatrix(*request.train.load())]
    plain = xgb.train(request.parameters | {"nthread": 1}, matrices[0], 20)
    assert boost(request).get_dump() == plain.get_dump()


@given(seed=st.integers(0, 2**31 - 1), segments=st.sets(st.integers(0, 100_000), min_size=2, max_size=2))
def test_segments_have_different_seeds(seed: int, segments: set[int]) -> None:
    assert segment_seed(seed, 0) == seed
    assert len({segment_seed(seed, segment) for segment in segments}) == 2


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-1], lambda data: data[:200] + b"x" + data[201:], lambda data: b"\n" + data],
    ids=["empty", "cut off", "a byte changed", "another digest"],
)
def test_instead_of_a_damaged_checkpoint_the_one_before_is_used(
    request_: FitRequest, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    request = replace(request_, checkpoint_uri=str(tmp_path))
    checkpoints = request.checkpoints
    warnings: list[str] = []
    assert checkpoints.latest(warnings.append) == Checkpoint()
    boost(request)
    files = sorted((tmp_path / "rounds").iterdir())
    assert len(files) == 2, "more are not kept"
    expected = [checkpoints.latest(warnings.append)]
    for file, rounds in zip(reversed(files), (75, 0), strict=True):
        file.write_bytes(damage(file.read_bytes()))
        found = checkpoints.latest(warnings.append)
        assert found.rounds == rounds
        expected.append(found)
    assert expected[0].rounds == 100
    assert [str(files[1]) in text for text in warnings] == [True, True, False]
    assert str(files[0]) in warnings[2]


def test_checkpoints_of_another_fit_are_not_taken(request_: FitRequest, tmp_path: Path) -> None:
    request = replace(request_, checkpoint_uri=str(tmp_path))
    request.checkpoints.latest(print)
    boost(request)
    assert request.checkpoints.latest(print).rounds == 100
    for other in (
        replace(request, parameters=request.parameters | {"eta": 0.21}),
        replace(request, num_boost_round=111),
        replace(request, early_stopping_rounds=31),
        replace(request, train=request.validation),
    ):
        assert other.checkpoints.latest(print) == Checkpoint()
