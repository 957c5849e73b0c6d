"""Runs end when they are interrupted, wherever the run's process happens to be."""

from __future__ import annotations

import signal
import time
import weakref
from pathlib import Path

import dagster as dg

from housing_assets.executor import in_process_executor

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


def test_an_interruption_that_python_ignores_still_ends_the_run(tmp_path: Path) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        dg.execute_job(dg.reconstructable(interrupted), instance=instance, raise_on_error=False)
        (run,) = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.CANCELED
