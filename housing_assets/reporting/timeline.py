"""Where the time of a run went, asset by asset."""

from __future__ import annotations

import time
from typing import Any

import dagster as dg
import psutil

_LONGEST_START = 120.0  # of a run's process; an older one serves several runs
KINDS = ("start-up", "read", "compute", "write", "wait")
# Phases of steps that are none of computing. Pieces of data are read, computed and written by one task: such a phase
# counts as what most of it is.
_KIND_OF_PHASE = {
    "start Ray": "start-up",
    "read headers": "read",
    "plan": "read",
    "load": "read",
    "read back": "read",
    "write": "write",
    "write online": "write",
    "commit": "write",
    "list rejected rows": "write",
    "report": "write",
    "wait for the lock": "wait",
}


def run_timeline(instance: dg.DagsterInstance, run_id: str) -> list[dict[str, Any]]:
    """One row for each asset and check that the run has begun so far, in order of time, in seconds.

    Columns: asset, `begins` (after the first row), `seconds`, and what they are made of, `KINDS`. `wait` is what
    a step's phases do not explain: messages between processes, plots, events; on SageMaker also the wait for a machine.
    The first row is this process until its first asset, if it was started for the run.
    """
    steps = [(s.start_time, s) for s in instance.get_run_step_stats(run_id) if s.start_time is not None]
    steps.sort(key=lambda pair: pair[0])
    if not steps:
        return []
    first, started = steps[0][0], psutil.Process().create_time()
    own_process = 0 <= first - started < _LONGEST_START
    origin = started if own_process else first
    rows = [_row("(start of the process)", 0.0, first - origin, {"start-up": first - origin})] if own_process else []
    for start, step in steps:
        seconds = (step.end_time or time.time()) - start
        rows.append(_row(step.step_key, start - origin, seconds, _phases(step.materialization_events)))
    return rows


def _phases(materializations: Any) -> dict[str, float]:
    """Seconds of each kind, from the metadata of an asset that ran a step in this run."""
    found: dict[str, float] = {}
    for event in materializations:
        metadata = event.asset_materialization.metadata if event.asset_materialization else {}
        phases, reused = metadata.get("phases"), metadata.get("reused")
        if not isinstance(phases, dg.TableMetadataValue) or (reused is not None and reused.value):
            continue
        for record in phases.records:
            name, seconds = str(record.data["phase"]), float(record.data["seconds"] or 0.0)
            if name != "total":
                kind = _KIND_OF_PHASE.get(name, "compute")
                found[kind] = found.get(kind, 0.0) + seconds
        return found  # all assets of a step show the same
    return found


def _row(asset: str, begins: float, seconds: float, spent: dict[str, float]) -> dict[str, Any]:
    spent = {kind: spent.get(kind, 0.0) for kind in KINDS}
    spent["wait"] += max(0.0, seconds - sum(spent.values()))
    figures = {"begins": begins, "seconds": seconds, **spent}
    return {"asset": asset, **{name: round(value, 2) for name, value in figures.items()}}
