"""The final fit by xgboost_ray 0.1.19, its last version, which was written for XGBoost 1 and 2."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pandas as pd
import ray
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from step_scripts.model import xgb
from step_scripts.runner.cluster_resources import no_room, wait_seconds
from step_scripts.runner.contract import StepError
from step_scripts.training.boosting import TrainingSplit
from step_scripts.training.engines import WHAT, Checkpoint, FitRequest, WorkersLost, error_within, result_of


def train_booster(request: FitRequest, start: Checkpoint) -> tuple[xgb.Booster, tuple[str, ...]]:
    """Fit on one actor a worker, from `start` on; raises `WorkersLost` if xgboost_ray fails, whatever the reason."""
    # What xgboost_ray leaves behind when it fails runs in this group, and ends with it.
    group = placement_group([{"CPU": request.cpus_per_worker}] * request.num_workers, strategy="SPREAD")
    try:
        if not group.wait(wait_seconds()):
            raise no_room(WHAT)
        place = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
        # Its process ends with it (`max_calls`), and with that all that was adapted.
        task: Any = ray.remote(num_cpus=0, max_calls=1, max_retries=0, scheduling_strategy=place)(_fit)
        return result_of(task.remote(request, start))
    finally:
        remove_placement_group(group)


def _fit(request: FitRequest, start: Checkpoint) -> tuple[xgb.Booster, tuple[str, ...]]:
    main, results = adapted_main(), {}
    train, validation = (_matrix(main, split, request.num_workers) for split in (request.train, request.validation))

    # Workers are ranked as their actors; by addresses of objects, as otherwise, bins would differ from fit to fit.
    class Worker(main.DistributedCallback):
        def before_train(self, actor: Any, *args: Any, **kwargs: Any) -> None:
            main.put_queue(ray.util.get_node_ip_address())
            context = main._RabitContext  # of the actor's process, which trains once
            main._RabitContext = lambda _, arguments: context(f"{actor.rank:06d}", arguments)

    try:
        booster = main.train(
            request.parameters_from(start),
            train,
            request.num_boost_round - start.rounds,
            evals=[(train, "train"), (validation, "validation")],
            additional_results=results,
            ray_params=main.RayParams(
                num_actors=request.num_workers,
                cpus_per_actor=request.cpus_per_worker,
                gpus_per_actor=0,
                checkpoint_frequency=request.num_boost_round + 1,
                distributed_callbacks=[Worker()],
                verbose=False,
            ),
            verbose_eval=False,
            xgb_model=start.model or None,
            callbacks=[request.segmented()],
        )
    except RuntimeError as error:  # does not say whether a worker was lost or has failed
        reason = error.__cause__ and error.__cause__.__cause__
        raise error_within(error, StepError) or WorkersLost(f"xgboost_ray failed: {reason or error}") from error
    return booster, tuple(sorted({node for nodes in results["callback_returns"] for node in nodes}))


def _matrix(main: Any, split: TrainingSplit, num_workers: int) -> Any:
    """The split by the protocol `__partitioned__`: each worker reads its own part."""

    def get(ranks: list[int]) -> list[pd.DataFrame]:
        features, target = split.load(ranks[0], num_workers)
        return [pd.DataFrame(features, columns=list(split.scaler.features)).assign(**{split.target: target})]

    parts = {(rank, 0): {"data": rank, "location": [""]} for rank in range(num_workers)}
    described = {"shape": (split.rows, 1), "partition_tiling": (num_workers, 1), "partitions": parts, "get": get}
    return main.RayDMatrix(SimpleNamespace(__partitioned__=described), label=split.target)


def adapted_main() -> Any:
    """xgboost_ray's main module with the tracker of XGBoost 3, through which workers find each other."""
    import xgboost_ray.main

    main: Any = xgboost_ray.main

    def start_tracker(num_workers: int) -> tuple[threading.Thread, dict[str, Any]]:
        tracker = xgb.RabitTracker(n_workers=num_workers, host_ip=ray.util.get_node_ip_address(), sortby="task")
        tracker.start()
        # It serves only while somebody waits for it. A group that lost a member never ends, hence a daemon.
        thread = threading.Thread(target=tracker.wait_for, daemon=True)
        thread.start()
        return thread, dict(tracker.worker_args())

    main._start_rabit_tracker = start_tracker
    main._stop_rabit_tracker = lambda thread: thread.join(2.0)  # seconds; it ends with the workers
    return main
