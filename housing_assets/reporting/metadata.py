"""Metadata that several assets show in the same way."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
import psutil

from resources.compute.base import as_metadata, table
from resources.services.optional import extra
from step_scripts.runner.contract import Artifact, StepResult
from step_scripts.runner.wording import rounded
from step_scripts.table.spec import TableSpec

_Value = TypeVar("_Value")
# Figures that add up over a run, and the metadata that says which piece of work each is of.
_COSTS = {
    "core_seconds": "request_digest",
    "billable_seconds": "sagemaker_job",
    "estimated_cost": "sagemaker_job",
    "tuning_billable_seconds": "tuning_job",
}
_DAGSTER_TYPES = {"int64": "int", "float64": "float", "bool": "bool", "string": "string", "datetime": "timestamp"}
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


def made_by(context: dg.AssetExecutionContext, result: StepResult) -> dict[str, Any]:
    """Fields of a reference: the run and the code that made what it refers to."""
    return {"run_id": result.run_id or context.run.run_id, "code_version": result.code_version}


def materialized(
    value: _Value,
    artifact: Artifact,
    metadata: Mapping[str, Any],
    result: StepResult | None = None,
    asset_key: str | None = None,
) -> dg.MaterializeResult[_Value]:
    """An asset's result: its reference, metadata as the UI shows them, and the content's digest as data version.

    `result`: of the step that was run for it.
    """
    facts = {**metadata, **artifact_metadata(artifact), **(run_metadata(result) if result else {})}
    version = dg.DataVersion(artifact.digest)
    return dg.MaterializeResult(asset_key, value=value, metadata=as_metadata(facts), data_version=version)


def artifact_metadata(artifact: Artifact) -> dict[str, Any]:
    """Where an artifact lies, how large it is, and its digest. None: not known, so not shown."""
    return {
        "dagster/uri": artifact.uri,
        "digest": artifact.digest,
        "megabytes": rounded(artifact.bytes / 1e6),
        "files": len(artifact.files),
        "dagster/row_count": artifact.rows,
    }


def run_metadata(result: StepResult) -> dict[str, Any]:
    """How a step ran: reused or not, seconds per phase and operator, CPUs held, memory, nodes, versions.

    `core_seconds` is the time of the step times the CPUs of its Ray session, used or not: what it kept from others.
    None: not known, so not shown.
    """
    seconds = 0.0 if result.reused else result.seconds.get("total", 0.0)
    return {
        "reused": result.reused,
        "seconds": seconds,
        "phases": table([{"phase": name, "seconds": seconds} for name, seconds in result.seconds.items()]),
        "request_digest": result.request_digest,
        "versions": dg.MetadataValue.json(result.versions),
        "ray_data_operators": table(result.operators) if result.operators else None,
        "core_seconds": round(result.cpus * seconds, 1) if result.cpus is not None else None,
        "made_at": dg.MetadataValue.timestamp(result.created_at) if result.reused else None,
        "driver_peak_megabytes": round(result.peak_memory_bytes / 1e6, 1) if result.peak_memory_bytes else None,
        "ray_nodes": dg.MetadataValue.json(result.nodes) if result.nodes else None,
    }


def plot_metadata(
    context: dg.AssetExecutionContext, result: StepResult, plots: Mapping[str, Callable[[], bytes]]
) -> dict[str, Any]:
    """Plots of a step's result as metadata, given functions that draw them as PNG.

    Where the result is reused and the asset's latest materialization shows the same one, its pictures are taken over:
    drawing takes longer than all else in a run in which nothing has changed. One that cannot be drawn is left out, with
    a warning: what it would show is done.
    """
    from housing_assets.reporting.plots import to_markdown

    version = hashlib.sha256(Path(__file__).with_name("plots.py").read_bytes()).hexdigest()[:12]
    drawn: dict[str, Any] = {"plots_version": version}
    if result.reused:
        event = context.instance.get_latest_materialization_event(context.asset_key)
        shown = event.asset_materialization.metadata if event and event.asset_materialization else {}
        known = {name: value.value for name, value in shown.items()}
        if (known.get("plots_version"), known.get("request_digest")) == (version, result.request_digest):
            drawn |= {name: shown[name] for name in plots if name in shown}
    for name, draw in plots.items():
        if name not in drawn:
            drawn |= extra(name, lambda name=name, draw=draw: to_markdown(draw(), name.replace("_", " ")), context.log)
    return drawn


def run_costs(instance: dg.DagsterInstance, run_id: str) -> dict[str, float]:
    """Totals of what the run has materialized so far, a step or a job that made several assets counted once.

    What failed attempts cost is not in it: they materialize nothing.
    """
    records = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION).records
    seen: set[tuple[str, str]] = set()
    totals: dict[str, float] = {}
    for record in records:
        materialization = record.asset_materialization
        facts = {} if materialization is None else {k: v.value for k, v in materialization.metadata.items()}
        for figure, made_by in _COSTS.items():
            work, value = facts.get(made_by), facts.get(figure)
            if work is None or not isinstance(value, int | float) or (figure, str(work)) in seen:
                continue
            seen.add((figure, str(work)))
            totals[f"run_{figure}"] = rounded(totals.get(f"run_{figure}", 0.0) + value)
    return totals


def column_schema(spec: TableSpec) -> dg.TableSchema:
    """The columns of `spec` as Dagster shows them, with allowed values as constraints."""
    columns = [
        dg.TableColumn(
            name=column.name,
            type=_DAGSTER_TYPES[column.dtype],
            description=column.description,
            constraints=dg.TableColumnConstraints(column.nullable, other=list(filter(None, [column.constraint()]))),
        )
        for column in spec.columns
    ]
    return dg.TableSchema(columns=columns)


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
