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

from step_scripts.model import xgb
from step_scripts.runner import storage
from step_scripts.runner.cluster_resources import no_room, reserved, wait_seconds
from step_scripts.runner.contract import StepError
from step_scripts.runner.ray_environment import environment_defaults
from step_scripts.training.engines import WHAT, Checkpoint, FitRequest, WorkersLost, boost, error_within, result_of

_MODEL = "model.ubj"
# The controller takes a worker's reports, and notices its end, once an interval; Ray's own is 2 s. What it does then
# costs a few hundredths of a second of boosting, since all workers wait for one; the end takes two or three intervals.
# So the cheapest interval grows with the square root of the fit's length. Measured on two hosts of one core.
_LOOK_SECONDS = 0.04
_END_INTERVALS = 2.4
_ROW_SECONDS = 1.2e-7  # a row in a round, on one core
_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 0.1, 2.0


def train_booster(request: FitRequest, start: Checkpoint) -> tuple[xgb.Booster, tuple[str, ...]]:
    """Fit on a group of workers, from `start` on; a single worker needs no group and is a plain task.

    Raises `WorkersLost` if the group ended for no reason of its own.
    """
    if request.num_workers == 1:
        # By a lambda, which is sent as it is: its process need not import this module, and with it Ray Train.
        alone: Any = ray.remote(lambda: (boost(request, checkpoint=start), (ray.util.get_node_ip_address(),)))
        with reserved(WHAT, request.cpus_per_worker) as options:  # `fit` reports the waiting
            return result_of(alone.options(**options, max_retries=0).remote())
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": f"{controller_interval(request):.2f}",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{wait_seconds():g}",
        # An actor that tells workers of nodes that are about to be drained; these do not ask.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
    with environment_defaults(settings):
        try:
            result = _trainer(request, start).fit()
        except ray.train.TrainingFailedError as error:
            for failure in error.worker_failures.values() if isinstance(error, ray.train.WorkerGroupError) else ():
                if own := error_within(failure, StepError):
                    raise own from error
            if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                raise no_room(WHAT) from error
            raise WorkersLost(str(error)) from error
    if result.checkpoint is None or result.metrics is None:
        raise RuntimeError("the workers of Ray Train ended without a checkpoint")
    with result.checkpoint.as_directory() as folder:
        return xgb.Booster(model_file=Path(folder, _MODEL)), tuple(result.metrics["nodes"])


def controller_interval(request: FitRequest) -> float:
    """Seconds between two looks of Ray Train's controller at the workers of this fit."""
    cores = request.num_workers * request.threads
    boosting = request.train.rows * request.num_boost_round * _ROW_SECONDS / cores
    cheapest = math.sqrt(_LOOK_SECONDS * boosting / _END_INTERVALS)
    return min(max(cheapest, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)


def _trainer(request: FitRequest, start: Checkpoint) -> Any:
    from ray.train.xgboost import XGBoostTrainer  # imports XGBoost, which `step_scripts.model` is to do first

    filesystem, path = storage.filesystem(request.checkpoint_uri)
    return XGBoostTrainer(
        _train_loop,
        train_loop_config={"request": request, "start": start},
        scaling_config=ray.train.ScalingConfig(
            num_workers=request.num_workers,
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


def _train_loop(config: dict[str, Any]) -> None:
    """Boost, and report the booster and the workers' nodes at the end. To report metrics would be slow."""
    context = ray.train.get_context()
    rank, size, address = context.get_world_rank(), context.get_world_size(), ray.util.get_node_ip_address()
    booster = boost(config["request"], rank, size, config["start"])
    nodes = {xgb.collective.broadcast(address if root == rank else None, root) for root in range(size)}
    with tempfile.TemporaryDirectory() as folder:
        booster.save_model(Path(folder, _MODEL))
        checkpoint = ray.train.Checkpoint.from_directory(folder) if rank == 0 else None
        ray.train.report({"nodes": sorted(filter(None, nodes))}, checkpoint=checkpoint)
