"""CloudWatch log streams, filled while the jobs run."""

import contextlib
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

from moto.logs.exceptions import LogsClientError, ResourceAlreadyExistsException
from moto.logs.models import LogsBackend, logs_backends

from tests.sagemaker_emulator.common import ACCOUNT

log = logging.getLogger(__name__)
_LIMIT = 256 * 1024


class LogShipper:
    """Moves lines into moto's CloudWatch backend, in order, late if a fault says so."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._closed = False
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="emulator-logs", daemon=True)
        self._thread.start()

    def stream(self, region: str, group: str, name: str, delay: float = 0.0) -> Callable[[str], None]:
        """Create a log stream; returns the function that adds a line to it."""
        backend: LogsBackend = logs_backends[ACCOUNT][region]
        created = False

        def deliver(timestamp: int, message: str) -> None:
            nonlocal created
            if not created:
                with contextlib.suppress(ResourceAlreadyExistsException):
                    backend.create_log_group(group, {})
                with contextlib.suppress(ResourceAlreadyExistsException):
                    backend.create_log_stream(group, name)
                created = True
            backend.put_log_events(group, name, [{"timestamp": timestamp, "message": message}])

        def add(line: str) -> None:
            timestamp = int(time.time() * 1000)
            # CloudWatch takes no empty messages; the agent sends a blank instead.
            message = line[:_LIMIT] or " "
            self._push(time.monotonic() + delay, lambda: deliver(timestamp, message))

        return add

    def drain(self, timeout: float = 5.0) -> None:
        """Wait until every line that is due has arrived."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while self._busy or (self._heap and self._heap[0][0] <= time.monotonic()):
                if time.monotonic() > deadline:
                    return
                self._changed.wait(0.05)

    def close(self) -> None:
        """Stop; what is not due yet is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(5)

    def _push(self, due: float, action: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._heap, (due, next(self._order), action))
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                while not self._closed and (not self._heap or self._heap[0][0] > time.monotonic()):
                    pause = self._heap[0][0] - time.monotonic() if self._heap else None
                    self._changed.wait(pause)
                if self._closed:
                    return
                action = heapq.heappop(self._heap)[2]
                self._busy = True
            try:
                action()
            except LogsClientError:
                log.exception("a log event was refused")
