"""The local backend with a real Ray driver process: reuse, errors, crashes, termination."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from resources.compute.local_ray import LocalRay, _Worker
from step_scripts.runner.ray_environment import remove_abandoned
from tests.probe_step import ProbeParams
from tests.waiting import until

PROBE = "tests.probe_step"
ROOT = Path(__file__).parents[2]


def materialize(
    folder: Path,
    *actions: str,
    values: list[int] | None = None,
    in_background: Callable[[], object] | None = None,
    **options: Any,
) -> tuple[dg.ExecuteInProcessResult, list[Any]]:
    results: list[Any] = []

    @dg.asset
    def probe(context: dg.AssetExecutionContext, compute: LocalRay) -> dg.MaterializeResult:
        for index, action in enumerate(actions):
            params = ProbeParams.model_validate(
                {"action": action, "value": values[index] if values else 0, "marker": str(folder / "marker")}
            )
            results.append(compute.run(context, PROBE, params, in_background=in_background))
        return dg.MaterializeResult()

    compute = backend(folder, **options)
    return dg.materialize([probe], resources={"compute": compute}, raise_on_error=False), results


def backend(folder: Path, **options: Any) -> LocalRay:
    return LocalRay(artifact_root=str(folder / "artifacts"), num_cpus=1, object_store_memory=80 << 20, **options)


def failure(result: dg.ExecuteInProcessResult) -> Any:
    event = next(e for e in result.all_events if e.is_step_failure)
    return event.step_failure_data


def attempts(folder: Path) -> list[str]:
    """Attempt folders, which a failed step must not leave behind."""
    root = folder / "artifacts" / PROBE
    return [p.name for digest in root.glob("*") for p in digest.iterdir() if p.is_dir() and p.name != "failed"]


def test_one_session_serves_all_steps_and_unchanged_requests_are_not_run(tmp_path: Path) -> None:
    result, results = materialize(tmp_path, "write", "write", "write", values=[1, 2, 1])
    assert result.success
    assert [r.reused for r in results] == [False, False, True]
    assert results[0].details["driver"] == results[1].details["driver"]
    assert results[2].outputs == results[0].outputs
    assert not psutil.pid_exists(results[0].details["driver"])

    again, reused = materialize(tmp_path, "write", values=[1])
    assert again.success
    assert reused[0].reused
    _, rerun = materialize(tmp_path, "write", values=[1], use_cache=False)
    assert not rerun[0].reused
    _, expired = materialize(tmp_path, "write", values=[1], cache_expiry_hours=1e-9)
    assert not expired[0].reused
    assert len((tmp_path / "marker").read_text().splitlines()) == 4


def test_a_home_that_cannot_be_written_and_an_optimizing_python_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.touch()  # no folder can be made below it, also not by root
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")  # of the driver and Ray's workers, which need their docstrings
    result, (made,) = materialize(tmp_path, "write", values=[3])
    assert result.success
    assert made.metrics == {"value": 3}


# May read what this user may, the interpreter among others, and write nowhere but in the temporary folders.
_STRANGER = 54321
_AS_STRANGER = (
    *("setpriv", f"--reuid={_STRANGER}", f"--regid={_STRANGER}", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
)


def _may_be_a_stranger() -> bool:
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        return False
    return subprocess.run([*_AS_STRANGER, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _may_be_a_stranger(), reason="needs root, who may become somebody who may read everything")
def test_a_user_without_a_name_whose_home_is_the_root_of_the_file_system_runs_steps(tmp_path: Path) -> None:
    """As on OpenShift, which gives each container a number for a user."""
    folder = tmp_path / "work"
    folder.mkdir()
    os.chown(folder, _STRANGER, _STRANGER)
    code = f"""
