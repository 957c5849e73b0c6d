"""Dagster's in-process executor, with runs that end as canceled when they are interrupted.

Dagster calls a run canceled only if its termination was requested through the instance (the UI does that). A run on the
command line that is ended by Ctrl-C or SIGTERM would count as failed, and alert whoever watches failures.

A terminal that is closed sends SIGHUP, which would end the process without a word: it counts as an interruption too.

Dagster turns the signal into an exception wherever the run's main thread is. In a finalizer or a weak reference's
callback Python ignores exceptions, and the run would go on; the signal is then sent again.
"""

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from housing_assets.runs.lost_runs import end_lost_runs, record_process
from housing_assets.settings import Settings
from step_scripts.runner import storage

# Concurrency pool of the assets that run on Ray; dagster.yaml says how many runs may have it at once.
RAY_POOL = "ray"
# What a run's status means for whoever wants to remove or to start something.
FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
BUSY = [status for status in dg.DagsterRunStatus if status not in FINISHED]
_GRACEFUL = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)
_INTERRUPTIONS = (dg.DagsterExecutionInterruptedError, KeyboardInterrupt)
# Until then the callback that ignored the exception has long returned.
_RESEND_SECONDS = 0.1


@contextmanager
def _interruptions_end_the_run() -> Iterator[None]:
    """Within the block, an interruption that Python ignored is repeated until it ends what is being executed.

    SIGHUP is an interruption, too, unless it is ignored (`nohup`) or handled already.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, _INTERRUPTIONS):
            # To this thread, so that it wakes from whatever it waits for.
            to = (threading.main_thread().ident, signal.SIGINT)
            timer = threading.Timer(_RESEND_SECONDS, signal.pthread_kill, to)
            timer.daemon = True
            timer.start()
        else:
            previous(unraisable)

    here = threading.current_thread() is threading.main_thread()
    hangup = here and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    sys.unraisablehook = hook
    try:
        if hangup:
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGINT))
        yield
    finally:
        if hangup:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        sys.unraisablehook = previous


def check_root_is_writable() -> None:
    """Make the deployment's root if there is none, and try to write there. Raises `RuntimeError`."""
    root = Settings.load().own_root
    if storage.is_remote(root):
        return
    try:
        folder = Path(root)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RuntimeError(
            f"the folder for data and models, {root}, cannot be written: {error.strerror or error}. Give this user "
            f"(number {os.geteuid()}) the right to write there, or set HOUSING_ROOT to another folder. "
            "Nothing has been done"
        ) from None


class CancelingExecutor(dg.Executor):
    """Delegates to another executor, and reports an interruption as the request that it is.

    The process that executes is recorded with the run, and runs whose process is gone are ended first.
    """

    def __init__(self, executor: dg.Executor) -> None:
        self._executor = executor

    @property
    def retries(self) -> Any:
        """The other executor's retry mode."""
        return self._executor.retries

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[dg.DagsterEvent]:
        """Execute the plan in this process."""
        check_root_is_writable()
        record_process(plan_context.instance, plan_context.run_id)
        for lost in end_lost_runs(plan_context.instance):
            plan_context.log.warning(f"run {lost} was in progress, but its process is gone: it is marked as ended")
        try:
            with _interruptions_end_the_run():
                yield from self._executor.execute(plan_context, execution_plan)
        except _INTERRUPTIONS:
            instance: dg.DagsterInstance = plan_context.instance
            run = instance.get_run_by_id(plan_context.run_id)
            if run is not None and run.status not in _GRACEFUL:
                instance.report_run_canceling(run, message="The run was interrupted by a signal.")
            raise


@dg.executor(
    name="in_process",
    config_schema=dg.in_process_executor.config_schema,  # pyright: ignore[reportArgumentType]  # already normalized
    requirements=[],
)
def in_process_executor(context: dg.InitExecutorContext) -> CancelingExecutor:
    """Run all steps in the run's process: the graph is a chain, and Ray is the parallelism."""
    create = dg.in_process_executor.executor_creation_fn
    assert create is not None
    return CancelingExecutor(create(context))
