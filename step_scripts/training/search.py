"""The hyperparameter search: Ray Tune, with Optuna's samplers and an early-stopping scheduler.

Trials that take seconds run as tasks (`step_scripts.training.short_trials`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from step_scripts.parameters import TuneModelParams
from step_scripts.runner.background import run_in_thread
from step_scripts.runner.cluster_resources import cpus_per_worker, free_cpus, no_room, node_cpus, scratch_folder
from step_scripts.runner.contract import Reporter, StepError
from step_scripts.runner.wording import counted
from step_scripts.training.search_algorithm import ContinuedSearch, searcher
from step_scripts.training.search_progress import LivesInDriver, SearchProgress
from step_scripts.training.search_trial import BoostingTrial
from step_scripts.training.short_trials import ShortTrials, are_short
from step_scripts.training.training_data import TrainingSplit
from step_scripts.training.trial_ledger import TrialLedger
from step_scripts.training.trial_matrices import TrialMatrices, trial_matrices
from step_scripts.training.trial_records import TrialRecord, TrialStore
from step_scripts.training.trial_task import TrialTask

_REPORTS_PER_TRIAL = 8
_ROUNDS_WITHOUT_SCHEDULER = 250
_REDUCTION_FACTOR = 3
# What Ray Tune would otherwise write, print or check.
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def scheduler(params: TuneModelParams, report_rounds: int) -> TrialScheduler:
    """What stops bad trials early. Both wait for a quarter of the rounds: a small `eta` begins slowly."""
    resolved = params.resolved()
    grace = max(report_rounds, resolved["num_boost_round"] // 8)
    if resolved["scheduler"] == "asha":
        return ASHAScheduler(
            time_attr="rounds",
            max_t=max(resolved["num_boost_round"], grace),
            grace_period=grace,
            reduction_factor=_REDUCTION_FACTOR,
        )
    if resolved["scheduler"] == "median":
        return MedianStoppingRule(time_attr="rounds", grace_period=grace, min_samples_required=2)
    return FIFOScheduler()


@dataclass(frozen=True)
class SearchResult:
    """All trials, by number. `resumed`: so many of them an earlier attempt had finished.

    `repeatable`: whether a search with the same settings on as many CPUs tries the same trials, interrupted or not.
    Otherwise the order in which trials ended has decided what was tried next, or which trial was stopped early.
    """

    records: list[TrialRecord]
    resumed: int
    repeatable: bool


def run_search(
    params: TuneModelParams,
    train: TrainingSplit,
    validation: TrainingSplit,
    store: TrialStore | None,
    log: Reporter,
) -> SearchResult:
    """Run the trials that `store` does not hold yet.

    Raises `StepError` if no trial succeeded.
    """
    resolved = params.resolved()
    finished = store.load()[: resolved["num_trials"]] if store is not None else []
    if finished:
        log.info(f"not run again, finished before: {len(finished)} of {counted(resolved['num_trials'], 'trial')}")
    ledger = TrialLedger(finished, store, log, resolved["num_trials"])
    nodes = run_in_thread(lambda: free_cpus("the search", 1, log)) if ledger.remaining > 0 else node_cpus()
    # As many for each trial as in a search that was not interrupted: XGBoost's sums depend on the threads.
    concurrent = min(resolved["max_concurrent_trials"] or sum(nodes), resolved["num_trials"], sum(nodes))
    short = are_short(train.rows, resolved["num_boost_round"], resolved["scheduler"])
    with _quiet():
        search = searcher(params, finished, concurrent)
    if not search.replayed:
        log.info("the trials that are left are others than without the interruption: what they build on is not known")
    if ledger.remaining > 0:
        task = TrialTask(
            num_boost_round=resolved["num_boost_round"],
            early_stopping_rounds=resolved["early_stopping_rounds"],
            report_rounds=_report_rounds(resolved),
            cpus=cpus_per_worker(concurrent, nodes),
            seed=resolved["seed"],
        )
        at_once = min(concurrent, ledger.remaining)
        if short:
            _run_short(search, task, train, validation, ledger, at_once)
        else:
            _run_tune(search, params, task, train, validation, ledger, at_once)
    records = sorted(ledger.records, key=lambda r: r.trial)
    if not any(record.rmse is not None for record in records):
        reason = next((r.error for r in records if r.error), "none ran")
        raise StepError(
            f"no trial of {len(records)} succeeded; the first failure: {reason}",
            details={"trials": [r.model_dump(mode="json") for r in records]},
        )
    unaffected_by_order = concurrent == 1 or resolved["search_algorithm"] == "random"
    to_their_end = short or resolved["scheduler"] == "none"
    none_failed = all(record.status == "completed" for record in records)
    repeatable = search.replayed and unaffected_by_order and to_their_end and none_failed
    return SearchResult(records, len(finished), repeatable)


def _report_rounds(resolved: dict[str, Any]) -> int:
    """Rounds between two reports of a trial. Only the early-stopping scheduler and people who wait need them."""
    rounds = resolved["num_boost_round"]
    if resolved["scheduler"] == "none":
        return min(rounds, _ROUNDS_WITHOUT_SCHEDULER)
    return max(1, min(100, -(-rounds // _REPORTS_PER_TRIAL)))


def _run_short(
    search: ContinuedSearch,
    task: TrialTask,
    train: TrainingSplit,
    validation: TrainingSplit,
    ledger: TrialLedger,
    concurrent: int,
) -> None:
    trials = ShortTrials(task, ray.put(train.load()), ray.put(validation.load()))
    with _quiet():
        run_in_thread(lambda: trials.run(search, ledger, concurrent), on_interrupt=trials.stop)


def _run_tune(
    algorithm: ContinuedSearch,
    params: TuneModelParams,
    task: TrialTask,
    train: TrainingSplit,
    validation: TrainingSplit,
    ledger: TrialLedger,
    concurrent: int,
) -> None:
    with trial_matrices(train, validation, concurrent) as matrices:
        _tune(algorithm, params, task, SearchProgress(ledger, matrices), matrices, concurrent)


def _tune(
    algorithm: ContinuedSearch,
    params: TuneModelParams,
    task: TrialTask,
    progress: SearchProgress,
    matrices: TrialMatrices,
    concurrent: int,
) -> None:
    ledger = progress.ledger
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        progress.kill_actors()

    def search(folder: str) -> None:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(BoostingTrial, task=task), {"cpu": task.cpus}),
            tune_config=tune.TuneConfig(
                metric="rmse",
                mode="min",
                num_samples=ledger.remaining,
                max_concurrent_trials=concurrent,
                search_alg=algorithm,
                scheduler=scheduler(params, task.report_rounds),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=f"search-{uuid.uuid4().hex[:12]}",
                storage_path=folder,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[progress],
                stop=_StopEarly(stopped, progress, matrices),
            ),
        )
        tuner.fit()
        if progress.starved:
            raise no_room("the trials of the search")

    def search_and_clean_up() -> None:
        # In the thread that searches: after an interrupt it may be the last to end.
        with _quiet(), scratch_folder("tune-") as folder:
            try:
                search(folder)
            finally:
                for leftover in progress.folders:
                    shutil.rmtree(leftover, ignore_errors=True)

    run_in_thread(search_and_clean_up, on_interrupt=stop)


class _StopEarly(LivesInDriver, tune.Stopper):
    """Ends the search when whoever waits for it was interrupted, or when nothing but failures can be expected."""

    def __init__(self, interrupted: threading.Event, progress: SearchProgress, matrices: TrialMatrices) -> None:
        self._interrupted = interrupted
        self._progress = progress
        self._matrices = matrices

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._matrices.unreadable or self._interrupted.is_set()

    def stop_all(self) -> bool:
        """Whether no trial shall start any more."""
        progress = self._progress
        hopeless = progress.ledger.hopeless or progress.starved
        return hopeless or self._matrices.unreadable or self._interrupted.is_set()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _QUIET}
    loggers = {name: logging.getLogger(name).level for name in ("ray.tune", "ray.train", "ray.air", "optuna")}
    os.environ.update(_QUIET)
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
