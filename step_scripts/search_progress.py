"""Follows the trials that Ray Tune runs: numbers, reports and keeps them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Self

import ray
from ray import tune
from ray.tune.experiment import Trial

from step_scripts.contract import Reporter
from step_scripts.trial_matrices import TrialMatrices
from step_scripts.trial_records import TrialRecord, TrialStore

_SECONDS_BETWEEN_MESSAGES = 15.0
_ERROR_LINE = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)(:|$)")


class LivesInDriver:
    """For what Ray Tune would copy or write to a file that is never read, though it belongs to the running search."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}


class SearchProgress(LivesInDriver, tune.Callback):
    """Numbers the trials, gives them the matrices, reports each that ends, and keeps it.

    `records` holds what ended, in that order.
    """

    def __init__(
        self,
        finished: list[TrialRecord],
        store: TrialStore | None,
        log: Reporter,
        num_trials: int,
        matrices: TrialMatrices,
    ) -> None:
        self.records = list(finished)
        self.folders: set[Path] = set()
        self._matrices = matrices
        self._store = store
        self._log = log
        self._num_trials = num_trials
        taken = {record.trial for record in finished}
        self._free_numbers: Iterator[int] = (number for number in count(1) if number not in taken)
        self._numbers: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._actors: dict[str, Any] = {}
        self._last_message = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Give the trial its number and the matrices."""
        self._numbers[trial.trial_id] = next(self._free_numbers)
        self._started[trial.trial_id] = time.monotonic()
        actor = self._actors[trial.trial_id] = trial.temporary_state.ray_actor
        if actor is not None:
            self._matrices.add(actor)
        if trial.storage is not None:
            self.folders.add(Path(trial.storage.experiment_driver_staging_path).parent)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Report an unfinished trial if nothing has been said for a while."""
        if not result["rounds"]:  # it waits for the matrices
            self._started[trial.trial_id] = time.monotonic()
            self._matrices.hand_out()
            return
        if not result["done"] and time.monotonic() - self._last_message > _SECONDS_BETWEEN_MESSAGES:
            number = self._numbers[trial.trial_id]
            self._say(f"trial {number} of {self._num_trials}: round {result['rounds']}, RMSE {result['rmse']:,.6g}")

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
        number = self._numbers.pop(trial.trial_id, None) or next(self._free_numbers)
        seconds = time.monotonic() - self._started.get(trial.trial_id, time.monotonic())
        record = TrialRecord(trial=number, parameters=dict(trial.config), seconds=round(seconds, 4), **values)
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
    """The line of the trial's error that says what happened."""
    text = Path(trial.error_file).read_text() if trial.error_file else ""
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    # The error of a task ends with its name (and, for XGBoost's, a stack of C++ functions); that of a lost process
    # begins with what happened.
    named = [line for line in lines if _ERROR_LINE.match(line)]
    return named[-1] if named else lines[0] if lines else "unknown error"
