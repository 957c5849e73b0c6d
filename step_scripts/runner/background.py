"""Threads beside a step: long calls into Ray that can be interrupted, and repeated calls while something lasts."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

Result = TypeVar("Result")
_POLL_SECONDS = 0.2
_END_SECONDS = 4.0


def run_in_thread(
    function: Callable[[], Result], on_interrupt: Callable[[], None] | None = None, timeout: float | None = None
) -> Result:
    """The result of `function`, which runs in a second thread; its exception is raised here.

    A signal reaches Python only when the main thread is not inside Ray, and in the main thread Ray Tune and Ray Train
    install signal handlers that they leave behind. On an interrupt `on_interrupt` is called, and the thread has a few
    seconds to end; without it, the thread is left to end with the process. Raises `TimeoutError` after `timeout`
    seconds.
    """
    outcome: Future[Result] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # noqa: BLE001  # raised again, in the thread that waits
            outcome.set_exception(error)

    threading.Thread(target=call, name="ray-driver", daemon=True).start()
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    try:
        while not wait([outcome], _POLL_SECONDS).done:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {timeout:g} s")
    except BaseException:
        if on_interrupt is not None:
            on_interrupt()
            wait([outcome], _END_SECONDS)
        raise
    return outcome.result()


@contextlib.contextmanager
def repeated(function: Callable[[], object], seconds: float, name: str) -> Iterator[None]:
    """Call `function` every so many seconds, in a thread of that name, until the block ends."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            function()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
