"""One trial of the hyperparameter search, as an actor of Ray Tune that serves one trial after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from step_scripts.model.xgboost_native import xgb
from step_scripts.training.boosting import TrialBoosting, quantile_matrices, useful_threads, xgboost_parameters


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a search share. There is a report every `report_rounds`; `cpus` are those of one trial."""

    num_boost_round: int
    early_stopping_rounds: int
    report_rounds: int
    cpus: int
    seed: int


class BoostingTrial(tune.Trainable):
    """Boosts `report_rounds` rounds a step and reports the best validation RMSE so far.

    The matrices are binned once an actor: the bins do not depend on what is tuned.
    """

    def setup(  # pyright: ignore[reportIncompatibleMethodOverride]  # `tune.with_parameters` adds the settings
        self, config: dict[str, Any], *, settings: TrialSettings
    ) -> None:
        """Begin the first trial in this actor."""
        self._settings = settings
        self._binned: tuple[xgb.DMatrix, xgb.DMatrix] | None = None
        self.reset_config(config)

    def receive(self, matrices: list[ray.ObjectRef]) -> None:
        """Take references to the `Matrix` of each split, train first; called before the first step of each trial.

        Not a parameter of the trainable: Ray Tune keeps those, and with them the matrices, until the session ends.
        """
        self._matrices = matrices

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in this actor."""
        self._tuned = new_config
        self._boosting: TrialBoosting | None = None
        return True

    def step(self) -> dict[str, Any]:
        """Boost until the next report, early stopping or the last round."""
        boosting = self._boosting = self._boosting or self._begin()
        stopped_by = boosting.advance(self._settings.report_rounds)
        return {
            "rmse": boosting.best_rmse,
            "rounds": boosting.rounds,
            "best_rounds": boosting.best_rounds,
            "stopped_by": stopped_by or "scheduler",
            "done": stopped_by is not None,
        }

    def _begin(self) -> TrialBoosting:
        settings = self._settings
        if self._binned is None:
            train, validation = ray.get(self._matrices)  # mapped, not copied
            self._threads = useful_threads(len(train.target), settings.cpus)
            self._binned = quantile_matrices(train, validation, self._threads)
        parameters = xgboost_parameters(self._tuned, settings.seed) | {"nthread": self._threads}
        return TrialBoosting(*self._binned, parameters, settings.num_boost_round, settings.early_stopping_rounds)
