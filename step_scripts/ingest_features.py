"""Step: ingest validated rows into a feature store.

Passes of Ray Data, by tasks (or, where their number is configured, actors), compare the rows with what is stored, write
what is new or changed, and read it back; where there is an online store, they bring it up to date; then one commit
makes all visible. If a single row cannot be read back, nothing is committed and the step fails.
"""

from __future__ import annotations

from functools import partial

import ray
from pydantic import BaseModel, ConfigDict, ValidationError

from step_scripts.feature_store.ingestion import STORED_COUNTS, Ingestion, IngestionResult
from step_scripts.feature_store.offline_store import OfflineStore
from step_scripts.feature_store.online_store import MISSING_RECORDS, OnlineTarget
from step_scripts.parameters import IngestFeaturesParams
from step_scripts.runner import storage
from step_scripts.runner.contract import StepContext, StepDefinition, StepError, StepOutcome
from step_scripts.runner.ray_data import each_call
from step_scripts.runner.wording import counted


class Target(BaseModel):
    """Where a feature store is, and how rows enter it. `mirror`: delete the group's records that the dataset lacks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: str
    mirror: bool = False
    online: OnlineTarget | None = None


def run(context: StepContext, params: IngestFeaturesParams) -> StepOutcome:
    """Ingest the artifact `rows`; the output `features` are the group's files and the digest of its live records.

    Raises `StepError`, having changed nothing, for a target of another kind, and for all that `Ingestion` refuses.
    """
    try:
        target = Target.model_validate(params.target)
    except ValidationError as error:
        raise StepError(f"target of step ingest_features is not that of a feature store: {error}") from error
    ingestion = Ingestion(
        OfflineStore(target.root).folder(params.group),
        params.table,
        context.inputs["rows"],
        partial(each_call, actors=params.num_actors),
        context.log,
        mirror=target.mirror,
        workers=params.num_actors or max(1, int(ray.cluster_resources().get("CPU", 1))),
        online=target.online,
        missing_uri=storage.join(context.output_uri("features"), MISSING_RECORDS),
        phase=context.phase,
        confirm=context.confirm,
    )
    return _outcome(context, ingestion.ingest(), online=target.online is not None)


def _outcome(context: StepContext, result: IngestionResult, *, online: bool) -> StepOutcome:
    commit = result.commit
    counts = {name: getattr(result, name) for name in STORED_COUNTS}
    context.log.info(
        f"feature group {result.state.name}: {counted(result.rows_in, 'row')} in, {result.rows_readable:,} readable; "
        + ", ".join(f"{count:,} {name}" for name, count in counts.items())
        + f"; commit {commit.number}, {counted(commit.live_rows, 'live record')}"
    )
    if result.outdated:
        context.log.warning(f"rows older than what the feature group holds of their records: {result.outdated:,}")
    metrics: dict[str, float] = {"rows_in": result.rows_in, "rows_readable": result.rows_readable, **counts}
    if online:
        metrics["written_online"] = result.written_online
    return StepOutcome(
        outputs={"features": result.state.artifact()},
        metrics=metrics,
        details={
            "group": result.state.name,
            "commit": commit.number,
            "snapshot_id": str(commit.snapshot_id),
            "committed": not result.already_ingested,
            "already_ingested": result.already_ingested,
            "deduplicate": commit.deduplicate,
            "outdated_rows": result.outdated,
            "day_partitions_written": result.day_partitions,
            "live_rows": commit.live_rows,
            "files": len(result.state.files),
            "orphan_files_deleted": result.orphan_files_deleted,
            "timings": {name: round(seconds, 3) for name, seconds in context.seconds.items()},
        },
    )


STEP = StepDefinition(params=IngestFeaturesParams, run=run, inputs=("rows",), outputs=("features",))
