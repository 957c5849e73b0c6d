"""One trial of the hyperparameter search, as an actor of Ray Tune that serves one trial after the other."""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import xgboost as xgb
from ray import tune
from ray.exceptions import RayTaskError

from step_scripts.background import run_in_thread
from step_scripts.boosting import quantile_matrices, useful_threads, xgboost_parameters
from step_scripts.contract import StepError
from step_scripts.training_data import TrainingSplit

EARLY_STOPPING, ALL_ROUNDS, SCHEDULER, ERROR = "early_stopping", "all_rounds", "scheduler", "error"


class MatrixHolder:
    """Reads both splits into Ray's object store, where all trials of a node map the same memory.

    An actor, because objects end with their owner: Ray Tune keeps the class of the trials, and so whatever it refers
    to, until the session ends.
    """

    def __init__(self, train: TrainingSplit, validation: TrainingSplit) -> None:
        self._splits = (train, validation)
        self._references: list[ray.ObjectRef] = []
        self._error: StepError | None = None

    def references(self) -> list[ray.ObjectRef]:
        """References to the `Matrix` of each split, read on the first call. Raises `StepError` on every call."""
        if self._error is None and not self._references:
            try:
                self._references = [ray.put(split.load()) for split in self._splits]
            except StepError as error:
                self._error = error
        if self._error is not None:
            raise self._error
        return self._references


@contextlib.contextmanager
def matrix_holder(train: TrainingSplit, validation: TrainingSplit) -> Iterator[str]:
    """Name of a `MatrixHolder` that lives as long as the block. It reads while the first trials start.

    Raises the `StepError` of a split that cannot be read, at the end of the block.
    """
    name = f"matrices-{uuid.uuid4().hex[:12]}"
    holder: Any = ray.remote(MatrixHolder).options(name=name, num_cpus=0).remote(train, validation)
    reading = holder.references.remote()
    try:
        yield name
        run_in_thread(lambda: ray.get(reading))
    except RayTaskError as error:
        if isinstance(error.cause, StepError):
            raise error.cause from error
        raise
    finally:
        ray.kill(holder)


@dataclass(frozen=True)
class TrialTask:
    """What all trials share. `holder` is the name of the actor that has the matrices."""

    holder: str
    num_boost_round: int
    early_stopping_rounds: int
    report_rounds: int
    cpus: int
    seed: int


class BoostingTrial(tune.Trainable):
    """Boosts `report_rounds` rounds a step and reports the best validation RMSE so far.

    The matrices are made once an actor: their bins do not depend on what is tuned.
    """

    def setup(  # pyright: ignore[reportIncompatibleMethodOverride]  # `tune.with_parameters` adds the task
        self, config: dict[str, Any], *, task: TrialTask
    ) -> None:
        """Map the matrices (no copy is made of what is in the object store) and bin them."""
        self._task = task
        holder: Any = ray.get_actor(task.holder)
        train, validation = ray.get(ray.get(holder.references.remote()))
        self._threads = useful_threads(len(train.target), task.cpus)
        self._train, self._validation = quantile_matrices(train, validation, self._threads)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in this actor."""
        parameters = xgboost_parameters(new_config, self._task.seed) | {"nthread": self._threads}
        self._booster = xgb.Booster(parameters, [self._train, self._validation])
        self._rounds, self._best_rounds, self._best_rmse = 0, 0, math.inf
        return True

    def step(self) -> dict[str, Any]:
        """Boost until the next report, early stopping or the last round."""
        task, stopped_by = self._task, None
        # Updating the booster in place keeps its predictions; `xgboost.train` would make them again in every step.
        for _ in range(task.report_rounds):
            self._booster.update(self._train, self._rounds)
            result = self._booster.eval_set([(self._validation, "validation")], self._rounds)
            rmse = float(str(result).rsplit(":", 1)[1])
            self._rounds += 1
            if rmse < self._best_rmse:
                self._best_rmse, self._best_rounds = rmse, self._rounds
            if self._rounds - self._best_rounds >= task.early_stopping_rounds:
                stopped_by = EARLY_STOPPING
            elif self._rounds >= task.num_boost_round:
                stopped_by = ALL_ROUNDS
            if stopped_by:
                break
        return {
            "rmse": self._best_rmse,
            "rounds": self._rounds,
            "best_rounds": self._best_rounds,
            "stopped_by": stopped_by or SCHEDULER,
            "done": stopped_by is not None,
        }
