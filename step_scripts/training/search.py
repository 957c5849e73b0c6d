"""The search of a step: which trials are left, how Ray Tune runs them, under a monitor that keeps and reports them."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import ray
import ray.tune.search.optuna  # Optuna sets up its loggers and the environment when it is imported, which is here
from ray import cloudpickle, tune
from ray.exceptions import RayTaskError
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from step_scripts.parameters import TuneModelParams
from step_scripts.runner.cluster_resources import (
    cpus_per_worker,
    free_cpus,
    no_room,
    node_cpus,
    scratch_folder,
    wait_seconds,
)
from step_scripts.runner.contract import Reporter, StepError
from step_scripts.runner.ray_environment import environment_set
from step_scripts.runner.ray_session import run_in_thread
from step_scripts.runner.wording import counted, number
from step_scripts.training.boosting import TrainingSplit
from step_scripts.training.search_trials import BoostingTrial, scheduler
from step_scripts.training.trials import SearchResult, TrialProposals, TrialRecord, TrialStore

# Training rows × rounds, one or two seconds on a core: to stop a shorter trial early spares little, and the search
# could not be repeated.
_WORTH_STOPPING = 30_000_000
_REPORTS_PER_TRIAL = 8  # to the scheduler
_REPORT_ROUNDS = 250  # of a trial that no scheduler watches: people who wait need reports, too
_SECONDS_BETWEEN_MESSAGES = 15.0
_FAILED_TRIALS = 3  # without a completed one: then more trials would fail too
# What Ray Tune would otherwise write, print or check.
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",
}


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
    with quiet():
        proposals = ProposalSearcher(params, finished, concurrent)
    if not proposals.replayed:
        log.info("the trials that are left are others than without the interruption: what they build on is not known")
    stops_early = resolved["scheduler"] != "none" and train.rows * resolved["num_boost_round"] > _WORTH_STOPPING
    records = finished
    if remaining:
        matrices = run_in_thread(lambda: [ray.put(split.load()) for split in (train, validation)])
        monitor = SearchMonitor(proposals, matrices, list(finished), num_trials, store, log)
        rounds = resolved["num_boost_round"]
        reported = max(1, min(100, -(-rounds // _REPORTS_PER_TRIAL))) if stops_early else min(_REPORT_ROUNDS, rounds)
        shared = {"settings": resolved, "report_rounds": reported, "cpus": cpus_per_worker(concurrent, nodes)}
        tune_config = tune.TuneConfig(
            metric="rmse",
            mode="min",
            num_samples=remaining,
            max_concurrent_trials=concurrent,
            search_alg=proposals,
            scheduler=scheduler(resolved["scheduler"] if stops_early else "none", rounds, reported),
            reuse_actors=True,
        )
        run_in_thread(lambda: run_trials(shared, tune_config, monitor), on_interrupt=monitor.interrupt)
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


def run_trials(shared: dict[str, Any], tune_config: tune.TuneConfig, monitor: SearchMonitor) -> None:
    """Run the trials. `shared`: what `BoostingTrial` is set up with."""
    with quiet(), scratch_folder("tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(BoostingTrial, **shared), {"cpu": shared["cpus"]}),
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the loggers of Ray Tune and Optuna, and what else Ray Tune would say, silent."""
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


class LivesInDriver:
    """Base of what Ray Tune would copy, or write to a file that is never read, although the running search uses it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}


class ProposalSearcher(LivesInDriver, TrialProposals, Searcher):
    """The proposals as Ray Tune asks for them."""

    def __init__(self, params: TuneModelParams, finished: list[TrialRecord], concurrent: int) -> None:
        Searcher.__init__(self, metric="rmse", mode="min")
        TrialProposals.__init__(self, params, finished, concurrent)

    def save(self, checkpoint_path: str) -> None:
        """Ray Tune's own checkpoints are not used: a search goes on from the records of its trials."""


