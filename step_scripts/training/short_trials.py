"""Trials that take seconds, as plain Ray tasks in the workers that are there.

Ray Tune runs trials in actors, and an actor is always a new process: to start two of them takes longer than twenty
trials on 10,000 rows. Where trials are that short, nothing is won by stopping one early or by watching it, and tasks
are enough: Ray runs them on any host, and runs one again whose process ended. What to try is still proposed by Ray
Tune's search algorithm.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.tune.search import Searcher

from step_scripts.runner.cluster_resources import no_room, wait_seconds
from step_scripts.runner.wording import counted
from step_scripts.training.trial_ledger import TrialLedger
from step_scripts.training.trial_records import TrialRecord
from step_scripts.training.trial_task import TrialTask, run_trial

_SECONDS_BETWEEN_MESSAGES = 15.0
_RETRIES = 1  # of a trial whose process ended
# Training rows × rounds. Ten million are about half a second on one core; a scheduler would spare a part of it.
_LARGEST_WORK = {"none": 200_000_000, "median": 30_000_000, "asha": 30_000_000}
_MOST_ROWS = 2_000_000  # a worker keeps them, binned, until the session ends: 8 bytes each and more


def are_short(training_rows: int, num_boost_round: int, scheduler: str) -> bool:
    """Whether trials are so short that they should be tasks."""
    return training_rows <= _MOST_ROWS and training_rows * num_boost_round <= _LARGEST_WORK[scheduler]


class ShortTrials:
    """Runs the trials of a search as tasks, `concurrent` at a time. `train` and `validation` refer to a `Matrix`."""

    def __init__(self, task: TrialTask, train: ray.ObjectRef, validation: ray.ObjectRef) -> None:
        self._task = task
        self._matrices = (train, validation)
        self._remote = ray.remote(run_trial).options(num_cpus=task.cpus, max_retries=_RETRIES)
        self._running: dict[ray.ObjectRef, tuple[int, dict[str, Any], float]] = {}
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End the trials that run, and let no other begin. From another thread than `run`."""
        self._stopped.set()
        self._cancel()

    def run(self, search: Searcher, ledger: TrialLedger, concurrent: int) -> None:
        """Run the trials that `ledger` lacks, as `search` proposes. What fails is recorded; none follows if all do."""
        try:
            self._run(search, ledger, concurrent)
        finally:
            self._cancel()

    def _run(self, search: Searcher, ledger: TrialLedger, concurrent: int) -> None:
        to_begin = ledger.remaining
        while not self._stopped.is_set():
            while to_begin and len(self._running) < concurrent and not ledger.hopeless:
                self._begin(search, ledger.next_number())
                to_begin -= 1
            if not self._running:
                return
            reference = self._next_end(ledger)
            number, parameters, start = self._running.pop(reference)
            common = {"trial": number, "parameters": parameters, "seconds": round(time.monotonic() - start, 4)}
            try:
                result: dict[str, Any] = ray.get(reference)
            except RayError as error:
                if self._stopped.is_set():
                    return
                search.on_trial_complete(str(number), error=True)
                failed = {"rmse": None, "rounds": 0, "best_rounds": 0, "stopped_by": "error", "error": _reason(error)}
                ledger.add(TrialRecord.model_validate({**common, **failed, "status": "failed"}))
            else:
                search.on_trial_complete(str(number), result)
                ledger.add(TrialRecord.model_validate({**common, **result, "status": "completed"}))

    def _next_end(self, ledger: TrialLedger) -> ray.ObjectRef:
        """A trial that has ended. While there is none, and it takes long for trials that are short, say so.

        Raises `StepError` if it takes as long as one may wait for CPUs.
        """
        start = time.monotonic()
        while True:
            ended, _ = ray.wait(list(self._running), num_returns=1, timeout=_SECONDS_BETWEEN_MESSAGES)
            if ended:
                return ended[0]
            if time.monotonic() - start > wait_seconds():
                raise no_room("the trials of the search")
            free, cpus = (float(r.get("CPU", 0)) for r in (ray.available_resources(), ray.cluster_resources()))
            ledger.say(
                f"{counted(len(self._running), 'trial')} under way, or waiting for a CPU of the Ray cluster: "
                f"{free:g} of {cpus:g} are free"
            )

    def _cancel(self) -> None:
        for reference in list(self._running):
            ray.cancel(reference, force=True)

    def _begin(self, search: Searcher, number: int) -> None:
        parameters = search.suggest(str(number))
        assert isinstance(parameters, dict)  # these searchers always have another proposal
        reference = self._remote.remote(self._task, parameters, self._matrices[0].hex(), *self._matrices)
        self._running[reference] = (number, parameters, time.monotonic())


def _reason(error: RayError) -> str:
    """What happened, in a line."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
