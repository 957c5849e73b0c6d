"""Pruning: results of steps, model versions and captured requests that nobody needs any more, and old runs of Dagster.

What assets refer to, what is younger than the limit, and versions that are served or compared with stay.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field

from housing_assets.deployments import load_automation
from housing_assets.model_retention import VersionsFound, find_versions
from housing_assets.sweeper import sweep
from housing_assets.teardown import BUSY, expected_errors
from housing_assets.watching import watch_endpoint
from resources.compute.base import table
from resources.endpoints.captured_files import CapturedFile, surplus
from resources.model_registry.base import ModelVersion
from step_scripts import storage

_FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_RUNS_AT_ONCE = 200
_FIGURES = {
    "result": "results",
    "model version": "model_versions",
    "captured requests": "captured_folders",
    "run": "runs",
}
_SETTINGS = load_automation()


class PruneConfig(dg.Config):
    """What is old, and whether it is only listed."""

    results_days: float = Field(default=30.0, ge=0, description="Results of steps unused for so many days are pruned.")
    runs_days: float = Field(default=90.0, ge=0, description="Runs that ended so many days ago are pruned.")
    versions: int = Field(default=_SETTINGS.keep_versions, ge=1, description="Newest versions of a model that stay.")
    pending_days: float = Field(
        default=_SETTINGS.pending_days, ge=0, description="Versions that wait for a decision stay for so many days."
    )
    capture_days: float = Field(
        default=_SETTINGS.capture_days, ge=0, description="Captured requests older than so many days are pruned."
    )
    capture_megabytes: float = Field(
        default=_SETTINGS.capture_megabytes, ge=0, description="Bound of an endpoint's captured requests."
    )
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
    """All URIs in the references of assets. Raises `ValueError` naming a reference that cannot be read."""

    def uris(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for name, item in value.items():
                if name == "uri" and isinstance(item, str):
                    yield item
                yield from uris(item)
        elif isinstance(value, list):
            for item in value:
                yield from uris(item)

    found: set[str] = set()
    for file in storage.list_files(references_root):
        if file.endswith(".json"):
            try:
                found.update(uris(json.loads(storage.read_bytes(file))))
            except ValueError as error:
                raise ValueError(f"{file} is damaged ({error}): materialize its asset again, or remove it") from error
    return found


def unused(results: list[StoredResult], referenced: set[str], before: datetime) -> list[StoredResult]:
    """Those last changed `before`, that no reference points into."""
    return [
        result
        for result in results
        if result.changed_at < before and not any((uri + "/").startswith(result.uri + "/") for uri in referenced)
    ]


@dataclass(frozen=True)
class Removal:
    """Something to remove, and how."""

    kind: str
    name: str
    detail: str
    remove: Callable[[], None]
    bytes: int = 0


@dg.op(required_resource_keys={"compute", "io_manager", "model_registry", "endpoint_host"})
def prune_old(context: dg.OpExecutionContext, config: PruneConfig) -> None:
    """List, and unless it is a dry run remove, what is old and unused; one failure does not keep the rest."""
    now = datetime.now(UTC)
    problems: dict[str, str] = {}
    resources: Any = context.resources
    referenced: set[str] | None = None  # not known: nothing that an asset may refer to is removed
    with _noted("references, and so results and model versions", problems):
        referenced = referenced_uris(resources.io_manager.root)
    running = _others_in_progress(context)
    versions = VersionsFound()
    if referenced is None:
        context.log.warning("results and model versions stay: the references of assets cannot be read")
    elif running:
        context.log.info(f"model versions stay for now: runs {running} are in progress and may need one")
    else:
        with _noted("model versions", problems):
            versions = find_versions(
                resources.model_registry,
                resources.endpoint_host,
                referenced,
                newest=config.versions,
                pending_since=now - timedelta(days=config.pending_days),
            )
    problems |= versions.problems
    # First what a decision or a deployment may need a moment later.
    found = [_of_version(version, partial(resources.model_registry.remove, item)) for version, item in versions.surplus]
    if referenced is not None:
        with _noted("results", problems):
            results = stored_results(resources.compute.artifact_root)
            found += [_of_result(r) for r in unused(results, referenced, now - timedelta(days=config.results_days))]
    with _noted("captured requests", problems):
        captured = resources.endpoint_host.captured_files()
        chosen = surplus(captured, now - timedelta(days=config.capture_days), config.capture_megabytes * 1e6)
        found += _of_captured(chosen, resources.endpoint_host.remove_captured)
    for run_id in _old_runs(context.instance, now - timedelta(days=config.runs_days), context.run_id):
        found.append(Removal("run", run_id, "with its events", partial(context.instance.delete_run, run_id)))
    failed = _remove(found, context.log, dry_run=config.dry_run)
    gone = [removal for removal in found if removal.name not in failed]
    metadata = {
        "dry_run": config.dry_run,
        **{name: sum(removal.kind == kind for removal in gone) for kind, name in _FIGURES.items()},
        "megabytes": round(sum(removal.bytes for removal in gone) / 1e6, 3),
        "would_remove" if config.dry_run else "removed": table([_shown(removal) for removal in gone]),
        "versions_kept": table([{"version": v.reference, "why": why} for v, why in versions.kept]),
        "versions_wait_for_runs": running,
        "left": dg.MetadataValue.json(failed),
        "could_not_be_listed": dg.MetadataValue.json(problems),
    }
    if failed or problems:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in {**failed, **problems}.items())
        raise dg.Failure(
            f"the pruning is incomplete: {reasons}. Remove the reason, then run prune again",
            metadata=metadata,
            allow_retries=False,
        )
    context.add_output_metadata(metadata)


@contextmanager
def _noted(what: str, problems: dict[str, str]) -> Iterator[None]:
    """Goes on after what may be expected to fail, with the reason among the problems."""
    try:
        yield
    except expected_errors() as error:
        problems[what] = f"{type(error).__name__}: {error}"


def _of_version(version: ModelVersion, remove: Callable[[], None]) -> Removal:
    detail = f"{version.status}, registered {version.created_at:%Y-%m-%d}"
    return Removal("model version", version.reference, detail, remove, sum(f.bytes for f in version.artifact.files))


def _of_result(result: StoredResult) -> Removal:
    detail = f"{result.files} files, {result.bytes / 1e6:,.1f} MB"
    return Removal("result", result.uri, detail, partial(storage.delete, result.uri), result.bytes)


def _of_captured(files: Sequence[CapturedFile], remove: Callable[[Sequence[CapturedFile]], None]) -> Iterator[Removal]:
    """One removal a folder: there may be a file a minute."""
    for folder in sorted({file.folder for file in files}):
        chosen = [file for file in files if file.folder == folder]
        size = sum(file.bytes for file in chosen)
        detail = f"{len(chosen)} files, {size / 1e6:,.1f} MB, the latest of {chosen[-1].changed_at:%Y-%m-%d %H:%M}"
        yield Removal("captured requests", folder, detail, partial(remove, chosen), size)


def _remove(found: Sequence[Removal], log: Any, *, dry_run: bool) -> dict[str, str]:
    """Remove one after the other, whatever happens to one of them. Returns why what is left could not be removed."""
    failed = {}
    for removal in found:
        log.info(f"{'would remove' if dry_run else 'removing'} {removal.kind} {removal.name}: {removal.detail}")
        if dry_run:
            continue
        try:
            removal.remove()
        except expected_errors() as error:
            failed[removal.name] = f"{type(error).__name__}: {error}"
            log.error(f"{removal.kind} {removal.name} could not be removed: {failed[removal.name]}")
    return failed


def _shown(removal: Removal) -> dict[str, str]:
    return {"kind": removal.kind, "name": removal.name, "detail": removal.detail}


def _others_in_progress(context: dg.OpExecutionContext) -> str:
    """Ids of runs that may be about to deploy a version, or to compare with one."""
    harmless = {prune.name, sweep.name, watch_endpoint.name}
    busy = context.instance.get_runs(dg.RunsFilter(statuses=BUSY), limit=50)
    return ", ".join(run.run_id[:8] for run in busy if run.job_name not in harmless)


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
    """Remove results of steps that no asset refers to, old versions of models, captured requests and runs.

    Versions that are served, compared with or waited for stay. A dry run by default: it lists what it would remove.
    """
    prune_old()


nightly_prune = dg.ScheduleDefinition(
    name="nightly_prune",
    job=prune,
    cron_schedule=_SETTINGS.prune_cron,
    execution_timezone=_SETTINGS.timezone,
    run_config={"ops": {"prune_old": {"config": {"dry_run": False}}}},
    description="Removes every night what job prune lists (HOUSING_PRUNE_CRON, HOUSING_TIMEZONE).",
)
