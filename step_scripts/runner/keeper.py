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
import os
import signal
import sys
import time

from step_scripts.runner.processes import Children, StopSignal, adopt_orphans, end_with_parent


def main(descriptor: int, lock: int, seconds: float) -> None:
    """Keep the driver; see the module. Returns in the driver process only, with the driver's work done."""
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
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
