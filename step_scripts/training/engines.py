"""The final fit behind one interface, and the engines that run it."""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError

from step_scripts.model.xgboost_native import TrainingCallback, xgb
from step_scripts.runner import storage
from step_scripts.runner.background import run_in_thread
from step_scripts.runner.cluster_resources import (
    await_lost_nodes,
    cpus_per_worker,
    free_cpus,
    node_cpus,
    reserved,
    scratch_folder,
    waiting_is_told,
)
from step_scripts.runner.contract import Reporter, StepError
from step_scripts.runner.wording import counted
from step_scripts.training.boosting import (
    History,
    SegmentedBoosting,
    finished,
    openmp_threads,
    quantile_matrices,
    segment_parameters,
    segment_rounds,
    useful_threads,
)
from step_scripts.training.fit_checkpoints import Checkpoint, FitCheckpoints, fit_fingerprint
from step_scripts.training.training_data import TrainingSplit

_log = logging.getLogger(__name__)
# Modules with a function `train_booster(FitRequest, Checkpoint | None) -> EngineResult`, which goes on from the
# checkpoint and raises `WorkersLost`; imported only when asked for.
ENGINES = {
    "ray_train": "step_scripts.training.engine_ray_train",
    "xgboost_ray": "step_scripts.training.engine_xgboost_ray",
}
WHAT = "the final fit"
_ATTEMPTS = 3
_NODE_LOSS_SECONDS = 120.0


