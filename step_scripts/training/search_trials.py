"""A trial of a search as Ray Tune runs it in an actor, and the schedulers that stop trials.

Processes of trials import this module. It does without Optuna, which takes half a second to import.
"""

from __future__ import annotations

from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from step_scripts.model import xgb
from step_scripts.training.boosting import TrialBoosting, quantile_matrices, useful_threads

_REDUCTION_FACTOR = 3


class BoostingTrial(tune.Trainable):
    """Boosts `report_rounds` rounds a step and reports the best validation RMSE so far.

    The matrices are binned once an actor: the bins do not depend on what is tuned.
    """

    def setup(  # pyright: ignore[reportIncompatibleMethodOverride]  # `tune.with_parameters` adds the others
        self, config: dict[str, Any], *, settings: dict[str, Any], report_rounds: int, cpus: int
    ) -> None:
        """Begin the first trial in this actor, which has `cpus`. `settings` are the resolved ones of the step."""
        self._settings, self._report_rounds, self._cpus = settings, report_rounds, cpus
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
        stopped_by = boosting.advance(self._report_rounds)
        return {
            "rmse": boosting.best_rmse,
            "rounds": boosting.rounds,
            "best_rounds": boosting.best_rounds,
            "stopped_by": stopped_by or "scheduler",
            "done": stopped_by is not None,
        }

    def _begin(self) -> TrialBoosting:
        if self._binned is None:
            train, validation = ray.get(self._matrices)  # mapped, not copied
            self._threads = useful_threads(len(train.target), self._cpus)
            self._binned = quantile_matrices(train, validation, self._threads)
        return TrialBoosting(self._binned, self._tuned, self._threads, self._settings)


def scheduler(name: str, rounds: int, reported: int) -> TrialScheduler:
    """What stops bad trials early. It waits for an eighth of the rounds: a small `eta` begins slowly."""
    grace = max(reported, rounds // 8)
    if name == "asha":
        return ASHAScheduler(
            time_attr="rounds", max_t=max(rounds, grace), grace_period=grace, reduction_factor=_REDUCTION_FACTOR
        )
    if name == "median":
        return MedianStoppingRule(time_attr="rounds", grace_period=grace, min_samples_required=2)
    return _ToTheirEnd()


class _ToTheirEnd(FIFOScheduler):
    """Runs all trials to their end. A trial whose actor is starting is left to that actor.

    Ray Tune would move it to an actor that is free, end the one that is starting, and start another for the next trial.
    In a search of short trials one actor would do all the work, and the CPUs would be busy with starting others.
    """

    def choose_trial_to_run(self, tune_controller: Any, **kwargs: Any) -> None:
        """None: trials that wait begin in their order, in actors that are free before others are started."""
        return
