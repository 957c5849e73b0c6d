"""Runs whose process is gone: killed, or lost with the machine's power. They are ended, so that nothing waits for them.

Each run records its process when it starts. Dagster's run monitoring asks `MonitoredRunLauncher` (see `dagster.yaml`)
whether that process is still there, and a run that starts asks the same of all others. What cannot be known, because
the process is on another machine or in another container, is left alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus  # have no public names

PROCESS_TAG = ".dagster/housing_process"  # the prefix hides it in the UI
_STATUSES = (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING)
# Names that any number of machines have.
_NO_NAMES = ("", "localhost", "localhost.localdomain")


def record_process(instance: dg.DagsterInstance, run_id: str) -> None:
    """Record that this process executes the run."""
    instance.add_run_tags(run_id, {PROCESS_TAG: json.dumps(_claim(run_id, os.getpid()))})


def end_lost_runs(instance: dg.DagsterInstance) -> list[str]:
    """End runs whose process is gone; their concurrency slots become free. Returns the runs' ids."""
    ended = []
    for found in instance.get_runs(dg.RunsFilter(statuses=[*_STATUSES])):
        if not _is_gone(found):
            continue
        # Read again: a process that ends in order has written before how its run ended.
        run = instance.get_run_by_id(found.run_id)
        if run is None or run.status not in _STATUSES:
            continue
        canceling = run.status == dg.DagsterRunStatus.CANCELING
        (instance.report_run_canceled if canceling else instance.report_run_failed)(run, message=_reason(run))
        _free_slots(instance, run.run_id)
        ended.append(run.run_id)
    return ended


class MonitoredRunLauncher(dg.DefaultRunLauncher):
    """Dagster's default run launcher, which can also say whether a run's process is still there."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Yes: run monitoring asks it."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether the run's process is gone. Where that cannot be known, it is taken to be there."""
        if not _is_gone(run):
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        _free_slots(self._instance, run.run_id)
        return CheckRunHealthResult(WorkerStatus.NOT_FOUND, _reason(run))


def _is_gone(run: dg.DagsterRun) -> bool:
    try:
        claim = json.loads(run.tags[PROCESS_TAG])
        own = _claim(run.run_id, int(claim["pid"]))
        same = {name: claim[name] == own[name] for name in own}
    except (KeyError, ValueError, TypeError):
        return False
    # The tags of a run are copied to the run that repeats it. A name may be that of another machine.
    if not (same["run_id"] and same["machine"] and own["machine"]):
        return False
    if not same["boot"]:
        return True
    return same["processes"] and (own["started"] is None or not same["started"])


def _reason(run: dg.DagsterRun) -> str:
    claim = json.loads(run.tags[PROCESS_TAG])
    return (
        f"The run's process (number {claim['pid']} on {socket.gethostname()}) is gone and has not said how the run "
        "ended: it was killed, for instance because memory was short, or the machine was switched off. What it had "
        "finished is kept; launch the run again."
    )


def _free_slots(instance: dg.DagsterInstance, run_id: str) -> None:
    if instance.event_log_storage.supports_global_concurrency_limits:
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)


def _claim(run_id: str, pid: int) -> dict[str, Any]:
    """What tells a process from all others: of other machines, earlier boots, other containers, and of its number."""
    return {"run_id": run_id, **_place(), "pid": pid, "started": _started(pid)}


@functools.cache
def _place() -> dict[str, str]:
    name = socket.gethostname()
    return {
        "machine": "" if name in _NO_NAMES else f"{name} {_content('/etc/machine-id')}",
        "boot": _content("/proc/sys/kernel/random/boot_id"),
        "processes": _content("/proc/self/ns/pid"),
    }


def _content(path: str) -> str:
    """The text in a file, or where a link leads; nothing where there is neither."""
    for read in (Path(path).read_text, Path(path).readlink):  # a namespace is a link, whose content cannot be read
        with contextlib.suppress(OSError):
            return str(read()).strip()
    return ""


def _started(pid: int) -> str | None:
    """When the process started: on Linux in ticks since the boot, which no change of the clock touches. None: gone."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if fields := _content(f"/proc/{pid}/stat").rpartition(")")[2].split():
            return fields[19]
        return f"{process.create_time():.0f}"
    except psutil.NoSuchProcess:
        return None