@dataclass(eq=False)
class SearchMonitor(LivesInDriver, tune.Callback, tune.Stopper):
    """Keeps and reports the trials that Ray Tune runs, and ends a search in which no trial can succeed.

    `matrices` are references to the `Matrix` of each split, which every actor is given. `records` holds the trials that
    have ended: those of an earlier attempt, and new ones. `waited_too_long`: no trial got a CPU for as long as one may
    wait. `staging_folder`: where Ray Tune keeps files of the search on this machine, in the folder of the Ray session.
    """

    proposals: TrialProposals
    matrices: list[ray.ObjectRef]
    records: list[TrialRecord]
    num_trials: int
    store: TrialStore | None
    log: Reporter
    waited_too_long: bool = False
    staging_folder: Path | None = None
    interrupted: threading.Event = field(default_factory=threading.Event)
    started: dict[str, float] = field(default_factory=dict)
    actors: list[Any] = field(default_factory=list)
    idle_since: float | None = None
    last_message: float = field(default_factory=time.monotonic)

    def interrupt(self) -> None:
        """End the search, and the actors of its trials. From another thread than the search's."""
        self.interrupted.set()
        for actor in self.actors:
            ray.kill(actor)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether this trial is to be stopped; that is the scheduler's decision."""
        return False

    def stop_all(self) -> bool:
        """Whether the search is to be stopped."""
        all_failed = len(self.records) >= _FAILED_TRIALS and all(r.status == "failed" for r in self.records)
        return all_failed or self.waited_too_long or self.interrupted.is_set()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Give the matrices to the trial's actor."""
        self.started[trial.trial_id] = time.monotonic()
        # There is no public way to an actor of Ray Tune, and no other one to give it what should not be kept for good.
        actor: Any = trial.temporary_state.ray_actor
        self.actors.append(actor)
        actor.receive.remote(self.matrices)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Say so while trials wait and none runs, which is because others use the cluster."""
        now = time.monotonic()
        if trials:
            self.staging_folder = Path(trials[0].local_experiment_path).parent
        if not trials or any(trial.status != Trial.PENDING and not trial.is_finished() for trial in trials):
            self.idle_since = None
            return
        self.idle_since = self.idle_since or now
        self.waited_too_long = now - self.idle_since > wait_seconds()
        if min(now - self.idle_since, now - self.last_message) > _SECONDS_BETWEEN_MESSAGES:
            self._say(f"the search waits for CPUs of the Ray cluster, at most {wait_seconds():g} s")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Report an unfinished trial if nothing has been reported for a while."""
        if not result["done"] and time.monotonic() - self.last_message > _SECONDS_BETWEEN_MESSAGES:
            this, rmse = self.proposals.numbers[trial.trial_id], number(result["rmse"])
            self._say(f"trial {this} of {self.num_trials}: round {result['rounds']}, RMSE {rmse}")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record a trial that ended well, or was stopped by the scheduler."""
        names = ("rmse", "rounds", "best_rounds", "stopped_by")
        self._record(trial, status="completed", **{name: trial.last_result[name] for name in names})

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record a trial that failed."""
        self._record(
            trial, rmse=None, rounds=0, best_rounds=0, status="failed", stopped_by="error", error=_reason(trial)
        )

    def _record(self, trial: Trial, **values: Any) -> None:
        if self.interrupted.is_set():  # its end says nothing
            return
        record = TrialRecord(
            trial=self.proposals.numbers[trial.trial_id],
            parameters=dict(trial.config),
            seconds=round(time.monotonic() - self.started.get(trial.trial_id, time.monotonic()), 4),
            **values,
        )
        if self.store is not None and record.status == "completed":
            try:
                self.store.save(record)
            except OSError as error:
                self.log.warning(f"trial {record.trial} could not be kept for a resume: {error}")
        self.records.append(record)
        self._say(f"{len(self.records)} of {self.num_trials} done, {record.describe()}")

    def _say(self, message: str) -> None:
        self.log.info(message)
        self.last_message = time.monotonic()


def _reason(trial: Trial) -> str:
    """Why the trial failed, in a line."""
    if trial.pickled_error_file is None:
        return "unknown error"
    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())  # written by Ray Tune, a moment ago
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
