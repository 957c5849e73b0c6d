"""Brings the splits to the actors of a hyperparameter search, once all of them are there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray

from step_scripts.training.training_data import TrainingSplit

_SECONDS_TO_WAIT = 10.0  # for actors that may never get the CPUs they ask for


class TrialMatrices:
    """The matrices of both splits in Ray's object store, where all trials of a node map the same memory.

    They are read while the first actors start. No actor gets them before `actors` have started: where one has finished
    a trial before another is ready, Ray Tune ends the latter and starts it anew, so that in a search of short trials
    one actor would do all the work, and the CPUs would be busy with starting others.
    """

    def __init__(self, reading: Future[list[ray.ObjectRef]], actors: int) -> None:
        self._reading = reading
        self._actors_wanted = actors
        self._actors_started = 0
        self._first_start: float | None = None
        self._waiting: list[Any] = []

    def add(self, actor: Any) -> None:
        """Give the matrices to `actor` (a `BoostingTrial`) as soon as they may be given."""
        self._waiting.append(actor)
        self._actors_started += 1
        self._first_start = self._first_start or time.monotonic()
        self.hand_out()

    def hand_out(self) -> None:
        """Give the matrices to those who wait, if it is time. To be called now and then."""
        if not self._waiting or not self._reading.done() or self._reading.exception() is not None:
            return
        waited = time.monotonic() - (self._first_start or 0.0)
        if self._actors_started < self._actors_wanted and waited < _SECONDS_TO_WAIT:
            return
        for actor in self._waiting:
            actor.receive.remote(self._reading.result())
        self._waiting.clear()

    @property
    def unreadable(self) -> bool:
        """Whether a split could not be read, so that no trial can begin."""
        return self._reading.done() and self._reading.exception() is not None


@contextlib.contextmanager
def trial_matrices(train: TrainingSplit, validation: TrainingSplit, actors: int) -> Iterator[TrialMatrices]:
    """The matrices of both splits; they leave the object store with the block.

    Raises the `StepError` of a split that cannot be read, at the end of the block.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="matrices") as pool:
        reading = pool.submit(lambda: [ray.put(split.load()) for split in (train, validation)])
        yield TrialMatrices(reading, actors)
        reading.result()
