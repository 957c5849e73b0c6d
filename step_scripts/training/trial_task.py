"""One trial of the hyperparameter search, as a task. Does not import Ray Tune: the workers of tasks do not need it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from step_scripts.model.xgboost_native import xgb
from step_scripts.training.boosting import (
    TrialBoosting,
    openmp_threads,
    quantile_matrices,
    useful_threads,
    xgboost_parameters,
)
from step_scripts.training.matrix import Matrix

_binned: dict[str, tuple[xgb.DMatrix, xgb.DMatrix]] = {}  # of the latest search of this process


@dataclass(frozen=True)
class TrialTask:
    """What all trials share."""

    num_boost_round: int
    early_stopping_rounds: int
    report_rounds: int
    cpus: int
    seed: int


def run_trial(
    task: TrialTask, tuned: dict[str, float | int], key: str, train: Matrix, validation: Matrix
) -> dict[str, float | int | str]:
    """Boost until early stopping or the last round. Splits are binned once a worker for all trials with that `key`.

    `seconds` are those of the task, without its wait for a CPU.
    """
    start = time.monotonic()
    threads = useful_threads(len(train.target), task.cpus)
    with openmp_threads(threads):
        if key not in _binned:
            _binned.clear()
            _binned[key] = quantile_matrices(train, validation, threads)
        parameters = xgboost_parameters(tuned, task.seed) | {"nthread": threads}
        boosting = TrialBoosting(*_binned[key], parameters, task.num_boost_round, task.early_stopping_rounds)
        stopped_by = boosting.advance(task.num_boost_round)
    assert stopped_by is not None
    return {
        "rmse": boosting.best_rmse,
        "rounds": boosting.rounds,
        "best_rounds": boosting.best_rounds,
        "stopped_by": stopped_by,
        "seconds": round(time.monotonic() - start, 4),
    }
