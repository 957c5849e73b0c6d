"""Runs end when they are interrupted, wherever the run's process happens to be."""

from __future__ import annotations

import signal
import time
import weakref
from pathlib import Path

import dagster as dg
import pytest

from housing_assets.runs.executor import in_process_executor

_PATIENCE_SECONDS = 20


class _Collectable:
    pass


@dg.op
def interrupted_in_a_callback_where_exceptions_are_ignored() -> None:
    """What a garbage collection at the wrong moment does to an interruption."""
    item = _Collectable()
    reference = weakref.ref(item, lambda _: signal.raise_signal(signal.SIGINT))
    del item
    assert reference() is None
    time.sleep(_PATIENCE_SECONDS)


@dg.job(executor_def=in_process_executor)
def interrupted() -> None:
    """One step that is interrupted, and waits."""
    interrupted_in_a_callback_where_exceptions_are_ignored()


@dg.job(executor_def=in_process_executor)
def harmless() -> None:
    """No steps at all."""


def test_a_root_that_cannot_be_written_is_said_once_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "root", Path("/proc/nowhere")):
        monkeypatch.setenv("HOUSING_ROOT", str(place))
        capfd.readouterr()
        with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
            done = dg.execute_job(dg.reconstructable(harmless), instance=instance, raise_on_error=False)
            assert instance.get_runs()[0].status == dg.DagsterRunStatus.FAILURE
            assert not done.success
        said = capfd.readouterr().err
        assert said.count(f"{place}, cannot be written: ") == 1
        assert "set HOUSING_ROOT to another folder" in said
        assert len(said.splitlines()) < 20


def test_an_interruption_that_python_ignores_still_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOUSING_ROOT", str(tmp_path / "data"))
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        dg.execute_job(dg.reconstructable(interrupted), instance=instance, raise_on_error=False)
        (run,) = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.CANCELED
