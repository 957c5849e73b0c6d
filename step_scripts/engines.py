"""The final fit behind one interface, and the engines that run it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayTaskError

from step_scripts.background import run_in_thread
from step_scripts.boosting import (
    EarlyStopping,
    History,
    finished,
    openmp_threads,
    quantile_matrices,
    useful_threads,
)
from step_scripts.cluster_resources import cpus_per_worker, node_cpus
from step_scripts.contract import StepError
from step_scripts.training_data import TrainingSplit
from step_scripts.xgboost_native import TrainingCallback, xgb

# Modules with a function `train_booster(FitRequest) -> EngineResult`; imported only when asked for.
ENGINES = {"ray_train": "step_scripts.engine_ray_train", "xgboost_ray": "step_scripts.engine_xgboost_ray"}
_CHECKPOINTS = 10


@dataclass(frozen=True)
class FitRequest:
    """What to fit. `parameters` go to `xgboost.train`; `num_workers` None: one a node.

    `checkpoint_uri` is where workers keep the model while they fit: a prefix that all nodes reach and that is this
    fit's alone, or None for a temporary folder.
    """

    train: TrainingSplit
    validation: TrainingSplit
    parameters: dict[str, Any]
    num_boost_round: int
    early_stopping_rounds: int
    num_workers: int | None = None
    cpus_per_worker: int = 1
    checkpoint_uri: str | None = None

    @property
    def checkpoint_rounds(self) -> int:
        """Rounds between two checkpoints."""
        return max(25, self.num_boost_round // _CHECKPOINTS)

    @property
    def threads(self) -> int:
        """Threads of each worker."""
        return useful_threads(self.train.rows // (self.num_workers or 1), self.cpus_per_worker)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features, in the order of the matrices' columns."""
        return self.train.scaler.features


@dataclass(frozen=True)
class EngineResult:
    """A booster with all its rounds and its history, and the addresses of the nodes that fitted it.

    `num_workers`: how many it were in the end, if not as many as asked for. `resumed_at`: rounds that an interrupted
    group of workers had fitted before.
    """

    booster: xgb.Booster
    nodes: tuple[str, ...]
    num_workers: int | None = None
    resumed_at: int = 0


@dataclass(frozen=True)
class FitResult:
    """The booster of the best rounds, and how it came about. RMSE is in the target's unit."""

    booster: xgb.Booster
    history: History
    best_rounds: int
    train_rmse: float
    validation_rmse: float
    seconds: float
    num_workers: int
    nodes: tuple[str, ...]
    resumed_at: int = 0


def fit(engine: str, request: FitRequest) -> FitResult:
    """Fit with early stopping on the validation split, on `request.num_workers` workers of the Ray cluster.

    Raises `StepError` if the cluster has no room for the workers, or the split has fewer rows than there are workers.
    """
    start = time.perf_counter()
    request = with_resources(request)
    train_booster: Callable[[FitRequest], EngineResult] = importlib.import_module(ENGINES[engine]).train_booster
    result = run_in_thread(lambda: train_booster(request))
    booster, history = finished(result.booster, request.features)
    best = history.best_rounds
    return FitResult(
        booster=booster,
        history=history,
        best_rounds=best,
        train_rmse=history.train[best - 1],
        validation_rmse=history.validation[best - 1],
        seconds=time.perf_counter() - start,
        num_workers=result.num_workers or request.num_workers or 1,
        nodes=result.nodes,
        resumed_at=result.resumed_at,
    )


def with_resources(request: FitRequest) -> FitRequest:
    """`request` with the number of workers and their CPUs filled in."""
    nodes = node_cpus()
    num_workers = request.num_workers or len(nodes)
    if (rows := min(request.train.rows, request.validation.rows)) < num_workers:
        raise StepError(f"num_workers is {num_workers}, but a split has only {rows} rows: ask for fewer workers")
    if (cpus := cpus_per_worker(num_workers, nodes)) == 0:
        raise StepError(
            f"num_workers is {num_workers}, but the Ray cluster has {sum(nodes)} CPUs: ask for fewer workers"
        )
    return replace(request, num_workers=num_workers, cpus_per_worker=cpus)


def with_fewer_workers(request: FitRequest) -> FitRequest:
    """`request` with as many of its workers as the nodes that are left have CPUs for, at least one."""
    nodes = node_cpus()
    num_workers = min(request.num_workers or 1, sum(nodes))
    return replace(request, num_workers=num_workers, cpus_per_worker=cpus_per_worker(num_workers, nodes))


def boost(
    request: FitRequest,
    rank: int = 0,
    num_workers: int = 1,
    checkpoint: xgb.Booster | None = None,
    callbacks: tuple[TrainingCallback, ...] = (),
) -> xgb.Booster:
    """The loop of one worker, which reads its own part of both splits. Goes on from `checkpoint`.

    Validation rows are divided too: XGBoost adds up the squared errors of all workers, so that the metric is that of
    the whole split, and no row is predicted twice.
    """
    train = request.train.load(rank, num_workers)
    validation = request.validation.load(rank, num_workers)
    with openmp_threads(request.threads):
        dtrain, dvalidation = quantile_matrices(train, validation, request.threads)
        del train, validation
        return xgb.train(
            request.parameters | {"nthread": request.threads},
            dtrain,
            num_boost_round=request.num_boost_round - (checkpoint.num_boosted_rounds() if checkpoint else 0),
            evals=[(dtrain, "train"), (dvalidation, "validation")],
            verbose_eval=False,
            xgb_model=checkpoint,
            callbacks=[EarlyStopping(request.early_stopping_rounds, request.checkpoint_rounds), *callbacks],
        )


def boost_in_task(request: FitRequest) -> EngineResult:
    """Run `boost` as one Ray task with the CPUs of the largest node. A lost process is replaced once."""

    def task() -> EngineResult:
        return EngineResult(boost(request), (ray.util.get_node_ip_address(),))

    remote = ray.remote(task).options(num_cpus=request.cpus_per_worker, max_retries=1)
    try:
        return ray.get(remote.remote())
    except RayTaskError as error:
        if isinstance(error.cause, StepError):
            raise error.cause from error
        raise
