"""Notices within a second that a process without which Ray cannot work has ended, also while Ray is being started.

Ray itself waits for missed heartbeats, a quarter of a minute and more, and while it starts a whole one.
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
_SECONDS_BETWEEN_LOOKS = 0.5
_LAST_LINES = 3


class RayWatch:
    """Watches the processes that Ray has started from this one. `tell` is called in a thread, once, with the reason."""

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self._folder = folder
        self._tell = tell
        self._seen: dict[str, psutil.Process] = {}
        self._stopped = threading.Event()
        self._looking = threading.Lock()
        threading.Thread(target=self._run, name="ray-watch", daemon=True).start()

    def stop(self) -> None:
        """From now on Ray's processes may end."""
        self._stopped.set()

    def loss(self) -> str | None:
        """Which process has ended and how, if one has."""
        with self._looking:
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
                    return f"Ray's process {name} {_how(process.pid)}{self._last_words(name)}"
        return None

    def _run(self) -> None:
        while not self._stopped.wait(_SECONDS_BETWEEN_LOOKS):
            if (reason := self.loss()) is not None:
                if not self._stopped.is_set():
                    self._tell(reason)
                return

    def _last_words(self, name: str) -> str:
        for log in sorted(self._folder.glob(f"session_2*/logs/{name}.err")):
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return ". The end of its log:\n" + "\n".join(lines[-_LAST_LINES:])
        return ""


def _how(pid: int) -> str:
    """How a child has ended; its parent's own look at the status stays possible."""
    with contextlib.suppress(ChildProcessError, AttributeError):
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is not None and status.si_code == os.CLD_EXITED:
            return f"ended with status {status.si_status}"
        if status is not None:
            return how_ended_by(signal.Signals(status.si_status))
    return "has ended"


def how_ended_by(number: signal.Signals) -> str:
    """What is said of a process that a signal has ended, with the probable reason."""
    hint = "; probably out of memory: use a machine with more, or smaller pieces" if number == signal.SIGKILL else ""
    return f"was ended by {number.name}{hint}"
