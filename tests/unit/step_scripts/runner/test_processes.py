"""The keeper ends whatever its driver has started, at whatever moment the driver or the run is gone. Without Ray."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step_scripts.runner.ray_environment import make_folder, processes_of
from tests import ROOT

# A driver whose processes leave its session and its family, and do not listen to SIGTERM: more than Ray's do.
DRIVER = """
import os, signal, sys, time, types
worker = types.ModuleType("step_scripts.runner.worker")
def main(descriptor):
    os.write(descriptor, b"driver %d\\n" % os.getpid())
    for number in range(4):
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if os.fork() == 0:
                os.write(descriptor, b"orphan %d\\n" % os.getpid())
                os.close(descriptor)
                time.sleep(600)
            os._exit(0)
    time.sleep(600)
worker.main = main
sys.modules["step_scripts.runner.worker"] = worker
import step_scripts.runner
step_scripts.runner.worker = worker
from step_scripts.runner.processes import keep_driver
keep_driver(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
"""


@pytest.mark.parametrize("orphans", [0, 1, 4])
@pytest.mark.parametrize("end", ["driver", "run", "sigterm"])
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_nothing_is_left_whatever_ends_first(tmp_path: Path, end: str, orphans: int, seconds: float) -> None:
    folder = make_folder("housing-", str(tmp_path))
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(theirs.fileno()), str(folder.lock), str(seconds)],
            pass_fds=[theirs.fileno(), folder.lock],
            env=os.environ | {"HOUSING_RAY_FOLDER": str(folder.path), "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
    said = ours.makefile()
    driver = int(said.readline().split()[1])
    for _ in range(orphans):
        assert said.readline().startswith("orphan ")
    actions: dict[str, Callable[[], Any]] = {
        "driver": lambda: os.kill(driver, signal.SIGKILL),
        "run": lambda: (said.close(), ours.close()),
        "sigterm": process.terminate,
    }
    actions[end]()
    status = process.wait(30)
    assert status == -(signal.SIGTERM if end == "sigterm" and seconds else signal.SIGKILL), "as the driver ended"
    assert processes_of(folder.path) == []
    assert not folder.path.exists()
    folder.release()
    ours.close()
