"""Ray actors that run functions in parallel, and survive the death of any of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from step_scripts.runner.contract import StepError

_RESTARTS = 3  # of one actor; a call is tried again as often


class _Worker:
    """Runs one call at a time. This module does not import Polars, so that its number of threads can be set here."""

    def __init__(self) -> None:
        os.environ.setdefault("POLARS_MAX_THREADS", "1")

    def ready(self) -> None:
        """Answer once the actor is there."""

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return function(*arguments)


class ActorPool:
    """A fixed number of actors, one CPU each; no more than the cluster has CPUs.

    An actor that dies is restarted, and its call is made again: what is called must bear to be repeated.
    """

    def __init__(self, actors: int | None = None) -> None:
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.size = min(actors or cpus, cpus)
        self._actors: list[Any] = []
        self._starting: dict[ray.ObjectRef, Any] = {}
        self._idle: list[Any] = []

    def __enter__(self) -> ActorPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def run(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Run `function(*call)` for each call; yield (index of the call, result) as they finish.

        Raises the `StepError` that a call raised, and `StepError` if one ends its actor's process again and again.
        After an error the pool must not be used any more.
        """
        self._start(len(calls))
        waiting = iter(enumerate(calls))
        running: dict[ray.ObjectRef, tuple[Any, int]] = {}
        left = len(calls)
        while left:
            while self._idle and (following := next(waiting, None)) is not None:
                index, call = following
                actor = self._idle.pop()
                running[actor.call.remote(function, call)] = (actor, index)
            # Work is given only to actors that are there: two pools that share a cluster may each get a part of it.
            (done, *_), _ = ray.wait([*running, *self._starting], num_returns=1)
            if done in self._starting:
                self._result(done, "start")
                self._idle.append(self._starting.pop(done))
                continue
            actor, index = running.pop(done)
            result = self._result(done, getattr(function, "__name__", "call"))
            self._idle.append(actor)
            left -= 1
            yield index, result

    def _start(self, calls: int) -> None:
        """Start as many actors as there are calls, if there are not yet so many."""
        worker: Any = ray.remote(num_cpus=1, max_restarts=_RESTARTS, max_task_retries=_RESTARTS)(_Worker)
        for _ in range(len(self._actors), min(self.size, calls)):
            actor = worker.remote()
            self._actors.append(actor)
            self._starting[actor.ready.remote()] = actor

    @staticmethod
    def _result(reference: ray.ObjectRef, what: str) -> Any:
        try:
            return ray.get(reference)
        except RayActorError as error:
            raise StepError(
                f"the process of a Ray actor ended {_RESTARTS + 1} times in {what}: {str(error).splitlines()[0]} "
                "If memory is short, use fewer actors"
            ) from error
        except RayTaskError as error:
            if isinstance(error.cause, StepError):
                raise error.cause from error
            raise
