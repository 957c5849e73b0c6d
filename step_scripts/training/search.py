"""The hyperparameter search: Ray Tune, with Optuna's samplers and an early-stopping scheduler."""

from __future__ import annotations

import contextlib
import logging
import shutil
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
from step_scripts.runner.ray_environment import environment_set
from step_scripts.runner.wording import counted
from step_scripts.training.search_algorithm import TrialProposals
from step_scripts.training.search_monitor import SearchMonitor
from step_scripts.training.search_trial import BoostingTrial, TrialSettings
from step_scripts.training.training_data import TrainingSplit
from step_scripts.training.trials import TrialRecord, TrialStore

_REPORTS_PER_TRIAL = 8
_ROUNDS_WITHOUT_SCHEDULER = 250
_REDUCTION_FACTOR = 3
# Training rows × rounds, one or two seconds on a core: to stop a shorter trial early spares little, and the search
# could not be repeated.
_WORTH_STOPPING = 30_000_000
# What Ray Tune would otherwise write, print or check.
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class SearchResult:
    """All trials, by number. `resumed`: so many of them an earlier attempt had finished.

    `repeatable`: whether a search with the same settings on as many CPUs tries the same trials and finds the same,
    interrupted or not. It is not where a scheduler may stop trials, which depends on the order in which they report,
    where a trial failed, or where an interrupted search could not be continued as it had begun.
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
    """Run the trials that `store` does not hold yet. Raises `StepError` if no trial succeeded."""
    resolved = params.resolved()
    num_trials = resolved["num_trials"]
    finished = store.load()[:num_trials] if store is not None else []
    remaining = num_trials - len(finished)
    if finished:
        log.info(f"not run again, finished before: {len(finished)} of {counted(num_trials, 'trial')}")
    nodes = run_in_thread(lambda: free_cpus("the search", 1, log)) if remaining else node_cpus()
    # As many for each trial as in a search that was not interrupted: XGBoost's sums depend on the threads.
    concurrent = min(resolved["max_concurrent_trials"] or sum(nodes), num_trials, sum(nodes))
    with _quiet():
        proposals = TrialProposals(params, finished, concurrent)
    if not proposals.replayed:
        log.info("the trials that are left are others than without the interruption: what they build on is not known")
    stops_early = resolved["scheduler"] != "none" and train.rows * resolved["num_boost_round"] > _WORTH_STOPPING
    records = finished
    if remaining:
        matrices = run_in_thread(lambda: [ray.put(split.load()) for split in (train, validation)])
        monitor = SearchMonitor(proposals, matrices, finished, num_trials, store, log)
        settings = TrialSettings(
            num_boost_round=resolved["num_boost_round"],
            early_stopping_rounds=resolved["early_stopping_rounds"],
            report_rounds=_report_rounds(resolved["num_boost_round"], stops_early),
            cpus=cpus_per_worker(concurrent, nodes),
            seed=resolved["seed"],
        )
        tune_config = tune.TuneConfig(
            metric="rmse",
            mode="min",
            num_samples=remaining,
            max_concurrent_trials=concurrent,
            search_alg=proposals,
            scheduler=_scheduler(resolved["scheduler"] if stops_early else "none", settings),
            reuse_actors=True,
        )
        run_in_thread(lambda: _tune(settings, tune_config, monitor), on_interrupt=monitor.interrupt)
        if monitor.waited_too_long:
            raise no_room("the trials of the search")
        records = sorted(monitor.records, key=lambda record: record.trial)
    if not any(record.rmse is not None for record in records):
        reason = next((r.error for r in records if r.error), "none ran")
        raise StepError(
            f"no trial of {len(records)} succeeded; the first failure: {reason}",
            details={"trials": [r.model_dump(mode="json") for r in records]},
        )
    none_failed = all(record.status == "completed" for record in records)
    return SearchResult(records, len(finished), proposals.replayed and none_failed and not stops_early)


def _tune(settings: TrialSettings, tune_config: tune.TuneConfig, monitor: SearchMonitor) -> None:
    with _quiet(), scratch_folder("tune-") as folder:
        trainable = tune.with_parameters(BoostingTrial, settings=settings)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": settings.cpus}),
            tune_config=tune_config,
            run_config=tune.RunConfig(
                name=f"search-{uuid.uuid4().hex[:12]}",
                storage_path=folder,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[monitor],
                stop=monitor,
            ),
        )
        try:
            tuner.fit()
        finally:
            if monitor.staging_folder is not None:  # Ray Tune leaves it; the session may be that of a cluster
                shutil.rmtree(monitor.staging_folder, ignore_errors=True)


def _report_rounds(rounds: int, stops_early: bool) -> int:
    """Rounds between two reports of a trial. Only the early-stopping scheduler and people who wait need them."""
    if not stops_early:
        return min(rounds, _ROUNDS_WITHOUT_SCHEDULER)
    return max(1, min(100, -(-rounds // _REPORTS_PER_TRIAL)))


def _scheduler(name: str, settings: TrialSettings) -> TrialScheduler:
    """What stops bad trials early. It waits for an eighth of the rounds: a small `eta` begins slowly."""
    grace = max(settings.report_rounds, settings.num_boost_round // 8)
    if name == "asha":
        return ASHAScheduler(
            time_attr="rounds",
            max_t=max(settings.num_boost_round, grace),
            grace_period=grace,
            reduction_factor=_REDUCTION_FACTOR,
        )
    if name == "median":
        return MedianStoppingRule(time_attr="rounds", grace_period=grace, min_samples_required=2)
    return _ToTheirEnd()


class _ToTheirEnd(FIFOScheduler):
    """Runs all trials to their end. A trial whose actor is starting is left to that actor.

    Ray Tune would move it to an actor that is free, end the one that is starting, and start another for the next trial.
    In a search of short trials one actor would do all the work, and the CPUs would be busy with starting others.
    """

    def choose_trial_to_run(self, tune_controller: Any, **kwargs: Any) -> None:
        """None: trials that wait begin in their order, in actors that are free before others are started."""
        return


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air", "optuna")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with environment_set(_QUIET):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
