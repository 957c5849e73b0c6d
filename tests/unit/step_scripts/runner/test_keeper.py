"""The keeper ends whatever its driver has started, at whatever moment the driver or the run is gone. Without Ray."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from step_scripts.runner.session_folder import make_folder, processes_of, recorded_process, recorded_sessions
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
from step_scripts.runner import keeper
keeper.main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
"""


@pytest.mark.parametrize("orphans", [0, 1, 4])
@pytest.mark.parametrize("end", ["driver", "run", "sigterm"])
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_nothing_is_left_whatever_ends_first(tmp_path: Path, end: str, orphans: int, seconds: float) -> None:
    folder = make_folder("housing-", str(tmp_path))
    ours, theirs = socket.socketpair()
    with theirs, folder.recording({"run_id": "x"}) as record:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(theirs.fileno()), str(folder.lock), str(seconds)],
            pass_fds=[theirs.fileno(), folder.lock],
            env=os.environ | {"HOUSING_RAY_FOLDER": str(folder.path), "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        record |= {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
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


def test_whoever_looks_while_a_session_is_started_waits_for_its_first_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own: as a sweep or a teardown would."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = make_folder("housing-", str(tmp_path))
    script = (
        "import sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from step_scripts.runner.session_folder import recorded_sessions\n"
        "print(flush=True)\n"
        "print([r['pid'] for f, r in recorded_sessions() if f.parent.as_posix() == sys.argv[1]], flush=True)\n"
    )
    with folder.recording({}) as record:
        look = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert look.stdout is not None
        look.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            look.wait(0.3)
        record |= {"pid": os.getpid(), "started": psutil.Process().create_time()}
    assert look.stdout.read().strip() == f"[{os.getpid()}]"
    assert look.wait(30) == 0
    [found] = [record for path, record in recorded_sessions() if path == folder.path]
    assert recorded_process(found) == psutil.Process()
    assert recorded_process(found | {"started": time.time() + 60}) is None, "its number is that of a later process"
    folder.remove()
