"""Pruning: results of steps that nothing refers to any more, and old runs of Dagster.

What assets refer to, what is younger than the limit, and what the registry holds (its own copies) stays.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field

from resources.compute.base import ComputeBackend
from step_scripts import storage

_FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_RUNS_AT_ONCE = 200


class PruneConfig(dg.Config):
    """What is old, and whether it is only listed."""

    results_days: float = Field(default=30.0, ge=0, description="Results of steps unused for so many days are pruned.")
    runs_days: float = Field(default=90.0, ge=0, description="Runs that ended so many days ago are pruned.")
    dry_run: bool = Field(default=True, description="Only list what would be removed.")


class StoredResult(BaseModel):
    """One folder of a step's outputs. `changed_at`: the latest change of a file in it."""

    model_config = ConfigDict(frozen=True)

    uri: str
    step: str
    files: int
    bytes: int
    changed_at: datetime


def stored_results(root: str) -> list[StoredResult]:
    """All folders `<root>/<step>/<request digest>` with what they hold."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for path, size, modified in storage.list_details(root):
        parts = path.split("/")
        if len(parts) > 2:
            found.setdefault((parts[0], parts[1]), []).append((size, modified))
    return [
        StoredResult(
            uri=storage.join(root, step, digest),
            step=step,
            files=len(files),
            bytes=sum(size for size, _ in files),
            changed_at=datetime.fromtimestamp(max(modified for _, modified in files), UTC),
        )
        for (step, digest), files in sorted(found.items())
    ]


def referenced_uris(references_root: str) -> set[str]:
    """All URIs in the references of assets."""

    def uris(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for name, item in value.items():
                if name == "uri" and isinstance(item, str):
                    yield item
                yield from uris(item)
        elif isinstance(value, list):
            for item in value:
                yield from uris(item)

    return {
        uri
        for file in storage.list_files(references_root)
        if file.endswith(".json")
        for uri in uris(json.loads(storage.read_bytes(file)))
    }


def unused(results: list[StoredResult], referenced: set[str], before: datetime) -> list[StoredResult]:
    """Those last changed `before`, that no reference points into."""
    return [
        result
        for result in results
        if result.changed_at < before and not any((uri + "/").startswith(result.uri + "/") for uri in referenced)
    ]


@dg.op(required_resource_keys={"compute", "io_manager"})
def prune_old(context: dg.OpExecutionContext, config: PruneConfig) -> None:
    """List, and unless it is a dry run remove, results and runs that are old and unused."""
    now = datetime.now(UTC)
    compute: ComputeBackend = context.resources.compute
    old = unused(
        stored_results(compute.artifact_root),
        referenced_uris(context.resources.io_manager.root),
        now - timedelta(days=config.results_days),
    )
    runs = _old_runs(context.instance, now - timedelta(days=config.runs_days), context.run_id)
    verb = "would remove" if config.dry_run else "removing"
    for result in old:
        context.log.info(f"{verb} {result.uri}: {result.files} files, {result.bytes / 1e6:,.1f} MB")
        if not config.dry_run:
            storage.delete(result.uri)
    for run_id in runs:
        context.log.info(f"{verb} run {run_id} and its events")
        if not config.dry_run:
            context.instance.delete_run(run_id)
    context.add_output_metadata(
        {
            "dry_run": config.dry_run,
            "results": len(old),
            "megabytes": round(sum(result.bytes for result in old) / 1e6, 3),
            "runs": len(runs),
        }
    )


def _old_runs(instance: dg.DagsterInstance, before: datetime, own: str) -> list[str]:
    """Ids of runs that were made and have ended before that time, oldest first, without those that hold the latest
    materialization of an asset: the asset's metadata is theirs."""
    latest = {
        record.asset_entry.last_run_id for record in instance.get_asset_records() if record.asset_entry.last_run_id
    }
    kept = latest | {own}
    records = instance.get_run_records(
        dg.RunsFilter(statuses=_FINISHED, created_before=before), limit=_RUNS_AT_ONCE, ascending=True
    )
    return [record.dagster_run.run_id for record in records if record.dagster_run.run_id not in kept]


@dg.job
def prune() -> None:
    """Remove results of steps that no asset refers to and that are older than 30 days, and runs older than 90 days.

    A dry run by default: it lists what it would remove.
    """
    prune_old()
