"""Follows the trials that Ray Tune runs."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, Self

import ray
from ray import tune
from ray.tune.experiment import Trial

from step_scripts.runner.cluster_resources import wait_seconds
from step_scripts.runner.wording import number as figure
from step_scripts.training.trial_ledger import TrialLedger
from step_scripts.training.trial_matrices import TrialMatrices
from step_scripts.training.trial_records import TrialRecord

_SECONDS_BETWEEN_MESSAGES = 15.0
_ERROR_LINE = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)(:|$)")


class LivesInDriver:
    """For what Ray Tune would copy or write to a file that is never read, though it belongs to the running search."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}


class SearchProgress(LivesInDriver, tune.Callback):
    """Gives the trials that begin their number and the matrices, and enters those that end in `ledger`."""

    def __init__(self, ledger: TrialLedger, matrices: TrialMatrices) -> None:
        self.ledger = ledger
        self.folders: set[Path] = set()
        self._matrices = matrices
        self._numbers: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._actors: dict[str, Any] = {}
        self.starved = False
        """Whether no trial got a CPU for as long as one may wait."""
        self._idle_since: float | None = None

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Give the trial its number and the matrices."""
        self._numbers[trial.trial_id] = self.ledger.next_number()
        self._started[trial.trial_id] = time.monotonic()
        actor = self._actors[trial.trial_id] = trial.temporary_state.ray_actor
        if actor is not None:
            self._matrices.add(actor)
        if trial.storage is not None:
            self.folders.add(Path(trial.storage.experiment_driver_staging_path).parent)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Say so while trials wait and none runs, which is because others use the cluster."""
        now = time.monotonic()
        if not trials or any(trial.status != Trial.PENDING and not trial.is_finished() for trial in trials):
            self._idle_since = None
            return
        self._idle_since = self._idle_since or now
        self.starved = now - self._idle_since > wait_seconds()
        if min(now - self._idle_since, self.ledger.silent_seconds) > _SECONDS_BETWEEN_MESSAGES:
            self.ledger.say(f"the search waits for CPUs of the Ray cluster, at most {wait_seconds():g} s")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Report an unfinished trial if nothing has been said for a while."""
        if not result["rounds"]:  # it waits for the matrices
            self._started[trial.trial_id] = time.monotonic()
            self._matrices.hand_out()
            return
        if not result["done"] and self.ledger.silent_seconds > _SECONDS_BETWEEN_MESSAGES:
            number, total = self._numbers[trial.trial_id], self.ledger.num_trials
            self.ledger.say(f"trial {number} of {total}: round {result['rounds']}, RMSE {figure(result['rmse'])}")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record, keep and report a trial that ended well, or was stopped by the scheduler."""
        result = trial.last_result
        if not result.get("rounds"):  # the search was interrupted before the trial's first report
            return
        names = ("rmse", "rounds", "best_rounds", "stopped_by")
        self._record(trial, status="completed", **{name: result[name] for name in names})

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record and report a trial that failed."""
        self._record(
            trial, rmse=None, rounds=0, best_rounds=0, status="failed", stopped_by="error", error=_reason(trial)
        )

    def kill_actors(self) -> None:
        """End the actors of all trials that ran or run."""
        for actor in self._actors.values():
            if actor is not None:
                ray.kill(actor)

    def _record(self, trial: Trial, **values: Any) -> None:
        number = self._numbers.pop(trial.trial_id, None) or self.ledger.next_number()
        seconds = time.monotonic() - self._started.get(trial.trial_id, time.monotonic())
        self.ledger.add(TrialRecord(trial=number, parameters=dict(trial.config), seconds=round(seconds, 4), **values))


def _reason(trial: Trial) -> str:
    """The line of the trial's error that says what happened."""
    text = Path(trial.error_file).read_text() if trial.error_file else ""
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    # The error of a task ends with its name (and, for XGBoost's, a stack of C++ functions); that of a lost process
    # begins with what happened.
    named = [line for line in lines if _ERROR_LINE.match(line)]
    return named[-1] if named else lines[0] if lines else "unknown error"
