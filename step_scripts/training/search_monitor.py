"""Follows the trials that Ray Tune runs: keeps and reports them, and ends a search in which no trial can succeed."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.exceptions import RayTaskError
from ray.tune.experiment import Trial

from step_scripts.runner.cluster_resources import wait_seconds
from step_scripts.runner.contract import Reporter
from step_scripts.runner.wording import number as figure
from step_scripts.training.search_algorithm import LivesInDriver, TrialProposals
from step_scripts.training.trials import TrialRecord, TrialStore

_SECONDS_BETWEEN_MESSAGES = 15.0
_FAILED_TRIALS = 3  # without a completed one: then more trials would fail too


class SearchMonitor(LivesInDriver, tune.Callback, tune.Stopper):
    """`records` holds the trials that have ended: those of an earlier attempt, which are `finished`, and new ones.

    `matrices` are references to the `Matrix` of each split, which every actor is given.
    """

    def __init__(
        self,
        proposals: TrialProposals,
        matrices: list[ray.ObjectRef],
        finished: list[TrialRecord],
        num_trials: int,
        store: TrialStore | None,
        log: Reporter,
    ) -> None:
        self.records = list(finished)
        self.waited_too_long = False
        """Whether no trial got a CPU for as long as one may wait."""
        self.staging_folder: Path | None = None
        """Where Ray Tune keeps files of the search on this machine: in the folder of the Ray session."""
        self._proposals, self._matrices = proposals, matrices
        self._num_trials, self._store, self._log = num_trials, store, log
        self._interrupted = threading.Event()
        self._started: dict[str, float] = {}
        self._actors: list[Any] = []
        self._idle_since: float | None = None
        self._last_message = time.monotonic()

    def interrupt(self) -> None:
        """End the search, and the actors of its trials. From another thread than the search's."""
        self._interrupted.set()
        for actor in self._actors:
            ray.kill(actor)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether this trial is to be stopped; that is the scheduler's decision."""
        return False

    def stop_all(self) -> bool:
        """Whether the search is to be stopped."""
        all_failed = len(self.records) >= _FAILED_TRIALS and all(r.status == "failed" for r in self.records)
        return all_failed or self.waited_too_long or self._interrupted.is_set()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Give the matrices to the trial's actor."""
        self._started[trial.trial_id] = time.monotonic()
        # There is no public way to an actor of Ray Tune, and no other one to give it what should not be kept for good.
        actor: Any = trial.temporary_state.ray_actor
        self._actors.append(actor)
        actor.receive.remote(self._matrices)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Say so while trials wait and none runs, which is because others use the cluster."""
        now = time.monotonic()
        if trials:
            self.staging_folder = Path(trials[0].local_experiment_path).parent
        if not trials or any(trial.status != Trial.PENDING and not trial.is_finished() for trial in trials):
            self._idle_since = None
            return
        self._idle_since = self._idle_since or now
        self.waited_too_long = now - self._idle_since > wait_seconds()
        if min(now - self._idle_since, now - self._last_message) > _SECONDS_BETWEEN_MESSAGES:
            self._say(f"the search waits for CPUs of the Ray cluster, at most {wait_seconds():g} s")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Report an unfinished trial if nothing has been reported for a while."""
        if not result["done"] and time.monotonic() - self._last_message > _SECONDS_BETWEEN_MESSAGES:
            number = self._proposals.number_of(trial.trial_id)
            rmse = figure(result["rmse"])
            self._say(f"trial {number} of {self._num_trials}: round {result['rounds']}, RMSE {rmse}")

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
        if self._interrupted.is_set():  # its end says nothing
            return
        record = TrialRecord(
            trial=self._proposals.number_of(trial.trial_id),
            parameters=dict(trial.config),
            seconds=round(time.monotonic() - self._started.get(trial.trial_id, time.monotonic()), 4),
            **values,
        )
        if self._store is not None and record.status == "completed":
            try:
                self._store.save(record)
            except OSError as error:
                self._log.warning(f"trial {record.trial} could not be kept for a resume: {error}")
        self.records.append(record)
        self._say(f"{len(self.records)} of {self._num_trials} done, {record.describe()}")

    def _say(self, message: str) -> None:
        self._log.info(message)
        self._last_message = time.monotonic()


def _reason(trial: Trial) -> str:
    """Why the trial failed, in a line."""
    if trial.pickled_error_file is None:
        return "unknown error"
    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())  # written by Ray Tune, a moment ago
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
