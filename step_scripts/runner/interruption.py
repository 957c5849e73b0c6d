"""SIGTERM: how a supervising process notices it at once, and how a step saves its work.

A step that can save unfinished work registers a function with `on_interruption`. The driver calls it in its main
thread, while the step's own thread still runs, when the job is stopped or its machine is taken away. It has
`checkpoint_seconds` (see `step_scripts.cluster.job.ClusterLimits`). The process ends when the functions have returned.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_functions: list[Callable[[], None]] = []


@contextmanager
def on_interruption(save: Callable[[], None]) -> Iterator[None]:
    """Have `save` called if the process is told to end within the block."""
    _functions.append(save)
    try:
        yield
    finally:
        _functions.remove(save)


def interrupt() -> list[Exception]:
    """Call all registered functions, latest first; returns what they raised."""
    errors: list[Exception] = []
    for save in reversed(list(_functions)):
        try:
            save()
        except Exception as error:  # noqa: BLE001  # one that fails must not keep the others from saving
            errors.append(error)
    return errors


class StopSignal:
    """Waits that end early on SIGTERM, SIGINT, or the end of a child process. One object, in the main thread."""

    def __init__(self) -> None:
        self.stop_requested = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler, there is no wake-up

    def _request_stop(self, *_: object) -> None:
        self.stop_requested = True

    def wait(self, seconds: float) -> None:
        """Wait so long, or until a signal comes."""
        ready, _, _ = select.select([self._reader], [], [], max(0.0, seconds))
        if ready:
            os.read(self._reader, 4096)