import os
from pathlib import Path
from tests.faults.test_local_ray import materialize
assert not os.access("/", os.W_OK)
import housing_assets.definitions
result, (made,) = materialize(Path({str(folder)!r}), "write", values=[3])
assert result.success and made.metrics == {{"value": 3}}
"""
    clean = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    environment = clean | {"HOME": "/", "HOUSING_ROOT": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*_AS_STRANGER, sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "marker").stat().st_uid == _STRANGER


def test_a_driver_is_started_ahead_only_where_no_earlier_result_could_make_it_unnecessary(tmp_path: Path) -> None:
    ahead: list[list[str]] = []
    served_by: list[int] = []

    @dg.asset
    def prepared(context: dg.AssetExecutionContext, compute: LocalRay) -> dg.MaterializeResult:
        compute.prepare(context)
        compute.prepare(context)
        ahead.append([item.name for item in compute.inventory() if item.kind == "job"])
        result = compute.run(context, PROBE, ProbeParams())
        served_by.append(0 if result.reused else psutil.Process(result.details["driver"]).ppid())
        return dg.MaterializeResult()

    for options in ({}, {}, {"use_cache": False}):
        assert dg.materialize([prepared], resources={"compute": backend(tmp_path, **options)}).success
    assert ahead == [[f"process {served_by[0]}"], [], [f"process {served_by[2]}"]]
    assert served_by[1] == 0, "the second run was answered by the first one's result"


def test_a_driver_that_was_started_ahead_ends_with_a_run_that_fails(tmp_path: Path) -> None:
    keepers: list[psutil.Process] = []
    folders: list[Path] = []

    @dg.asset
    def fails(context: dg.AssetExecutionContext, compute: LocalRay) -> None:
        compute.prepare(context)
        keepers.extend(psutil.Process(int(i.name.removeprefix("process "))) for i in compute.inventory())
        folders.append(Path(keepers[0].environ()["HOUSING_RAY_FOLDER"]))
        assert folders[0].stat().st_mode & 0o777 == 0o700
        raise dg.Failure("there is no such file")

    done = dg.materialize([fails], resources={"compute": backend(tmp_path)}, raise_on_error=False)
    assert not done.success
    assert len(keepers) == 1
    assert not keepers[0].is_running()
    assert not folders[0].exists()


@dataclass
class Start:
    """A session that is being started, and its processes: all are in the Unix session of the keeper."""

    worker: _Worker

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Those alive, by name; Python's, by the script that they run."""
        found: dict[str, list[psutil.Process]] = {}
        for pid in psutil.pids():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(pid) == self.worker.process.pid:
                    process = psutil.Process(pid)
                    if process.status() != psutil.STATUS_ZOMBIE:
                        name = process.name()
                        if (
                            name not in ("gcs_server", "raylet")
                            and "agent" in " ".join([name, *process.cmdline()]).lower()
                        ):
                            name = "agent"
                        found.setdefault(name, []).append(process)
        return found

    def await_process(self, name: str) -> psutil.Process:
        """The driver, or the first of Ray's processes that has that name."""
        if name == "driver":
            return until(lambda: psutil.Process(self.worker.process.pid).children())[0]
        return until(lambda: self.processes().get(name))[0]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    worker = backend(tmp_path)._start("run")
    worker.send({"prepare": True})
    try:
        yield Start(worker)
    finally:
        worker.stop()


@pytest.mark.parametrize("moment", ["driver", "gcs_server", "raylet", "agent"])
def test_a_driver_that_is_killed_while_ray_starts_leaves_nothing_behind(start: Start, moment: str) -> None:
    driver = start.await_process("driver")
    start.await_process(moment)
    driver.kill()
    assert start.worker.reply() is None
    assert start.worker.process.wait(20) == -signal.SIGKILL
    assert start.processes() == {}
    assert not start.worker.folder.path.exists()


def test_a_run_that_is_killed_while_ray_starts_leaves_nothing_behind(start: Start) -> None:
    start.await_process("agent")
    start.worker.channel.close()  # as the system does
    start.worker.process.wait(20)
    assert start.processes() == {}
    assert not start.worker.folder.path.exists()


def test_ray_is_started_once_more_if_it_ends_while_it_starts(tmp_path: Path) -> None:
    killed: list[int] = []
    of_others = set(psutil.Process().children(recursive=True))  # the Ray that other tests of this process share

    def kill_the_first(raylets: int) -> None:
        def look() -> bool:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.name() == "raylet" and process not in of_others and process.pid not in killed:
                        process.kill()
                        killed.append(process.pid)
            return len(killed) == raylets

        until(look)

    for raylets in (1, 2):
        killed.clear()
        killer = threading.Thread(target=kill_the_first, args=(raylets,))
        killer.start()
        result, results = materialize(tmp_path / str(raylets), "write", values=[1])
        killer.join()
        assert result.success == (raylets == 1)
        assert len(results) == (raylets == 1)
    assert "Ray's process raylet was ended by SIGKILL" in failure(result).error_display_string


def test_ray_is_started_once_more_if_it_does_not_come_up_in_time(tmp_path: Path) -> None:
    """As where other programs use all cores. Ray gives up after 30 seconds."""
    of_others = set(psutil.Process().children(recursive=True))
    stopped: list[psutil.Process] = []

    def stop_the_first() -> None:
        def look() -> bool:
            for process in set(psutil.Process().children(recursive=True)) - of_others:
                with contextlib.suppress(psutil.Error):
                    if process.name() == "raylet":
                        process.suspend()
                        stopped.append(process)
                        return True
            return False

        until(look)

    stopper = threading.Thread(target=stop_the_first)
    stopper.start()
    result, results = materialize(tmp_path, "write", values=[1])
    stopper.join()
    assert result.success
    assert len(results) == 1
    assert not stopped[0].is_running() or stopped[0].status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("moment", ["raylet", "agent"])
