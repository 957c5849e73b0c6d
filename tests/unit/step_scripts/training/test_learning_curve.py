"""Thinned learning curves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from step_scripts.training.boosting import History
from step_scripts.tune_model import learning_curve


@given(rmse=st.lists(st.floats(0, 1e9), min_size=1, max_size=2000), points=st.integers(4, 500))
def test_first_best_and_last_round_are_shown(rmse: list[float], points: int) -> None:
    history = History(train=[-value for value in rmse], validation=rmse)
    best = history.best_rounds
    assert rmse[best - 1] == min(rmse)
    assert best == 1 or min(rmse[: best - 1]) > rmse[best - 1]
    curve = learning_curve(history, points)
    assert len(curve["round"]) <= points
    assert {1, best, len(rmse)} <= set(curve["round"])
    assert curve["validation"] == [rmse[r - 1] for r in curve["round"]]
    assert curve["train"] == [-rmse[r - 1] for r in curve["round"]]
