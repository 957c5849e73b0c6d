"""Notices within a second that a process that Ray needs has ended, also while Ray is being started.

Ray itself waits for missed heartbeats: 15 seconds and more, a minute during its start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

_NEEDED = ("gcs_server", "raylet")
_POLL_SECONDS = 0.5
_LAST_LINES = 3


class RayWatch:
    """Watches the processes that Ray has started from this one. Calls `on_loss` once, in a thread, with the reason."""

    def __init__(self, folder: Path, on_loss: Callable[[str], None]) -> None:
        self._folder = folder
        self._on_loss = on_loss
        self._seen: dict[str, psutil.Process] = {}
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="ray-watch", daemon=True).start()

    def stop(self) -> None:
        """Stop watching: from now on Ray's processes may end."""
        self._stopped.set()

    def loss(self) -> str | None:
        """Which process has ended and how, if one has."""
        with self._lock:
            if len(self._seen) < len(_NEEDED):
                for child in psutil.Process().children():
                    with contextlib.suppress(psutil.Error):
                        if (name := child.name()) in _NEEDED:
                            self._seen.setdefault(name, child)
            for name, process in self._seen.items():
                try:
                    ended = not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
                except psutil.NoSuchProcess:
                    ended = True
                if ended:
                    return f"Ray's process {name} {_how(process.pid)}{self._end_of_log(name)}"
        return None

    def _run(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            if (reason := self.loss()) is not None:
                if not self._stopped.is_set():
                    self._on_loss(reason)
                return

    def _end_of_log(self, name: str) -> str:
        for log in sorted(self._folder.glob(f"session_2*/logs/{name}.err")):
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return ". The end of its log:\n" + "\n".join(lines[-_LAST_LINES:])
        return ""


def _how(pid: int) -> str:
    """How a child has ended. Its status is left for others to collect."""
    with contextlib.suppress(ChildProcessError, AttributeError):
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is not None and status.si_code == os.CLD_EXITED:
            return f"ended with status {status.si_status}"
        if status is not None:
            return how_ended_by(signal.Signals(status.si_status))
    return "has ended"


def how_ended_by(number: signal.Signals) -> str:
    """Describes the end of a process by a signal, with the probable reason."""
    hint = "; probably out of memory: use a machine with more, or smaller pieces" if number == signal.SIGKILL else ""
    return f"was ended by {number.name}{hint}"
