"""Signals, processes, threads: who notices SIGTERM, who saves its work then, and who ends what has been started.

A step that can save unfinished work registers a function with `on_interruption`. The driver calls it in its main
thread, while the step's own thread still runs, when the job is stopped or its machine is taken away. It has
`checkpoint_seconds` (see `step_scripts.cluster.job.ClusterLimits`). The process ends when the functions have returned.

As a program it is the keeper of a run's Ray driver, started by the local backend:
`python -m step_scripts.runner.processes <control descriptor> <lock descriptor> <seconds>`. Imports next to nothing, so
that a keeper costs a few milliseconds and megabytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LONGEST_END_SECONDS = 10.0
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

    def wait(self, seconds: float | None, peer: int | None = None, events: int = 0) -> bool:
        """Wait so long (None: without limit), or until a signal comes, or the other end of socket `peer` is closed.

        Returns whether that is closed, or one of `events` has come from it.
        """
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        if peer is not None:
            poll.register(peer, getattr(select, "POLLRDHUP", 0) | events)  # the close is always reported
        ready = dict(poll.poll(None if seconds is None else max(0.0, seconds) * 1000))
        if self._reader in ready:
            os.read(self._reader, 4096)
        return peer in ready


class Children:
    """The processes that this one has started, and all that they start.

    This process adopts orphans, so that it can end them even when it is not the container's first process.
    """

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop
        self._started: dict[int, subprocess.Popen[bytes]] = {}
        self.ended: dict[int, int] = {}
        """Exit codes of the children that `reap` has found, by process; negative: the signal that ended it."""
        adopt_orphans()

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        output: Path | None = None,
        inherit: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own. With `output`, what it prints goes to the end of that file.

        It has the descriptors `inherit`.
        """
        with output.open("ab") if output else contextlib.nullcontext() as target:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=subprocess.STDOUT if target else None,
                pass_fds=inherit,
                start_new_session=True,
            )
        self._started[process.pid] = process
        return process

    def reap(self) -> None:
        """Collect the status of ended children, adopted ones too."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, code = ended[0], os.waitstatus_to_exitcode(ended[1])
                self.ended[pid] = code
                if pid in self._started:
                    self._started[pid].returncode = code

    def end_all(self, seconds: float) -> None:
        """SIGTERM all children, SIGKILL what is left of all descendants after so many seconds.

        Orphans that turn up meanwhile get a SIGTERM too. Returns when none is left, or after a time in which the
        system should have ended them.
        """
        import psutil

        told: set[int] = set()
        own, start = psutil.Process(), time.monotonic()
        while (waited := time.monotonic() - start) < seconds + _LONGEST_END_SECONDS:
            self.reap()
            if not (left := own.children(recursive=True)):
                return
            for process in left:
                with contextlib.suppress(psutil.Error):
                    if waited >= seconds:
                        process.kill()
                    elif process.pid not in told and process.ppid() == own.pid:
                        told.add(process.pid)
                        process.terminate()
            self._stop.wait(0.1 if waited < seconds else 0.01)


def end_processes(processes: Sequence[psutil.Process], seconds: float = 0.0) -> None:
    """End processes: with SIGTERM if they have `seconds` for it, then by force. Processes that are gone are ignored."""
    import psutil

    alive = list(processes)
    for end, limit in ((psutil.Process.terminate, seconds), (psutil.Process.kill, _LONGEST_END_SECONDS / 2)):
        if not limit:
            continue
        for process in alive:
            with contextlib.suppress(psutil.Error):
                end(process)
        deadline = time.monotonic() + limit
        while alive and time.monotonic() < deadline:
            _, left = psutil.wait_procs(alive, timeout=0.05)
            alive = [process for process in left if lives(process)]


def lives(process: psutil.Process) -> bool:
    """Whether the process has not ended. A zombie that nobody reaps has; a later process with its pid is another."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def how_ended(code: int) -> str:
    """Describes the end of a process by its exit code: a status, or a signal (negative) with the probable reason."""
    if code >= 0:
        return f"ended with status {code}"
    hint = "; probably out of memory: use a machine with more, or smaller pieces" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


def adopt_orphans() -> None:
    """Make this process the parent of descendants that lose theirs. On Linux only."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends, on Linux only; at once if it has ended already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


@contextmanager
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


def keep_driver(descriptor: int, lock: int, seconds: float) -> None:
    """Be the keeper: the parent of a run's Ray driver, which outlives it and ends all that it has started.

    Forks the driver (`step_scripts.runner.worker`), adopts what the driver's processes leave behind, and waits: for the
    driver's end, for the other end of the control descriptor to close, or for SIGTERM. Then the driver has so many
    seconds to shut down, everything that is left is killed, and the folder of the session is removed. This process ends
    with the driver's status. Returns in the driver process only, with the driver's work done.
    """
    adopt_orphans()
    keeper = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # it waits until this process can handle it
    driver = os.fork()
    if driver == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        end_with_parent(keeper)
        os.close(lock)
        from step_scripts.runner import worker

        worker.main(descriptor)
        return
    stop = StopSignal()
    children = Children(stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _await_end(driver, descriptor, seconds, stop, children)
    children.end_all(0)
    if folder := os.environ.get("HOUSING_RAY_FOLDER"):
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
    _end_like(children.ended.get(driver, -signal.SIGKILL))


def _await_end(driver: int, descriptor: int, seconds: float, stop: StopSignal, children: Children) -> None:
    """Wait for the driver's end; for so many seconds from when it was told to end, or its run has gone."""
    deadline = None
    children.reap()
    while driver not in children.ended:
        if deadline is None:
            if stop.wait(None, descriptor) or stop.stop_requested:
                deadline = time.monotonic() + seconds
                if stop.stop_requested and seconds:  # of the run's end the driver knows
                    os.kill(driver, signal.SIGTERM)
        elif (left := deadline - time.monotonic()) > 0:
            stop.wait(left)
        else:
            return
        children.reap()


def _end_like(code: int) -> None:
    """End this process as the driver did: with its exit status, or by the same signal, and without a memory dump."""
    if code >= 0:
        os._exit(code)
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # there is no other handler for SIGKILL
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


if __name__ == "__main__":
    keep_driver(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
