"""Pruning of what is not needed any more.

That is: results of steps, references, evidence of checks, model versions, captured requests, snapshots of feature
groups, and old runs of Dagster.

What assets refer to, what is younger than the limit, and versions that are served or compared with stay.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field

from housing_assets.checks.watching import watch_endpoint
from housing_assets.code_location import asset_keys, whole
from housing_assets.maintenance.model_retention import VersionsFound, find_versions, registered_versions
from housing_assets.maintenance.owners import resource_owners
from housing_assets.maintenance.reference_retention import ReferencesFound, find_references, nested, uris_in
from housing_assets.maintenance.snapshot_retention import compact, kept_commits
from housing_assets.maintenance.sweeper import sweep
from housing_assets.runs.statuses import BUSY, FINISHED
from housing_assets.settings import load_automation
from resources.compute.base import table
from resources.endpoints.captured_files import CapturedFile, surplus
from resources.feature_store.base import FeatureStore
from resources.inventory import RESULT_FILE, OwnedItem, expected_errors, remove_file
from resources.model_registry.base import ModelVersion
from resources.references.evidence import EvidenceStore
from resources.references.files import reference_files
from step_scripts.runner import storage
from step_scripts.runner.wording import counted, megabytes, rounded

_RUNS_AT_ONCE = 200
_DISCARDING = ("feature_store", "model_registry", "endpoint_host")
_FIGURES = {
    "result": "results",
    "reference": "references",
    "model version": "model_versions",
    "captured requests": "captured_folders",
    "snapshots": "tidied_feature_groups",
    "rest": "rests",
    "evidence": "evidence",
    "run": "runs",
}
_SETTINGS = load_automation()


class PruneConfig(dg.Config):
    """What is old, and whether it is only listed."""

    results_days: float = Field(
        default=30.0, ge=0, description="Results of steps unused, and references replaced, for so many days are pruned."
    )
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
    """All folders `<root>/<step>/<request digest>` with what they hold. Other things there are not ours."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for path, size, modified in storage.list_details(root):
        if match := RESULT_FILE.fullmatch(path):
            found.setdefault((match["step"], match["digest"]), []).append((size, modified))
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


def unused(results: list[StoredResult], referenced: set[str], before: datetime) -> list[StoredResult]:
    """Those last changed `before`, that no reference points into."""
    return [
        result
        for result in results
        if result.changed_at < before and not any((uri + "/").startswith(result.uri + "/") for uri in referenced)
    ]


def mentioned(resources: Any, versions: Sequence[ModelVersion]) -> set[str]:
    """All texts in references and registered versions, and the datasets of feature groups: digests among them."""
    files = [file for found in reference_files(resources.io_manager.root, asset_keys()).values() for file in found]
    values = [json.loads(storage.read_bytes(file)) for file in files]
    values += [[v.artifact.digest, v.gate.evaluation_digest, dict(v.lineage)] for v in versions]
    found = {value for value in nested(values) if isinstance(value, str)}
    store = resources.feature_store
    for item in [item for item in store.inventory() if not item.discarded]:
        if not store.describe(item.name)["commits"]:
            continue
        # As of now: with the datasets before the last one that replaced all others.
        snapshot = store.offline(item.name, as_of=datetime.now(UTC))
        found |= {dataset.digest for dataset in store.snapshot_lineage(snapshot).datasets}
    return found


def unneeded_evidence(evidence: EvidenceStore, known: set[str], before: datetime) -> list[tuple[str, str]]:
    """URI and check of old evidence, where nothing mentions any digest that was judged."""
    names = ("group", "endpoint")  # no digests: what is named so may hold other content now
    return [
        (uri, f"of check {found.check}" if found else "damaged")
        for uri, at, found in evidence.stored()
        if at < before and not (found and any(v in known for k, v in found.judged.inputs.items() if k not in names))
    ]


@dataclass(frozen=True)
class Removal:
    """Something to remove, and how."""

    kind: str
    name: str
    detail: str
    remove: Callable[[], object]
    bytes: int = 0


