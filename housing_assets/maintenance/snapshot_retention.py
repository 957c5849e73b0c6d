"""Snapshots of feature groups: which stay for splits and model versions. The job that compacts the groups' files."""

from collections.abc import Iterable

import dagster as dg
from pydantic import Field

from housing_assets.maintenance.reference_retention import nested
from resources.compute.base import table
from resources.feature_store.base import FeatureStore
from resources.model_registry.base import ModelVersion
from resources.references.files import StoredReference
from step_scripts.runner.contract import StepError
from step_scripts.runner.wording import counted


def kept_commits(versions: Iterable[ModelVersion], references: Iterable[StoredReference]) -> dict[str, set[int]]:
    """Commits, by feature group, that references which a step may read or registered versions name."""
    kept: dict[str, set[int]] = {}
    for value in nested([*(stored.value for stored in references), *(dict(version.lineage) for version in versions)]):
        if isinstance(value, dict):
            group, commit = value.get("group"), value.get("commit")
            if isinstance(group, str) and isinstance(commit, int):
                kept.setdefault(group, set()).add(commit)
    return kept


class CompactConfig(dg.Config):
    """Which groups."""

    groups: list[str] = Field(default=[], description="Names of feature groups; all, if there are none.")


@dg.op(required_resource_keys={"feature_store"})
def compact_groups(context: dg.OpExecutionContext, config: CompactConfig) -> None:
    """Compact one group after the other, whatever happens to one of them."""
    store: FeatureStore = context.resources.feature_store
    names = config.groups or [item.name for item in store.inventory() if not item.discarded]
    done, failed = [], {}
    for name in names:
        try:
            done.append({"group": name, **store.compact(name)})
            before, after = counted(done[-1]["files_before"], "file"), done[-1]["files_after"]
            context.log.info(f"feature group {name}: {before} before, {after:,} now")
        except StepError as error:
            failed[name] = str(error)
            context.log.error(f"feature group {name} was not compacted: {error}")
    metadata = {"compacted": table(done), "left": dg.MetadataValue.json(failed)}
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise dg.Failure(f"not all feature groups were compacted: {reasons}", metadata=metadata, allow_retries=False)
    context.add_output_metadata(metadata)


@dg.job
def compact() -> None:
    """Bring the many small files of a local feature store together, day by day. No record changes.

    The old files go when job `prune` has expired the snapshots that have them.
    """
    compact_groups()
