"""The final fit behind one interface, and the engines that run it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, WorkerCrashedError

from step_scripts.model.xgboost_native import xgb
from step_scripts.runner import storage
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
from step_scripts.runner.processes import run_in_thread
from step_scripts.runner.wording import counted
from step_scripts.training.boosting import (
    Checkpoint,
    FitCheckpoints,
    History,
    SegmentedBoosting,
    finished,
    openmp_threads,
    quantile_matrices,
    segment_rounds,
    segment_seed,
    useful_threads,
)
from step_scripts.training.training_data import TrainingSplit

_log = logging.getLogger(__name__)
# Modules with a function `train_booster(FitRequest, Checkpoint) -> FitResult`, which goes on from the checkpoint and
# raises `WorkersLost`; imported only when asked for.
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
        decisive = {
            "parameters": self.parameters,
            "rounds": (self.num_boost_round, self.checkpoint_rounds, self.early_stopping_rounds),
            "rows": (self.train.file_rows, self.validation.file_rows),
            "columns": (self.train.scaler.to_json(), self.train.target),
        }
        text = json.dumps(decisive, sort_keys=True, default=str)
        uri = storage.join(self.checkpoint_uri, "rounds")
        return FitCheckpoints(uri, hashlib.sha256(text.encode()).hexdigest())

    def segmented(self) -> SegmentedBoosting:
        """What cuts `xgboost.train` into segments, keeps checkpoints and stops early."""
        kept = self.checkpoints
        keep = None if kept is None else kept.save
        return SegmentedBoosting(self.early_stopping_rounds, self.checkpoint_rounds, self.parameters["seed"], keep)

    def parameters_from(self, start: Checkpoint) -> dict[str, Any]:
        """Parameters of `xgboost.train` for a fit that goes on from there, the end of a segment."""
        seed = segment_seed(self.parameters["seed"], start.rounds // self.checkpoint_rounds)
        return self.parameters | {"seed": seed, "nthread": self.threads}

    @property
    def threads(self) -> int:
        """Threads of each worker."""
        return useful_threads(self.train.rows // (self.num_workers or 1), self.cpus_per_worker)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features, in the order of the matrices' columns."""
        return self.train.scaler.features


@dataclass(frozen=True)
class FitResult:
    """A booster, the addresses of the nodes that fitted it, and how it came about. RMSE is in the target's unit.

    Engines return all rounds of the booster, `fit` the best ones. `num_workers`: how many it were in the end.
    `resumed_at`: rounds that an interrupted group of workers had fitted.
    """

    booster: xgb.Booster
    nodes: tuple[str, ...]
    num_workers: int = 1
    resumed_at: int = 0
    history: History = field(default_factory=History)
    seconds: float = 0.0

    @property
    def best_rounds(self) -> int:
        """Rounds of the booster."""
        return self.history.best_rounds

    @property
    def train_rmse(self) -> float:
        """RMSE of the booster on the training split."""
        return self.history.train[self.best_rounds - 1]

    @property
    def validation_rmse(self) -> float:
        """RMSE of the booster on the validation split."""
        return self.history.validation[self.best_rounds - 1]


def fit(engine: str, request: FitRequest, log: Reporter = _log) -> FitResult:
    """Fit with early stopping on the validation split, on `request.num_workers` workers of the Ray cluster.

    Workers that are lost are replaced, at most twice, on the nodes that are left; the fit goes on from its latest
    checkpoint. So does a fit whose process was ended, if it is called again with the same `checkpoint_uri`. With as
    many workers as before, its result is the one of a fit that was not interrupted.

    Raises `StepError` if the cluster has no room for the workers, or the split has fewer rows than there are workers.
    `log` gets a line that says what is waited for.
    """
    request = run_in_thread(lambda: _with_resources(request, log))
    start = time.perf_counter()
    result = run_in_thread(lambda: _fit(engine, request, log))
    booster, history = finished(result.booster, request.features)
    return replace(result, booster=booster, history=history, seconds=time.perf_counter() - start)


def _fit(engine: str, request: FitRequest, log: Reporter) -> FitResult:
    train_booster: Callable[[FitRequest, Checkpoint], FitResult] = importlib.import_module(
        ENGINES[engine]
    ).train_booster
    with contextlib.ExitStack() as stack:
        uri = request.checkpoint_uri or stack.enter_context(scratch_folder("fit-"))
        stack.callback(storage.delete, uri)  # at the end, unless the process is killed
        request = replace(request, checkpoint_uri=uri)
        for attempt in range(1, _ATTEMPTS + 1):
            start = (request.checkpoints and request.checkpoints.latest(log.warning)) or Checkpoint()
            try:
                with waiting_is_told(WHAT, log):
                    result = train_booster(request, start)
            except WorkersLost as error:
                if attempt == _ATTEMPTS:
                    raise
                log.warning(f"the workers of the final fit ended: {error}")
                await_lost_nodes(_NODE_LOSS_SECONDS)
                nodes = node_cpus()
                fewer = min(request.num_workers or 1, sum(nodes))
                request = replace(request, num_workers=fewer, cpus_per_worker=cpus_per_worker(fewer, nodes))
            else:
                return replace(result, num_workers=request.num_workers or 1, resumed_at=start.rounds)
    raise AssertionError("unreachable")


def _with_resources(request: FitRequest, log: Reporter) -> FitRequest:
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


def boost(
    request: FitRequest, rank: int = 0, num_workers: int = 1, checkpoint: Checkpoint | None = None
) -> xgb.Booster:
    """The loop of one worker, which reads its own part of both splits. Goes on from `checkpoint`.

    Validation rows are divided too: XGBoost adds up the squared errors of all workers, so that the metric is that of
    the whole split, and no row is predicted twice.
    """
    start = checkpoint or Checkpoint()
    train = request.train.load(rank, num_workers)
    validation = request.validation.load(rank, num_workers)
    with openmp_threads(request.threads):
        dtrain, dvalidation = quantile_matrices(train, validation, request.threads)
        del train, validation
        return xgb.train(
            request.parameters_from(start),
            dtrain,
            num_boost_round=request.num_boost_round - start.rounds,
            evals=[(dtrain, "train"), (dvalidation, "validation")],
            verbose_eval=False,
            xgb_model=bytearray(start.model) or None,
            callbacks=[request.segmented()],
        )


def boost_in_task(request: FitRequest, start: Checkpoint) -> FitResult:
    """Run `boost` as one Ray task with the CPUs of the largest node."""

    def task() -> FitResult:
        return FitResult(boost(request, checkpoint=start), (ray.util.get_node_ip_address(),))

    with reserved(WHAT, request.cpus_per_worker) as options:  # `fit` reports the waiting
        return result_of(ray.remote(task).options(**options, max_retries=0).remote())


def result_of(reference: ray.ObjectRef) -> FitResult:
    """What a task returns. Raises its own error if that means something to users or to `fit`."""
    try:
        return ray.get(reference)
    except (WorkerCrashedError, RayActorError) as error:
        raise WorkersLost(str(error)) from error
    except RayTaskError as error:
        if (own := error_within(error, StepError | WorkersLost)) is None:
            raise
        raise own from error


def error_within(error: BaseException | None, kind: Any) -> Any:
    """The error of that kind that an error of Ray, or of a library on Ray, stems from; None if there is none."""
    while error is not None and (isinstance(error, RayError) or not isinstance(error, kind)):
        error = getattr(error, "cause", None) or error.__cause__
    return error
