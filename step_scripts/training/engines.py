"""The final fit behind one interface: its checkpoints, what each worker does, and the engines that run it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, WorkerCrashedError
from threadpoolctl import threadpool_limits

from step_scripts.model import xgb
from step_scripts.runner import storage
from step_scripts.runner.cluster_resources import (
    await_lost_nodes,
    cpus_per_worker,
    free_cpus,
    node_cpus,
    scratch_folder,
    waiting_is_told,
)
from step_scripts.runner.contract import Reporter, StepError
from step_scripts.runner.ray_session import run_in_thread
from step_scripts.runner.wording import counted
from step_scripts.training.boosting import (
    History,
    SegmentedBoosting,
    TrainingSplit,
    finished,
    quantile_matrices,
    segment_rounds,
    segment_seed,
    useful_threads,
)

_log = logging.getLogger(__name__)
# Modules with a function `train_booster(FitRequest, Checkpoint)`, which goes on from the checkpoint and returns the
# booster of all rounds and the nodes' addresses, or raises `WorkersLost`. Imported only when asked for.
ENGINES = {
    "ray_train": "step_scripts.training.engine_ray_train",
    "xgboost_ray": "step_scripts.training.engine_xgboost_ray",
}
WHAT = "the final fit"
_ATTEMPTS = 3
_NODE_LOSS_SECONDS = 120.0
_SUFFIX = ".checkpoint"
_KEPT = 2  # checkpoints, so that there is one before a damaged one


class WorkersLost(Exception):
    """Workers ended without an error of their own: the fit can go on from a checkpoint, on the nodes that are left."""


@dataclass(frozen=True)
class Checkpoint:
    """A model with `rounds` rounds in XGBoost's binary form, for `xgboost.train`; without any, where a fit begins."""

    model: bytes = b""
    rounds: int = 0


_BEGINNING = Checkpoint()


@dataclass(frozen=True)
class FitCheckpoints:
    """Files below `uri`: a line with the SHA-256 of the rest, then the model. Those of another `fit` are ignored.

    A local folder is made by whoever calls `latest`. A machine that does not have it keeps nothing.
    """

    uri: str
    fit: str

    def save(self, booster: xgb.Booster) -> None:
        """Keep the booster, and of those before only the latest. A failure is a warning: the fit needs none."""
        if not storage.is_remote(self.uri) and not storage.local_path(self.uri).is_dir():
            return
        model, rounds = bytes(booster.save_raw("ubj")), booster.num_boosted_rounds()
        uri = storage.join(self.uri, f"{self.fit}-{rounds:06d}{_SUFFIX}")
        try:
            storage.write_bytes(uri, _digest(model) + b"\n" + model)
            for old in self._files()[:-_KEPT]:
                storage.delete_file(old)
        except OSError as error:
            _log.warning("round %d could not be kept below %s: %s", rounds, self.uri, error)

    def latest(self, warn: Callable[[str], None]) -> Checkpoint:
        """The latest checkpoint that is whole, or the beginning. What is damaged is reported to `warn`."""
        if not storage.is_remote(self.uri):
            storage.local_path(self.uri).mkdir(parents=True, exist_ok=True)
        for uri in reversed(self._files()):
            try:
                digest, _, model = storage.read_bytes(uri).partition(b"\n")
                if _digest(model) != digest:
                    raise ValueError("it is damaged: its digest is another one")
                return Checkpoint(model, int(uri.rpartition("-")[2].removesuffix(_SUFFIX)))
            except (OSError, ValueError) as error:
                warn(f"the checkpoint {uri} cannot be used ({error}): the final fit goes on from the one before")
        return _BEGINNING

    def _files(self) -> list[str]:
        """Checkpoints of this fit, by their rounds."""
        found = [(uri, uri.rpartition("/")[2]) for uri in storage.list_files(self.uri)]
        return [uri for uri, name in found if name.startswith(f"{self.fit}-") and name.endswith(_SUFFIX)]


def _digest(model: bytes) -> bytes:
    return hashlib.sha256(model).hexdigest().encode()


