"""Starts, ends and reaps this host's processes and everything that they start.

On Linux this process adopts the orphans among its descendants, so that it can end them even when it is not the
container's first process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from step_scripts.cluster.job import Deadline
from step_scripts.runner.interruption import StopSignal
from step_scripts.runner.keeper import adopt_orphans


class ChildProcesses:
    """The processes of this host's part of the job."""

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop
        self._started: list[subprocess.Popen[bytes]] = []
        adopt_orphans()

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], output: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own. With `output`, what it prints goes to the end of that file."""
        with contextlib.ExitStack() as stack:
            target = stack.enter_context(output.open("ab")) if output else None
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=target,
                stderr=subprocess.STDOUT if target else None,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def reap(self) -> None:
        """Collect the status of ended processes: of those started here, and of adopted ones."""
        waited = {process.pid for process in self._started if process.poll() is None}
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
                if child.pid not in waited and child.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(child.pid, os.WNOHANG)

    def end(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        """SIGTERM one process; SIGKILL after so many seconds."""
        _send(process.pid, signal.SIGTERM)
        deadline = Deadline(seconds)
        while process.poll() is None and not deadline.passed:
            self._stop.wait(min(0.2, deadline.left))
        if process.poll() is None:
            process.kill()
            process.wait()

    def end_all(self, seconds: float) -> None:
        """SIGTERM all processes, SIGKILL those left after so many seconds; returns when none is left.

        Orphans that turn up meanwhile get a SIGTERM too.
        """
        signalled: set[int] = set()
        deadline = Deadline(seconds)
        while self._left() and not deadline.passed:
            for child in psutil.Process().children():
                if child.pid not in signalled:
                    signalled.add(child.pid)
                    _send(child.pid, signal.SIGTERM)
            self._stop.wait(min(0.1, deadline.left))
        kill_deadline = Deadline(seconds)
        while (left := self._left()) and not kill_deadline.passed:
            for child in left:
                _send(child.pid, signal.SIGKILL)
            self._stop.wait(0.05)

    def _left(self) -> list[psutil.Process]:
        self.reap()
        return psutil.Process().children(recursive=True)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
