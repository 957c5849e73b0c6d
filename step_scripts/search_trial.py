"""One trial of the hyperparameter search, as an actor of Ray Tune that serves one trial after the other."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from step_scripts.background import run_in_thread
from step_scripts.boosting import TrialBoosting, quantile_matrices, useful_threads, xgboost_parameters
from step_scripts.contract import StepError
from step_scripts.training_data import TrainingSplit


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
    # With the driver, whose end is everybody's: on another node it would take the whole search along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": name, "num_cpus": 0, "scheduling_strategy": here}
    holder: Any = ray.remote(MatrixHolder).options(**options).remote(train, validation)
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
        task = self._task
        parameters = xgboost_parameters(new_config, task.seed) | {"nthread": self._threads}
        self._boosting = TrialBoosting(
            self._train, self._validation, parameters, task.num_boost_round, task.early_stopping_rounds
        )
        return True

    def step(self) -> dict[str, Any]:
        """Boost until the next report, early stopping or the last round."""
        boosting = self._boosting
        stopped_by = boosting.advance(self._task.report_rounds)
        return {
            "rmse": boosting.best_rmse,
            "rounds": boosting.rounds,
            "best_rounds": boosting.best_rounds,
            "stopped_by": stopped_by or "scheduler",
            "done": stopped_by is not None,
        }
