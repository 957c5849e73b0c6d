"""The parent of a run's Ray driver: it outlives the driver and ends all that the driver has started.

Started by the local backend as `python -m step_scripts.runner.keeper <control descriptor> <lock descriptor> <seconds>`.
It forks the driver (`step_scripts.runner.worker`), adopts what the driver's processes leave behind, and waits: for the
driver's end, for the other end of the control descriptor to close, or for SIGTERM. Then the driver has so many seconds
to shut down, everything that is left is killed, and the folder of the session is removed. This process ends with the
driver's status.

It imports next to nothing before it forks, so that it costs a few milliseconds and megabytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LONGEST_END_SECONDS = 10.0


def main(descriptor: int, lock: int, seconds: float) -> None:
    """Keep the driver; see the module. Returns in the driver process only, with the driver's work done."""
    adopt_orphans()
    keeper = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # it waits until this process can handle it
    driver = os.fork()
    if driver == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:  # it was killed in the moment before
            os._exit(1)
        os.close(lock)
        from step_scripts.runner import worker

        worker.main(descriptor)
        return
    status = _until_end(driver, descriptor, seconds)
    status = _kill_all(driver, status)
    if folder := os.environ.get("HOUSING_RAY_FOLDER"):
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
    _end_like(os.waitstatus_to_exitcode(status))


def _until_end(driver: int, descriptor: int, seconds: float) -> int | None:
    """Wait for the driver's end. None if it was told to end, or its run has gone, and `seconds` have passed."""
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    terminated: list[int] = []
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    poll = select.poll()
    poll.register(awake, select.POLLIN)
    # The close of the other end is always reported. The data are the driver's.
    poll.register(descriptor, getattr(select, "POLLRDHUP", 0))
    deadline = None
    while True:
        if (status := _reap(driver)) is not None:
            return status
        if terminated and deadline is None:
            deadline = time.monotonic() + seconds
            if seconds:
                os.kill(driver, signal.SIGTERM)
        if deadline is not None and time.monotonic() >= deadline:
            return None
        for ready, event in poll.poll(20 if deadline is not None else None):
            if ready == awake:
                os.read(awake, 512)
            elif event and deadline is None:  # the driver sees this too, and shuts down
                deadline = time.monotonic() + seconds
                poll.unregister(descriptor)


def _reap(driver: int) -> int | None:
    """The driver's status, if it has just ended. Ended processes that were adopted are reaped."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == driver:
                found = status
    return found


def _kill_all(driver: int, status: int | None) -> int:
    """Kill all descendants, which are all children of this process in the end. Returns the driver's status.

    Returns when none is left, or after a time in which the system should have ended them.
    """
    import psutil

    own = psutil.Process()
    deadline = time.monotonic() + _LONGEST_END_SECONDS
    while (left := own.children(recursive=True)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.01)
        if (ended := _reap(driver)) is not None:
            status = ended
    return signal.SIGKILL if status is None else status


def _end_like(code: int) -> None:
    """End this process as the driver did: with its exit status, or by the same signal, and without a memory dump."""
    if code >= 0:
        os._exit(code)
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # there is no other handler for SIGKILL
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


def adopt_orphans() -> None:
    """Make this process the parent of descendants that lose theirs. On Linux only."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
