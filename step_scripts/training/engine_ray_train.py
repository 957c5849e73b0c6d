"""The final fit by Ray Train's `XGBoostTrainer`."""

from __future__ import annotations

import math
import tempfile
import uuid
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError  # has no public name

from step_scripts.model.xgboost_native import TrainingCallback, xgb
from step_scripts.runner import storage
from step_scripts.runner.cluster_resources import no_room, wait_seconds
from step_scripts.runner.contract import StepError
from step_scripts.runner.ray_environment import environment_defaults
from step_scripts.training.engines import WHAT, EngineResult, FitRequest, WorkersLost, boost, boost_in_task
from step_scripts.training.fit_checkpoints import Checkpoint

_MODEL = "model.ubj"
_NODES = "nodes"
# The controller takes a worker's reports, and notices its end, once an interval; Ray's own is 2 s. What it does then
# costs a few hundredths of a second of boosting, since all workers wait for one; the end takes two or three intervals.
# So the cheapest interval grows with the square root of the fit's length. Measured on two hosts of one core.
_LOOK_SECONDS = 0.04
_END_INTERVALS = 2.4
_ROW_SECONDS = 1.2e-7  # a row in a round, on one core
_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 0.1, 2.0


def train_booster(request: FitRequest, checkpoint: Checkpoint | None) -> EngineResult:
    """Fit on a group of workers, from `checkpoint` on; a single worker needs no group and is a plain task.

    Raises `WorkersLost` if the group ended for no reason of its own.
    """
    if request.num_workers == 1:
        return boost_in_task(request, checkpoint)
    with environment_defaults(_settings(request)):
        try:
            booster = _fit(request, checkpoint)
        except ray.train.TrainingFailedError as error:
            if (own := _own_error(error)) is not None:
                raise own from error
            if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                raise no_room(WHAT) from error
            raise WorkersLost(str(error)) from error
    return EngineResult(booster, tuple(sorted(set((booster.attr(_NODES) or "").split()))))


def _settings(request: FitRequest) -> dict[str, str]:
    """Of Ray Train."""
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": f"{controller_interval(request):.2f}",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{wait_seconds():g}",
        # An actor that tells workers of nodes that are about to be drained; these do not ask.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }


def controller_interval(request: FitRequest) -> float:
    """Seconds between two looks of Ray Train's controller at the workers of this fit."""
    cores = (request.num_workers or 1) * request.threads
    boosting = request.train.rows * request.num_boost_round * _ROW_SECONDS / cores
    cheapest = math.sqrt(_LOOK_SECONDS * boosting / _END_INTERVALS)
    return min(max(cheapest, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)


def _fit(request: FitRequest, start: Checkpoint | None) -> xgb.Booster:
    from ray.train.xgboost import XGBoostTrainer  # imports XGBoost, which `xgboost_native` is to do first

    assert request.checkpoint_uri is not None  # see `step_scripts.training.engines.fit`
    filesystem, path = storage.filesystem(request.checkpoint_uri)
    trainer = XGBoostTrainer(
        _train_loop,
        train_loop_config={"request": request, "start": start},
        scaling_config=ray.train.ScalingConfig(
            num_workers=request.num_workers or 1,
            resources_per_worker={"CPU": request.cpus_per_worker},
            placement_strategy="SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name=f"run-{uuid.uuid4().hex[:12]}",  # another one each time: Ray Train would go on from what it finds
            storage_path=path,
            storage_filesystem=filesystem,
            # Groups are started again by the caller, which knows how many workers there is room for.
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    return _load(trainer.fit().checkpoint)


def _own_error(error: ray.train.TrainingFailedError) -> StepError | None:
    """The `StepError` of a worker, if that is why the group ended."""
    if isinstance(error, ray.train.WorkerGroupError):
        for failure in error.worker_failures.values():
            for cause in (failure, getattr(failure, "cause", None), failure.__cause__):
                if isinstance(cause, StepError):
                    return cause
    return None


def _train_loop(config: dict[str, Any]) -> None:
    context = ray.train.get_context()
    result = _Result(context.get_world_rank())
    boost(config["request"], context.get_world_rank(), context.get_world_size(), config["start"], (result,))


class _Result(TrainingCallback):
    """Notes on which nodes the workers are, and hands the booster to Ray Train at the end.

    Metrics are not reported: that would be slow.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def before_training(self, model: Any) -> Any:
        """Note on which nodes the workers are."""
        model.set_attr(**{_NODES: " ".join(_gather(ray.util.get_node_ip_address()))})
        return model

    def after_training(self, model: Any) -> Any:
        """Keep the result."""
        rounds = {"rounds": model.num_boosted_rounds()}
        if self._rank != 0:
            ray.train.report(rounds, checkpoint=None)
            return model
        with tempfile.TemporaryDirectory() as folder:
            model.save_model(Path(folder, _MODEL))
            ray.train.report(rounds, checkpoint=ray.train.Checkpoint.from_directory(folder))
        return model


def _gather(address: str) -> list[str]:
    size, rank = xgb.collective.get_world_size(), xgb.collective.get_rank()
    addresses = [xgb.collective.broadcast(address if root == rank else None, root) for root in range(size)]
    return sorted({found for found in addresses if found is not None})


def _load(checkpoint: ray.train.Checkpoint | None) -> xgb.Booster:
    if checkpoint is None:
        raise RuntimeError("the workers of Ray Train ended without a checkpoint")
    with checkpoint.as_directory() as folder:
        return xgb.Booster(model_file=Path(folder, _MODEL))