class WorkersLost(Exception):
    """Workers ended without an error of their own: the fit can go on from a checkpoint, on the nodes that are left."""


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
        """Rounds of a segment, after which there is a checkpoint and random numbers begin anew."""
        return segment_rounds(self.num_boost_round)

    @property
    def checkpoints(self) -> FitCheckpoints | None:
        """The checkpoints of this fit. Those that other parameters or rows have left at the same place are not."""
        if self.checkpoint_uri is None:
            return None
        fingerprint = fit_fingerprint(
            parameters=self.parameters,
            rounds=(self.num_boost_round, self.checkpoint_rounds, self.early_stopping_rounds),
            rows=(self.train.file_rows, self.validation.file_rows),
            columns=(self.train.scaler.to_json(), self.train.target),
        )
        return FitCheckpoints(storage.join(self.checkpoint_uri, "rounds"), fingerprint)

    def segmented(self) -> SegmentedBoosting:
        """What cuts `xgboost.train` into segments, keeps checkpoints and stops early."""
        kept = self.checkpoints
        keep = None if kept is None else kept.save
        return SegmentedBoosting(self.early_stopping_rounds, self.checkpoint_rounds, self.parameters["seed"], keep)

    def parameters_from(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        """Parameters of `xgboost.train` for a fit that goes on from there."""
        rounds = 0 if checkpoint is None else checkpoint.rounds
        return segment_parameters(self.parameters, rounds, self.checkpoint_rounds) | {"nthread": self.threads}

    def rounds_from(self, checkpoint: Checkpoint | None) -> int:
        """Rounds that are left at most."""
        return self.num_boost_round - (0 if checkpoint is None else checkpoint.rounds)

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

    `num_workers`: how many it were in the end. `resumed_at`: rounds that an interrupted group of workers had fitted.
    """

    booster: xgb.Booster
    nodes: tuple[str, ...]
    num_workers: int = 1
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


def fit(engine: str, request: FitRequest, log: Reporter | None = None) -> FitResult:
    """Fit with early stopping on the validation split, on `request.num_workers` workers of the Ray cluster.

    Workers that are lost are replaced, at most twice, on the nodes that are left; the fit goes on from its latest
    checkpoint. So does a fit whose process was ended, if it is called again with the same `checkpoint_uri`. With as
    many workers as before, its result is the one of a fit that was not interrupted.

    Raises `StepError` if the cluster has no room for the workers, or the split has fewer rows than there are workers.
    `log` gets a line that says what is waited for.
    """
    request = run_in_thread(lambda: with_resources(request, log))
    start = time.perf_counter()
    train_booster: _Engine = importlib.import_module(ENGINES[engine]).train_booster
    result = run_in_thread(lambda: _fit(train_booster, request, log))
    booster, history = finished(result.booster, request.features)
    best = history.best_rounds
    return FitResult(
        booster=booster,
        history=history,
        best_rounds=best,
        train_rmse=history.train[best - 1],
        validation_rmse=history.validation[best - 1],
        seconds=time.perf_counter() - start,
        num_workers=result.num_workers,
        nodes=result.nodes,
        resumed_at=result.resumed_at,
    )


_Engine = Callable[[FitRequest, Checkpoint | None], EngineResult]


def _fit(train_booster: _Engine, request: FitRequest, log: Reporter | None) -> EngineResult:
    warn = _log.warning if log is None else log.warning
    with _checkpoints(request) as checkpoints:
        request = replace(request, checkpoint_uri=checkpoints)
        for attempt in range(1, _ATTEMPTS + 1):
            checkpoint = None if request.checkpoints is None else request.checkpoints.latest(warn)
            try:
                with waiting_is_told(WHAT, log):
                    result = train_booster(request, checkpoint)
            except WorkersLost as error:
                if attempt == _ATTEMPTS:
                    raise
                warn(f"the workers of the final fit ended: {error}")
                await_lost_nodes(_NODE_LOSS_SECONDS)
                request = with_fewer_workers(request)
            else:
                resumed_at = 0 if checkpoint is None else checkpoint.rounds
                return replace(result, num_workers=request.num_workers or 1, resumed_at=resumed_at)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _checkpoints(request: FitRequest) -> Iterator[str]:
    """A place for checkpoints, which are removed at the end unless the process is killed."""
    if request.checkpoint_uri is None:
        with scratch_folder("fit-") as folder:
            yield folder
        return
    try:
        yield request.checkpoint_uri
    finally:
        storage.delete(request.checkpoint_uri)


def with_resources(request: FitRequest, log: Reporter | None = None) -> FitRequest:
    """`request` with the number of workers and their CPUs filled in: those that are free, as soon as that is enough."""
    nodes = node_cpus()
    num_workers = request.num_workers or len(nodes)
    if (rows := min(request.train.rows, request.validation.rows)) < num_workers:
        raise StepError(
            f"num_workers is {num_workers}, but a split has only {counted(rows, 'row')}: ask for fewer workers"
        )
    if cpus_per_worker(num_workers, nodes) == 0:
        raise StepError(
            f"num_workers is {num_workers}, but the Ray cluster has {counted(sum(nodes), 'CPU')}: ask for fewer workers"
        )
    cpus = cpus_per_worker(num_workers, free_cpus(WHAT, num_workers, log))
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
    checkpoint: Checkpoint | None = None,
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
            request.parameters_from(checkpoint),
            dtrain,
            num_boost_round=request.rounds_from(checkpoint),
            evals=[(dtrain, "train"), (dvalidation, "validation")],
            verbose_eval=False,
            xgb_model=None if checkpoint is None else bytearray(checkpoint.model),
            callbacks=[request.segmented(), *callbacks],
        )


def boost_in_task(request: FitRequest, checkpoint: Checkpoint | None) -> EngineResult:
    """Run `boost` as one Ray task with the CPUs of the largest node."""

    def task() -> EngineResult:
        return EngineResult(boost(request, checkpoint=checkpoint), (ray.util.get_node_ip_address(),))

    with reserved(WHAT, request.cpus_per_worker, None) as options:  # `fit` reports the waiting
        return result_of(ray.remote(task).options(**options, max_retries=0).remote())


def result_of(reference: ray.ObjectRef) -> EngineResult:
    """What a task returns. Raises its own error if that means something to users or to `fit`."""
    try:
        return ray.get(reference)
    except (WorkerCrashedError, RayActorError) as error:
        raise WorkersLost(str(error)) from error
    except RayTaskError as error:
        if isinstance(error.cause, StepError | WorkersLost):
            raise error.cause from error
        raise