@dataclass(frozen=True)
class FitRequest:
    """What to fit. `parameters` go to `xgboost.train`.

    `checkpoint_uri` is where workers keep the model while they fit: a prefix that all nodes reach and that is this
    fit's alone; empty: a temporary folder. `fit` fills in the CPUs of each worker.
    """

    train: TrainingSplit
    validation: TrainingSplit
    parameters: dict[str, Any]
    num_boost_round: int
    early_stopping_rounds: int
    num_workers: int = 1
    cpus_per_worker: int = 1
    checkpoint_uri: str = ""

    @property
    def checkpoint_rounds(self) -> int:
        """Rounds of a segment, after which there is a checkpoint and random numbers begin anew."""
        return segment_rounds(self.num_boost_round)

    @property
    def checkpoints(self) -> FitCheckpoints:
        """The checkpoints of this fit. Those that other parameters or rows have left at the same place are not."""
        decisive = {
            "parameters": self.parameters,
            "rounds": (self.num_boost_round, self.checkpoint_rounds, self.early_stopping_rounds),
            "rows": (self.train.file_rows, self.validation.file_rows),
            "columns": (self.train.scaler.to_json(), self.train.target),
        }
        text = json.dumps(decisive, sort_keys=True, default=str)
        fit = hashlib.sha256(text.encode()).hexdigest()[:16]
        return FitCheckpoints(storage.join(self.checkpoint_uri, "rounds"), fit)

    def segmented(self) -> SegmentedBoosting:
        """What cuts `xgboost.train` into segments, keeps checkpoints and stops early."""
        keep = self.checkpoints.save
        return SegmentedBoosting(self.early_stopping_rounds, self.checkpoint_rounds, self.parameters["seed"], keep)

    def parameters_from(self, start: Checkpoint) -> dict[str, Any]:
        """Parameters of `xgboost.train` for a fit that goes on from there, the end of a segment."""
        seed = segment_seed(self.parameters["seed"], start.rounds // self.checkpoint_rounds)
        return self.parameters | {"seed": seed, "nthread": self.threads}

    @property
    def threads(self) -> int:
        """Threads of each worker."""
        return useful_threads(self.train.rows // self.num_workers, self.cpus_per_worker)


@dataclass(frozen=True)
class FitResult:
    """The booster of the best rounds, the addresses of the nodes that fitted it, and how it came about.

    RMSE is in the target's unit. `num_workers`: how many it were in the end. `resumed_at`: rounds that an interrupted
    group of workers had fitted.
    """

    booster: xgb.Booster
    history: History
    nodes: tuple[str, ...]
    num_workers: int
    resumed_at: int
    seconds: float

    @property
    def train_rmse(self) -> float:
        """RMSE of the booster on the training split."""
        return self.history.train[self.history.best_rounds - 1]

    @property
    def validation_rmse(self) -> float:
        """RMSE of the booster on the validation split."""
        return self.history.validation[self.history.best_rounds - 1]


def fit(engine: str, request: FitRequest, log: Reporter = _log) -> FitResult:
    """Fit with early stopping on the validation split, on `request.num_workers` workers of the Ray cluster.

    Workers that are lost are replaced, at most twice, on the nodes that are left; the fit goes on from its latest
    checkpoint. So does a fit whose process was ended, if it is called again with the same `checkpoint_uri`. With as
    many workers as before, its result is the one of a fit that was not interrupted.

    Raises `StepError` if the cluster has no room for the workers, or the split has fewer rows than there are workers.
    `log` gets a line that says what is waited for.
    """
    return run_in_thread(lambda: _fit(engine, request, log))


def _fit(engine: str, request: FitRequest, log: Reporter) -> FitResult:
    request = replace(request, cpus_per_worker=_free_cpus_per_worker(request, log))
    train_booster = importlib.import_module(ENGINES[engine]).train_booster
    began, attempts = time.perf_counter(), 0
    with contextlib.ExitStack() as stack:
        uri = request.checkpoint_uri or stack.enter_context(scratch_folder("fit-"))
        stack.callback(storage.delete_folder, uri)  # at the end, unless the process is killed
        request = replace(request, checkpoint_uri=uri)
        while True:
            start = request.checkpoints.latest(log.warning)
            try:
                with waiting_is_told(WHAT, log):
                    booster, nodes = train_booster(request, start)
                break
            except WorkersLost as error:
                attempts += 1
                if attempts == _ATTEMPTS:
                    raise
                log.warning(f"the workers of the final fit ended: {error}")
                await_lost_nodes(_NODE_LOSS_SECONDS)
                left = node_cpus()
                fewer = min(request.num_workers, sum(left))
                request = replace(request, num_workers=fewer, cpus_per_worker=cpus_per_worker(fewer, left))
    booster, history = finished(booster, request.train.scaler.features)
    seconds = time.perf_counter() - began
    return FitResult(booster, history, nodes, request.num_workers, start.rounds, seconds)


def _free_cpus_per_worker(request: FitRequest, log: Reporter) -> int:
    """CPUs for each worker, of those that are free, as soon as these are enough."""
    nodes, num_workers = node_cpus(), request.num_workers
    if (rows := min(request.train.rows, request.validation.rows)) < num_workers:
        raise StepError(
            f"num_workers is {num_workers}, but a split has only {counted(rows, 'row')}: ask for fewer workers"
        )
    if cpus_per_worker(num_workers, nodes) == 0:
        raise StepError(
            f"num_workers is {num_workers}, but the Ray cluster has {counted(sum(nodes), 'CPU')}: ask for fewer workers"
        )
    return cpus_per_worker(num_workers, free_cpus(WHAT, num_workers, log))


def boost(request: FitRequest, rank: int = 0, num_workers: int = 1, checkpoint: Checkpoint = _BEGINNING) -> xgb.Booster:
    """The loop of one worker, which reads its own part of both splits. Goes on from `checkpoint`.

    Validation rows are divided too: XGBoost adds up the squared errors of all workers, so that the metric is that of
    the whole split, and no row is predicted twice.
    """
    train = request.train.load(rank, num_workers)
    validation = request.validation.load(rank, num_workers)
    # Ray allows a process as many OpenMP threads as the task had CPUs in which OpenMP was loaded, and XGBoost starts no
    # more than that, whatever `nthread` says: a fit on two cores would use one of them after trials that had a core
    # each.
    with threadpool_limits(request.threads, user_api="openmp"):
        dtrain, dvalidation = quantile_matrices(train, validation, request.threads)
        del train, validation
        return xgb.train(
            request.parameters_from(checkpoint),
            dtrain,
            num_boost_round=request.num_boost_round - checkpoint.rounds,
            evals=[(dtrain, "train"), (dvalidation, "validation")],
            verbose_eval=False,
            xgb_model=bytearray(checkpoint.model) or None,
            callbacks=[request.segmented()],
        )


def result_of(reference: ray.ObjectRef) -> Any:
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
