"""Runs whose process is gone are ended, and no others."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import dagster as dg
import pytest
from dagster._daemon.monitoring.run_monitoring import execute_run_monitoring_iteration

from housing_assets.runs.executor import in_process_executor
from housing_assets.runs.lost_runs import PROCESS_TAG, end_lost_runs, record_process
from tests import ROOT
from tests.waiting import until

STARTED, FAILURE = dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.FAILURE


@dg.op(pool="ray")
def waits(context: dg.OpExecutionContext) -> None:
    """Says that it is there, and waits to be killed."""
    if "WAIT" in os.environ:
        Path(os.environ["WAIT"]).write_text(context.run_id)
        signal.pause()


@dg.job(executor_def=in_process_executor)
def waiting() -> None:
    """A run that does nothing."""
    waits()


class Daemon:
    """What Dagster's run monitoring needs of its process."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance

    def create_request_context(self) -> None:
        """It is needed to resume runs."""

    def look(self) -> None:
        """Look at all runs in progress, as the daemon does every two minutes."""
        assert list(execute_run_monitoring_iteration(cast("Any", self), logging.getLogger())) in ([], [None])


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run sees whether it can write below the root."""
    monkeypatch.setenv("HOUSING_ROOT", str(tmp_path / "data"))


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """One for each document of ours: `dagster.yaml` as it is, and pools that count steps."""
    home = tmp_path / "dagster"
    home.mkdir()
    pools = "concurrency:\n  pools: {default_limit: 1, granularity: op}\n  runs:\n"
    document = (ROOT / "deploy" / "dagster.yaml").read_text()
    (home / "dagster.yaml").write_text(document.replace("concurrency:\n  runs:\n", pools))
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield instance


@pytest.fixture
def running(instance: dg.DagsterInstance, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process of a run that is in its step and has the pool's only slot, and the run's id."""
    script = (
        "import dagster as dg; from tests.unit.housing_assets.runs.test_lost_runs import waiting\n"
        f"with dg.DagsterInstance.from_config({str(tmp_path / 'dagster')!r}) as instance:\n"
        "    dg.execute_job(dg.reconstructable(waiting), instance=instance)\n"
    )
    sign = tmp_path / "sign"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WAIT": str(sign)}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        until(lambda: sign.exists() and sign.read_text(), process=process)
        yield process, sign.read_text()
    finally:
        process.kill()
        process.wait()


def status(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def test_run_monitoring_ends_a_run_whose_process_was_killed_and_frees_its_place(
    instance: dg.DagsterInstance, running: tuple[subprocess.Popen[bytes], str]
) -> None:
    process, run_id = running
    Daemon(instance).look()
    assert status(instance, run_id) == STARTED, "its process is there"
    process.kill()
    process.wait()
    Daemon(instance).look()
    assert status(instance, run_id) == FAILURE
    [event] = instance.all_logs(run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
    assert f"number {process.pid} on " in event.message
    assert "launch the run again" in event.message
    assert instance.event_log_storage.get_concurrency_run_ids() == set()


def test_the_next_run_ends_it_too(instance: dg.DagsterInstance, running: tuple[subprocess.Popen[bytes], str]) -> None:
    process, run_id = running
    process.send_signal(signal.SIGSTOP)
    assert end_lost_runs(instance) == [], "a run that is halted is in progress"
    process.kill()
    process.wait()
    assert dg.execute_job(dg.reconstructable(waiting), instance=instance).success, "the pool has room again"
    assert status(instance, run_id) == FAILURE


def test_a_closed_terminal_cancels_the_run(
    instance: dg.DagsterInstance, running: tuple[subprocess.Popen[bytes], str]
) -> None:
    process, run_id = running
    process.send_signal(signal.SIGHUP)
    process.wait(30)
    assert status(instance, run_id) == dg.DagsterRunStatus.CANCELED


def test_only_what_is_certainly_gone_is_ended(instance: dg.DagsterInstance) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    def ended(**changes: Any) -> bool:
        """Whether a run is ended whose record is that of this process, with changes."""
        run_id = instance.create_run_for_job(waiting, status=STARTED).run_id
        record_process(instance, run_id)
        run = instance.get_run_by_id(run_id)
        assert run is not None
        instance.add_run_tags(run_id, {PROCESS_TAG: json.dumps(json.loads(run.tags[PROCESS_TAG]) | changes)})
        return run_id in end_lost_runs(instance)

    assert not ended(), "it is this process"
    assert ended(pid=gone.pid)
    assert ended(started="1"), "another process has got the number"
    assert ended(boot="an earlier one")
    for elsewhere in ({"machine": "another"}, {"processes": "another container's"}, {"run_id": "the run it repeats"}):
        assert not ended(pid=gone.pid, **elsewhere)
    assert not ended(machine="another", boot="another")
    without = instance.create_run_for_job(waiting, status=STARTED).run_id
    assert without not in end_lost_runs(instance), "it was started by an earlier version"
    canceling = instance.create_run_for_job(waiting, status=dg.DagsterRunStatus.CANCELING).run_id
    record_process(instance, canceling)
    record = json.loads(cast("dg.DagsterRun", instance.get_run_by_id(canceling)).tags[PROCESS_TAG])
    instance.add_run_tags(canceling, {PROCESS_TAG: json.dumps(record | {"pid": gone.pid})})
    assert canceling in end_lost_runs(instance)
    assert status(instance, canceling) == dg.DagsterRunStatus.CANCELED
