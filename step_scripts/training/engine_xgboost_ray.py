"""The final fit by xgboost_ray, which was written for XGBoost 1 and 2 and is adapted here to XGBoost 3.

Only the driver is adapted: the tracker, through which workers find each other, has another interface since XGBoost 2.1.
Partitions go to the actors by the `__partitioned__` protocol: Ray datasets would be split evenly, and so lose rows.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pandas as pd
import ray
from ray.exceptions import RayActorError, RayTaskError

from step_scripts.model.xgboost_native import xgb
from step_scripts.runner.cluster_resources import no_room, wait_seconds
from step_scripts.runner.contract import StepError
from step_scripts.training.engines import WHAT, EngineResult, FitRequest, WorkersLost
from step_scripts.training.fit_checkpoints import Checkpoint
from step_scripts.training.training_data import TrainingSplit

_REPLACED = (
    "_start_rabit_tracker",
    "_stop_rabit_tracker",
    "_create_actor",
    "_create_communication_processes",
    "_create_placement_group",
    "_train",
)
_TRACKER_STOP_SECONDS = 2.0


def train_booster(request: FitRequest, checkpoint: Checkpoint | None) -> EngineResult:
    """Fit on one actor a worker, from `checkpoint` on.

    Raises `StepError` if the installed xgboost_ray cannot be adapted, `RuntimeError` if XGBoost fails, and
    `WorkersLost` if an actor is lost.
    """
    num_workers = request.num_workers or 1
    with _adapted() as (main, started):
        matrices = [_matrix(split, num_workers) for split in (request.train, request.validation)]
        booster = main.train(
            request.parameters_from(checkpoint),
            matrices[0],
            request.rounds_from(checkpoint),
            evals=[(matrices[0], "train"), (matrices[1], "validation")],
            ray_params=main.RayParams(
                num_actors=num_workers,
                cpus_per_actor=request.cpus_per_worker,
                gpus_per_actor=0,
                max_actor_restarts=0,
                checkpoint_frequency=request.num_boost_round + 1,
                distributed_callbacks=[_in_order(main)],
                verbose=False,
            ),
            verbose_eval=False,
            xgb_model=None if checkpoint is None else checkpoint.model,
            callbacks=[request.segmented()],
        )
        return EngineResult(booster, started.nodes())


def _in_order(main: ModuleType) -> Any:
    """What gives the workers of XGBoost the ranks of their actors.

    They would be sorted by the address of an object, and so would their rows' summaries, of which the bins are made.
    """

    class InOrder(importlib.import_module("xgboost_ray.callback").DistributedCallback):
        def before_train(self, actor: Any, *args: Any, **kwargs: Any) -> None:
            context = main._RabitContext  # of the actor's process, which trains once
            main.__dict__["_RabitContext"] = lambda _, arguments: context(f"{actor.rank:06d}", arguments)

    return InOrder()


class _Partitions:
    """Data frames in Ray's object store, one a worker, as the `__partitioned__` protocol describes them."""

    def __init__(self, references: list[Any], addresses: list[str], shape: tuple[int, int]) -> None:
        self.__partitioned__ = {
            "shape": shape,
            "partition_tiling": (len(references), 1),
            "partitions": {
                (i, 0): {"data": reference, "location": [address]}
                for i, (reference, address) in enumerate(zip(references, addresses, strict=True))
            },
            "get": ray.get,
        }


def _matrix(split: TrainingSplit, num_workers: int) -> Any:
    """A `RayDMatrix` of the split, read and scaled in parallel."""
    from xgboost_ray import RayDMatrix

    def part(rank: int) -> tuple[pd.DataFrame, str]:
        matrix = split.load(rank, num_workers)
        frame = pd.DataFrame(matrix.features, columns=list(split.scaler.features), copy=False)
        frame[split.target] = matrix.target
        return frame, ray.util.get_node_ip_address()

    read = ray.remote(part).options(num_cpus=1, num_returns=2, scheduling_strategy="SPREAD", max_retries=2)
    parts: list[Any] = [read.remote(rank) for rank in range(num_workers)]
    try:
        addresses = ray.get([address for _, address in parts])
    except RayTaskError as error:
        if isinstance(error.cause, StepError):
            raise error.cause from error
        raise
    shape = (split.rows, len(split.scaler.features) + 1)
    partitions: Any = _Partitions([frame for frame, _ in parts], addresses, shape)
    return RayDMatrix(partitions, label=split.target)


