"""Pruning of what is not needed any more, and the compaction of feature groups.

What assets refer to, what is younger than the limit, and versions that are served or compared with stay.
"""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import dagster as dg
from pydantic import Field

from housing_assets.checks.serving import watch_endpoint
from housing_assets.maintenance.inventory import CleanUp, Removable
from housing_assets.maintenance.sweeper import sweep
from housing_assets.maintenance.unneeded import (
    References,
    captured_folders,
    commits_in,
    find_references,
    nested,
    old_runs,
    reasons_to_keep,
    unneeded_evidence,
    unused_results,
    uris_in,
)
from housing_assets.runs.executor import BUSY
from housing_assets.settings import Settings
from resources.compute.base import table
from resources.endpoints.captured_files import surplus
from resources.feature_store.base import FeatureStore
from resources.model_registry.base import ModelVersion
from step_scripts.runner import storage
from step_scripts.runner.wording import counted, rounded

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
_SETTINGS = Settings.load()


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
        default=_SETTINGS.capture_megabytes or 10_000.0, ge=0, description="Bound of an endpoint's captured requests."
    )
    dry_run: bool = Field(default=True, description="Only list what would be removed.")


@dg.op(required_resource_keys={"compute", "io_manager", "model_registry", "endpoint_host", "feature_store", "evidence"})
def prune_old(context: dg.OpExecutionContext, config: PruneConfig) -> None:
    """List, and unless it is a dry run remove, what is old and unused; one failure does not keep the rest."""
    pruning = Pruning(context, config)
    clean_up = pruning.clean_up
    clean_up.remove(pruning.find())
    gone = clean_up.gone
    metadata = {
        "dry_run": config.dry_run,
        **{name: sum(one.kind == kind for one in gone) for kind, name in _FIGURES.items()},
        "megabytes": rounded(sum(one.bytes for one in gone) / 1e6),
        "would_remove" if config.dry_run else "removed": table(
            [{"kind": one.kind, "name": one.name, "detail": one.detail} for one in gone]
        ),
        "versions_kept": table([{"version": v.reference, "why": why} for v, why in pruning.versions_kept]),
        "versions_wait_for_runs": pruning.running,
        "left": dg.MetadataValue.json({place: why for place, (_, why) in clean_up.left.items()}),
    }
    clean_up.finish(context, "the pruning is incomplete", metadata)