def test_a_raylet_that_dies_while_ray_starts_is_noticed_in_seconds_and_leaves_nothing_behind(
    start: Start, moment: str
) -> None:
    raylet = start.await_process("raylet")
    start.await_process(moment)
    start.worker.send({"request": {}})
    time_of_death = time.monotonic()
    raylet.kill()
    reply = start.worker.reply()
    assert time.monotonic() - time_of_death < 25, "Ray itself takes longer"
    assert reply is not None
    # How it ended is not known where Ray was faster to collect its status.
    found = r"Ray's process raylet (was ended by SIGKILL; probably|has ended; perhaps) out of memory"
    assert re.match(found, reply["error"]["message"])
    start.worker.process.wait(20)
    assert start.processes() == {}


def test_what_is_left_when_run_and_keeper_are_killed_goes_with_the_next_run(start: Start, tmp_path: Path) -> None:
    start.await_process("agent")
    assert remove_abandoned() == [], "it is alive"
    start.worker.process.kill()  # its driver is killed with it, and by that Ray's main processes
    start.worker.process.wait()
    start.worker.channel.close()
    start.worker.folder.release()
    folder = start.worker.folder.path
    done = dg.materialize([nothing], resources={"compute": backend(tmp_path)})
    assert done.success
    assert not folder.exists()
    assert start.processes() == {}


@dg.asset
def nothing(compute: LocalRay) -> None:
    """Needs no driver."""


def test_work_in_the_background_is_not_done_for_a_reused_result(tmp_path: Path) -> None:
    called = threading.Event()
    materialize(tmp_path, "write", in_background=called.set)
    assert called.wait(10)
    called.clear()
    _, results = materialize(tmp_path, "write", in_background=called.set)
    assert results[0].reused
    assert not called.wait(0.2)


def test_bad_input_fails_once_with_its_figures_and_keeps_what_helps(tmp_path: Path) -> None:
    result, _ = materialize(tmp_path, "reject")
    assert not result.success
    data = failure(result)
    assert "file x.csv is bad: mend it" in data.user_failure_data.description
    kept = Path(data.user_failure_data.metadata["bad.txt"].value)
    assert kept.read_text() == "0"
    assert attempts(tmp_path) == []


def test_a_fault_of_the_program_shows_its_traceback(tmp_path: Path) -> None:
    result, _ = materialize(tmp_path, "raise")
    data = failure(result).user_failure_data
    assert "RuntimeError: a fault of the program" in data.description
    assert "probe_step.py" in data.metadata["traceback"].value
    assert attempts(tmp_path) == []


def test_a_killed_driver_is_a_clear_failure(tmp_path: Path) -> None:
    result, _ = materialize(tmp_path, "kill_driver")
    assert "ended by SIGKILL; probably out of memory" in failure(result).user_failure_data.description
    assert attempts(tmp_path) == []


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_termination_ends_everything_within_ten_seconds(tmp_path: Path, signal_number: int) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import pathlib, sys\n"
        "from dagster._utils.interrupts import capture_interrupts\n"
        "from tests.faults.test_local_ray import materialize\n"
        f"r, _ = materialize(pathlib.Path({str(tmp_path)!r}), 'block_in_ray')\n"
        "sys.exit(0 if r.success else 3)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    run = subprocess.Popen([sys.executable, str(script)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        marker = tmp_path / "marker"
        until(lambda: marker.exists() and marker.read_text().strip(), process=run)
        driver = psutil.Process(int(marker.read_text()))
        folder = Path(driver.environ()["TMPDIR"])
        keeper = psutil.Process(driver.ppid())
        until(lambda: any("ray::_sleep" in p.name() for p in driver.children(recursive=True)))  # it is in ray.get
        family = [keeper, *keeper.children(recursive=True)]
        assert len(family) > 3
        run.send_signal(signal_number)
        run.wait(10)
        _, alive = psutil.wait_procs(family, timeout=1)
        assert alive == []
        assert not folder.exists()
        assert attempts(tmp_path) == []
    finally:
        run.kill()


def test_an_existing_cluster_is_used_and_left_running(tmp_path: Path, ray_session: Any) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    result, results = materialize(tmp_path, "write", address=address)
    assert result.success, json.dumps(str(failure(result)))
    assert results[0].details["ray_address"] == address
    assert ray.is_initialized()
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