class _Started:
    """What xgboost_ray has started. It cleans up after itself only when all went well."""

    def __init__(self) -> None:
        self.actors: list[Any] = []
        self.communication: list[Any] = []
        self.placement_groups: list[Any] = []
        self._addresses: list[Any] = []

    def recording(self, create: Callable[..., Any], into: list[Any]) -> Callable[..., Any]:
        """`create`, whose results are noted in `into`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            made = create(*args, **kwargs)
            several = isinstance(made, tuple)
            into.extend(made if several else [made])
            if into is self.actors and not several:
                self._addresses.append(made.ip.remote())
            return made

        return call

    def nodes(self) -> tuple[str, ...]:
        """Addresses of the nodes that had an actor, in order."""
        addresses = set()
        for reference in self._addresses:
            with contextlib.suppress(RayActorError):  # it was lost and replaced
                addresses.add(ray.get(reference))
        return tuple(sorted(addresses))

    def end(self) -> None:
        """End all that is left."""
        for actor in self.actors:
            ray.kill(actor)
        for process in self.communication:
            process.shutdown()
        for group in self.placement_groups:
            ray.util.remove_placement_group(group)


class _Tracker:
    """XGBoost's tracker for a group of workers, ended by the workers themselves when they are done."""

    def __init__(self, num_workers: int) -> None:
        self._tracker = xgb.RabitTracker(n_workers=num_workers, host_ip=ray.util.get_node_ip_address(), sortby="task")
        self._tracker.start()
        # The tracker serves only while somebody waits for it. A group that lost a member never ends, hence a daemon.
        self._thread = threading.Thread(target=self._wait, name="xgboost-tracker", daemon=True)
        self._thread.start()
        self.arguments = dict(self._tracker.worker_args())

    def _wait(self) -> None:
        with contextlib.suppress(xgb.core.XGBoostError):  # reported by the workers
            self._tracker.wait_for()

    def stop(self) -> None:
        """Wait for the end of the group, for a while."""
        self._thread.join(_TRACKER_STOP_SECONDS)


def _with_plain_errors(train: Callable[..., Any]) -> Callable[..., Any]:
    """`train`, which says whether an actor was lost or XGBoost failed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        except RayActorError as error:
            if isinstance(error.__cause__, RayTaskError) and not kwargs["_training_state"].failed_actor_ranks:
                raise RuntimeError(f"xgboost_ray failed: {error.__cause__}") from error
            raise WorkersLost(str(error.__cause__ or error)) from error

    return call


def _with_plain_timeout(create: Callable[..., Any]) -> Callable[..., Any]:
    """`create`, whose time-out says what to do."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return create(*args, **kwargs)
        except TimeoutError as error:
            raise no_room(WHAT) from error

    return call


def _start_tracker(num_workers: int) -> tuple[_Tracker, dict[str, Any]]:
    tracker = _Tracker(num_workers)
    return tracker, tracker.arguments


@contextlib.contextmanager
def _adapted() -> Iterator[tuple[ModuleType, _Started]]:
    """xgboost_ray's main module, adapted for the block; and what it starts, which is ended with the block."""
    with warnings.catch_warnings():
        # One actor is a legal number, and what it imports is old.
        warnings.simplefilter("ignore")
        main = _import_main()
        original = {name: getattr(main, name) for name in _REPLACED}
        environment = os.environ.get("RAY_IGNORE_UNHANDLED_ERRORS")
        main.ENV.PLACEMENT_GROUP_TIMEOUT_S = wait_seconds()
        started = _Started()
        main.__dict__.update(
            _start_rabit_tracker=_start_tracker,
            _stop_rabit_tracker=_Tracker.stop,
            _create_actor=started.recording(original["_create_actor"], started.actors),
            _create_communication_processes=started.recording(
                original["_create_communication_processes"], started.communication
            ),
            _create_placement_group=started.recording(
                _with_plain_timeout(original["_create_placement_group"]), started.placement_groups
            ),
            _train=_with_plain_errors(original["_train"]),
        )
        try:
            yield main, started
        finally:
            main.__dict__.update(original)
            if environment is None:
                os.environ.pop("RAY_IGNORE_UNHANDLED_ERRORS", None)
            started.end()


def _import_main() -> ModuleType:
    try:
        main = importlib.import_module("xgboost_ray.main")
    except ImportError as error:
        raise StepError(f"engine xgboost_ray cannot be used here ({error}): choose engine ray_train") from error
    if missing := [name for name in _REPLACED if not hasattr(main, name)]:
        version = importlib.metadata.version("xgboost-ray")
        raise StepError(
            f"engine xgboost_ray cannot be adapted: version {version} of xgboost-ray lacks {missing}; "
            "install xgboost-ray 0.1.19, or choose engine ray_train"
        )
    return main