class Pruning:
    """Finds what one run of `prune` removes."""

    def __init__(self, context: dg.OpExecutionContext, config: PruneConfig) -> None:
        self.context, self.config, self.resources = context, config, context.resources
        self.clean_up = CleanUp(context.log, dry_run=config.dry_run)
        self.versions_kept: list[tuple[ModelVersion, str]] = []
        self.now = datetime.now(UTC)
        self.results_before = self.now - timedelta(days=config.results_days)
        self.runs_before = self.now - timedelta(days=config.runs_days)
        self.busy = context.instance.get_runs(dg.RunsFilter(statuses=BUSY))
        # Runs that may be about to deploy a version, or to compare with one.
        harmless = {prune.name, compact.name, sweep.name, watch_endpoint.name}
        self.running = ", ".join(run.run_id[:8] for run in self.busy if run.job_name not in harmless)

    def find(self) -> list[Removable]:
        """Everything, in the order of removal: first what a decision or a deployment may need a moment later."""
        resources: Any = self.resources
        noted, found = self.clean_up.noted, []
        if self.running:
            self.context.log.info(f"model versions stay for now: runs {self.running} are in progress and may need one")
        # Where a reference cannot be read, it is not known what it needs: everything it may need stays.
        with noted("references (so results, model versions, evidence and runs stay)"):
            references = find_references(
                self.context.instance,
                resources.io_manager.root,
                before=self.results_before,
                forgotten=self.runs_before,
                busy={run.run_id for run in self.busy},
            )
            found += self._unneeded(references)
        with noted("captured requests"):
            files = resources.endpoint_host.captured_files()
            oldest = self.now - timedelta(days=self.config.capture_days)
            chosen = surplus(files, oldest, self.config.capture_megabytes * 1e6)
            found += captured_folders(chosen, resources.endpoint_host.remove_captured)
        found += [
            replace(one, kind="rest", name=one.place, detail=f"{one.kind}: {one.detail}")
            for one in self.clean_up.look(resources, _DISCARDING)
            if one.item and one.item.discarded
        ]
        return found

    def _unneeded(self, references: References) -> list[Removable]:
        """What needs to know the references: versions, references, results, evidence, snapshots and runs."""
        resources, instance, noted = self.resources, self.context.instance, self.clean_up.noted
        current = uris_in(references.current.values())
        readable = [*references.current.values(), *references.waiting.values()]
        registered, found, complete = self._versions(current)
        for uri in references.surplus:
            found.append(Removable("reference", uri, uri, "replaced since", partial(storage.delete_file, uri)))
        found += unused_results(resources.compute.artifact_root, uris_in(readable), self.results_before)
        if complete:  # else something that cannot be read may need any evidence, and any snapshot
            named = [stored.value for stored in readable]
            named += [[v.artifact.digest, v.gate.evaluation_digest, dict(v.lineage)] for v in registered]
            with noted("evidence and snapshots of feature groups"):
                groups = [item.name for item in resources.feature_store.inventory() if not item.discarded]
                found += self._evidence(named, groups)
                kept = commits_in(named)
                for group in groups:
                    with noted(f"snapshots of feature group {group}"):
                        found += self._snapshots(group, kept.get(group, set()))
        for run_id in old_runs(instance, self.runs_before, self.context.run, references.latest_runs):
            found.append(Removable("run", run_id, run_id, "with its events", partial(instance.delete_run, run_id)))
        return found

    def _versions(self, in_use: set[str]) -> tuple[list[ModelVersion], list[Removable], bool]:
        """All registered versions; those beyond the newest of a group that nothing needs; whether all could be read."""
        registry, problems = self.resources.model_registry, self.clean_up.problems
        registered: list[ModelVersion] = []
        found: list[Removable] = []
        known_problems = len(problems)
        with self.clean_up.noted("model versions"):
            items = {i.name: i for i in registry.inventory() if i.kind == "model_package" and not i.discarded}
            endpoints = self.resources.endpoint_host.list()
            served = {e.previous_version: f"endpoint {e.name} goes back to it" for e in endpoints if e.previous_version}
            served |= {e.version: f"endpoint {e.name} serves it" for e in endpoints}
            pending_since = self.now - timedelta(days=self.config.pending_days)
            for group in sorted({name.rpartition("/")[0] for name in items}):
                with self.clean_up.noted(group):
                    versions = registry.list(group, damaged=problems)
                    registered += versions
                    reasons = {**reasons_to_keep(versions, in_use, pending_since), **served}
                    old = [v for v in versions if v.reference in items][: -self.config.versions]
                    for version in old if not self.running else []:
                        name = version.reference
                        if reason := reasons.get(name):
                            self.versions_kept.append((version, reason))
                            continue
                        detail = f"{version.status}, registered {version.created_at:%Y-%m-%d}"
                        size = sum(file.bytes for file in version.artifact.files)
                        remove = partial(registry.remove, items[name])
                        found.append(Removable("model version", name, name, detail, remove, size))
        return registered, found, len(problems) == known_problems

    def _evidence(self, named: list[Any], groups: list[str]) -> list[Removable]:
        """Evidence of what neither a reference, a version nor a feature group mentions."""
        store = self.resources.feature_store
        known = {value for value in nested(named) if isinstance(value, str)}
        found: list[Removable] = []
        if self.running:
            return found
        with self.clean_up.noted("evidence"):
            for group in groups:
                known |= store.dataset_digests(group)
            found += unneeded_evidence(self.resources.evidence, known, self.results_before)
        return found

    def _snapshots(self, group: str, kept: set[int]) -> list[Removable]:
        """One removal of a feature group, if any: old snapshots that nothing names, and files that no snapshot has."""
        store: FeatureStore = self.resources.feature_store
        found = store.tidy(group, kept, self.results_before, dry_run=True)
        if found.expired or found.orphans:
            detail = f"{counted(len(found.expired), 'old snapshot')}, {counted(len(found.orphans), 'orphan file')}"
            remove = partial(store.tidy, group, kept, self.results_before)
            return [Removable("snapshots", group, group, detail, remove, found.bytes)]
        if not self.config.dry_run:
            store.tidy(group, kept, self.results_before)  # nothing but to tag the snapshots that are kept
        return []


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


class CompactConfig(dg.Config):
    """Which groups."""

    groups: list[str] = Field(default=[], description="Names of feature groups; all, if there are none.")


@dg.op(required_resource_keys={"feature_store"})
def compact_groups(context: dg.OpExecutionContext, config: CompactConfig) -> None:
    """Compact one group after the other, whatever happens to one of them."""
    store: FeatureStore = context.resources.feature_store
    names = config.groups or [item.name for item in store.inventory() if not item.discarded]
    clean_up, done = CleanUp(context.log), []
    for name in names:
        with clean_up.noted(name):
            done.append({"group": name, **store.compact(name)})
            before, after = counted(done[-1]["files_before"], "file"), done[-1]["files_after"]
            context.log.info(f"feature group {name}: {before} before, {after:,} now")
    metadata = {"compacted": table(done), "left": dg.MetadataValue.json(clean_up.problems)}
    clean_up.finish(context, "not all feature groups were compacted", metadata)


@dg.job
def compact() -> None:
    """Bring the many small files of a local feature store together, day by day. No record changes.

    The old files go when job `prune` has expired the snapshots that have them.
    """
    compact_groups()
