"""One trial of the hyperparameter search, as an actor of Ray Tune that serves one trial after the other."""

from __future__ import annotations

import math
import time
from typing import Any

import ray
from ray import tune

from step_scripts.model.xgboost_native import xgb
from step_scripts.training.boosting import TrialBoosting, quantile_matrices, useful_threads, xgboost_parameters
from step_scripts.training.trial_task import TrialTask

_SECONDS_BETWEEN_LOOKS = 0.05
_NOTHING_YET = {"rmse": math.inf, "rounds": 0, "best_rounds": 0, "stopped_by": "scheduler", "done": False}


class BoostingTrial(tune.Trainable):
    """Boosts `report_rounds` rounds a step and reports the best validation RMSE so far.

    Until it has received the matrices it reports that there are no rounds yet. They are binned once an actor: their
    bins do not depend on what is tuned.
    """

    def setup(  # pyright: ignore[reportIncompatibleMethodOverride]  # `tune.with_parameters` adds the task
        self, config: dict[str, Any], *, task: TrialTask
    ) -> None:
        """Get ready to receive the matrices."""
        self._task = task
        self._config = config
        self._references: list[ray.ObjectRef] = []
        self._matrices: tuple[xgb.DMatrix, xgb.DMatrix] | None = None
        self._boosting: TrialBoosting | None = None

    def receive(self, references: list[ray.ObjectRef]) -> None:
        """Take references to the `Matrix` of each split, train first.

        Not a parameter of the trial: Ray Tune keeps those, and with them the matrices, until the session ends.
        """
        self._references = references

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in this actor."""
        self._config = new_config
        self._boosting = None
        return True

    def step(self) -> dict[str, Any]:
        """Boost until the next report, early stopping or the last round."""
        if not self._references:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            return dict(_NOTHING_YET)
        boosting = self._boosting = self._boosting or self._begin()
        stopped_by = boosting.advance(self._task.report_rounds)
        return {
            "rmse": boosting.best_rmse,
            "rounds": boosting.rounds,
            "best_rounds": boosting.best_rounds,
            "stopped_by": stopped_by or "scheduler",
            "done": stopped_by is not None,
        }

    def _begin(self) -> TrialBoosting:
        """Begin a trial. The first time, map the matrices (of which no copy is made) and bin them."""
        task = self._task
        if self._matrices is None:
            train, validation = ray.get(self._references)
            self._threads = useful_threads(len(train.target), task.cpus)
            self._matrices = quantile_matrices(train, validation, self._threads)
        parameters = xgboost_parameters(self._config, task.seed) | {"nthread": self._threads}
        return TrialBoosting(*self._matrices, parameters, task.num_boost_round, task.early_stopping_rounds)