@dg.op(required_resource_keys={"compute", "io_manager", "model_registry", "endpoint_host", "feature_store", "evidence"})
def prune_old(context: dg.OpExecutionContext, config: PruneConfig) -> None:
    """List, and unless it is a dry run remove, what is old and unused; one failure does not keep the rest."""
    now = datetime.now(UTC)
    problems: dict[str, str] = {}
    resources: Any = context.resources
    busy = context.instance.get_runs(dg.RunsFilter(statuses=BUSY))
    running = _needing_versions(busy)
    if running:
        context.log.info(f"model versions stay for now: runs {running} are in progress and may need one")
    found: list[Removal] = []
    versions = VersionsFound()
    # Where a reference cannot be read, it is not known what it needs: everything it may need stays.
    with _noted("references (so results, model versions, evidence and runs stay)", problems):
        references = find_references(
            context.instance,
            resources.io_manager.root,
            asset_keys(),
            before=now - timedelta(days=config.results_days),
            forgotten=now - timedelta(days=config.runs_days),
            busy={run.run_id for run in busy},
        )
        versions, found = _unneeded(context, config, now, references, running, problems)
    with _noted("captured requests", problems):
        captured = resources.endpoint_host.captured_files()
        chosen = surplus(captured, now - timedelta(days=config.capture_days), config.capture_megabytes * 1e6)
        found += _of_captured(chosen, resources.endpoint_host.remove_captured)
    for owner in resource_owners(resources, _DISCARDING):
        with _noted(owner.name, problems):
            found += [_of_rest(item, owner.remove) for item in owner.inventory() if item.discarded]
    failed = _remove(found, context.log, dry_run=config.dry_run)
    gone = [removal for removal in found if removal.name not in failed]
    metadata = {
        "dry_run": config.dry_run,
        **{name: sum(removal.kind == kind for removal in gone) for kind, name in _FIGURES.items()},
        "megabytes": rounded(sum(removal.bytes for removal in gone) / 1e6),
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


def _unneeded(
    context: dg.OpExecutionContext,
    config: PruneConfig,
    now: datetime,
    references: ReferencesFound,
    running: str,
    problems: dict[str, str],
) -> tuple[VersionsFound, list[Removal]]:
    """Versions, references, results, evidence and runs that nothing needs; versions that stay, with the reason."""
    resources: Any = context.resources
    results_before, runs_before = now - timedelta(days=config.results_days), now - timedelta(days=config.runs_days)
    current = uris_in(references.current.values())
    versions = VersionsFound()
    if not running:
        with _noted("model versions", problems):
            versions = find_versions(
                resources.model_registry,
                resources.endpoint_host,
                current,
                newest=config.versions,
                pending_since=now - timedelta(days=config.pending_days),
            )
    problems |= versions.problems
    # First what a decision or a deployment may need a moment later.
    found = [_of_version(version, partial(resources.model_registry.remove, item)) for version, item in versions.surplus]
    found += [Removal("reference", uri, "replaced since", partial(remove_file, uri)) for uri in references.surplus]
    in_use = current | uris_in(references.waiting.values())
    found += [_of_result(r) for r in unused(stored_results(resources.compute.artifact_root), in_use, results_before)]
    with _noted("evidence and snapshots of feature groups", problems):
        registered = registered_versions(resources.model_registry)
        if not running:
            with _noted("evidence", problems):
                unneeded = unneeded_evidence(resources.evidence, mentioned(resources, registered), results_before)
                found += [
                    Removal("evidence", uri, why, partial(resources.evidence.remove_file, uri)) for uri, why in unneeded
                ]
        kept = kept_commits(registered, [*references.current.values(), *references.waiting.values()])
        for item in [item for item in resources.feature_store.inventory() if not item.discarded]:
            with _noted(f"snapshots of feature group {item.name}", problems):
                commits = kept.get(item.name, set())
                found += _of_snapshots(resources.feature_store, item.name, commits, results_before, config.dry_run)
    for run_id in _old_runs(context.instance, runs_before, context.run, references.latest_runs):
        found.append(Removal("run", run_id, "with its events", partial(context.instance.delete_run, run_id)))
    return versions, found


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
    detail = f"{counted(result.files, 'file')}, {megabytes(result.bytes)}"
    return Removal("result", result.uri, detail, partial(storage.delete, result.uri), result.bytes)


def _of_rest(item: OwnedItem, remove: Callable[[OwnedItem], None]) -> Removal:
    return Removal("rest", item.location, f"{item.kind}: {item.detail}", partial(remove, item))


def _of_captured(files: Sequence[CapturedFile], remove: Callable[[Sequence[CapturedFile]], None]) -> Iterator[Removal]:
    """One removal a folder: there may be a file a minute."""
    for folder in sorted({file.folder for file in files}):
        chosen = [file for file in files if file.folder == folder]
        size = sum(file.bytes for file in chosen)
        detail = (
            f"{counted(len(chosen), 'file')}, {megabytes(size)}, the latest of {chosen[-1].changed_at:%Y-%m-%d %H:%M}"
        )
        yield Removal("captured requests", folder, detail, partial(remove, chosen), size)


def _of_snapshots(
    store: FeatureStore, group: str, kept: set[int], before: datetime, dry_run: bool
) -> Iterator[Removal]:
    """One removal of a feature group, if any: old snapshots that nothing names, and files that no snapshot has."""
    found = store.tidy(group, kept, before, dry_run=True)
    if found.expired or found.orphans:
        detail = f"{counted(len(found.expired), 'old snapshot')}, {counted(len(found.orphans), 'orphan file')}"
        yield Removal("snapshots", group, detail, partial(store.tidy, group, kept, before), found.bytes)
    elif not dry_run:
        store.tidy(group, kept, before)  # nothing but to tag the snapshots that are kept


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


def _needing_versions(busy: Sequence[dg.DagsterRun]) -> str:
    """Ids of runs that may be about to deploy a version, or to compare with one."""
    harmless = {prune.name, compact.name, sweep.name, watch_endpoint.name}
    return ", ".join(run.run_id[:8] for run in busy if run.job_name not in harmless)


def _old_runs(
    instance: dg.DagsterInstance, before: datetime, own: dg.DagsterRun, needed: Collection[str] = ()
) -> list[str]:
    """Ids of this code location's runs that were made and have ended before that time, oldest first.

    Without those that are `needed` or hold the latest materialization of an asset: the asset's metadata is theirs.
    """
    latest = {
        record.asset_entry.last_run_id for record in instance.get_asset_records() if record.asset_entry.last_run_id
    }
    kept, ours = latest | {*needed, own.run_id}, _own_runs(own)
    records = instance.get_run_records(
        dg.RunsFilter(statuses=FINISHED, created_before=before), limit=_RUNS_AT_ONCE, ascending=True
    )
    return [r.dagster_run.run_id for r in records if r.dagster_run.run_id not in kept and ours(r.dagster_run)]


def _own_runs(own: dg.DagsterRun) -> Callable[[dg.DagsterRun], bool]:
    """Tells this code location's runs from those of others that share the instance.

    A run that the UI or the daemon has launched names its code location. One from the command line does not: then its
    job, and for a materialization its assets, must be ours.
    """
    assets = set(asset_keys())
    jobs = {job.name for job in whole().resolve_all_job_defs()}
    here = _code_location(own)

    def is_ours(run: dg.DagsterRun) -> bool:
        if here is not None and (place := _code_location(run)) is not None:
            return place == here
        if not run.job_name.startswith("__"):
            return run.job_name in jobs
        checked = {check.asset_key for check in run.asset_check_selection or ()}
        chosen = {*(run.asset_selection or ()), *checked}
        return bool(chosen) and chosen <= assets

    return is_ours


def _code_location(run: dg.DagsterRun) -> str | None:
    origin = run.remote_job_origin
    return origin.repository_origin.code_location_origin.location_name if origin else None


@dg.job
def prune() -> None:
    """Remove results that no asset refers to, replaced references, old versions of models, captured requests, snapshots
    of feature groups that neither a split nor a version names, and runs.

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
