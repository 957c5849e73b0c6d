"""Step: ingest validated rows into a feature store.

Passes of Ray Data, by tasks (or, where their number is configured, actors), compare the rows with what is stored, write
what is new or changed, and read it back; where there is an online store, they bring it up to date; then one commit
makes all visible. If a single row cannot be read back, nothing is committed and the step fails.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import ray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from step_scripts.feature_store.group import LOCK_SECONDS, Group
from step_scripts.feature_store.ingestion import COUNTS, IngestionOptions, IngestionResult, ingest
from step_scripts.feature_store.offline_store import OfflineStore
from step_scripts.feature_store.online_store import MISSING_RECORDS, OnlineTarget
from step_scripts.parameters import IngestFeaturesParams
from step_scripts.runner import storage
from step_scripts.runner.contract import StepContext, StepDefinition, StepError, StepOutcome
from step_scripts.runner.ray_data import each_call
from step_scripts.runner.wording import counted


class LocalTarget(BaseModel):
    """Where a local feature store is, and how rows enter it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["local"]
    root: str
    mirror: bool = Field(default=False, description="Delete the group's records that the dataset lacks.")
    lock_seconds: float = Field(default=LOCK_SECONDS, ge=0, description="How long to wait for another writer; seconds.")


class SageMakerTarget(BaseModel):
    """Where a SageMaker feature group is, and how rows enter it.

    `root` holds the group's description, `data_uri` (SageMaker's `ResolvedOutputS3Uri`) the files of the offline store.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["sagemaker"]
    root: str = Field(pattern="^s3://")
    data_uri: str = Field(pattern="^s3://")
    glue_table: str = Field(pattern=r"^[^.]+\.[^.]+$", description="Database and name of its table in Glue.")
    mirror: bool = False
    online: bool = Field(default=False, description="Whether the group has an online store.")
    region_name: str | None = None
    calls_in_flight: int = Field(default=16, ge=1, le=256, description="Calls at the same time, of each actor.")
    retry_timeout_seconds: float = Field(
        default=300.0, gt=0, description="How long calls are repeated while none is accepted; seconds."
    )


_TARGET: TypeAdapter[LocalTarget | SageMakerTarget] = TypeAdapter(
    Annotated[LocalTarget | SageMakerTarget, Field(discriminator="kind")]
)


def run(context: StepContext, params: IngestFeaturesParams) -> StepOutcome:
    """Ingest the artifact `rows`; the output `features` are the group's files and the digest of its live records.

    Raises `StepError`, having changed nothing, for a target of another kind, and for all that `ingest` refuses.
    """
    try:
        target = _TARGET.validate_python(params.target)
    except ValidationError as error:
        raise StepError(f"target of step ingest_features is not that of a feature store: {error}") from error
    store, online = OfflineStore(target.root), None
    if isinstance(target, LocalTarget):
        folder = store.folder(params.group)
    else:
        folder = store.folder(params.group, target.data_uri, target.glue_table)
        if target.online:
            online = OnlineTarget(
                params.group, target.region_name, target.calls_in_flight, target.retry_timeout_seconds
            )
    options = IngestionOptions(
        mirror=target.mirror,
        workers=params.num_actors or max(1, int(ray.cluster_resources().get("CPU", 1))),
        lock_seconds=target.lock_seconds if isinstance(target, LocalTarget) else LOCK_SECONDS,
        online=online,
        missing_uri=storage.join(context.output_uri("features"), MISSING_RECORDS),
        phase=context.phase,
        confirm=context.confirm,
    )
    run_calls = partial(each_call, actors=params.num_actors)
    result = ingest(folder, params.table, context.inputs["rows"], run_calls, context.log, options)
    return _outcome(context, folder, result, online=online is not None)


def _outcome(context: StepContext, folder: Group, result: IngestionResult, *, online: bool) -> StepOutcome:
    commit = result.commit
    counts = {name: getattr(result, name) for name in COUNTS if name != "outdated"}
    context.log.info(
        f"feature group {folder.name}: {counted(result.rows_in, 'row')} in, {result.rows_readable:,} readable; "
        + ", ".join(f"{count:,} {name}" for name, count in counts.items())
        + f"; commit {commit.number}, {counted(commit.live_rows, 'live record')}"
    )
    if result.outdated:
        context.log.warning(f"rows older than what the feature group holds of their records: {result.outdated:,}")
    metrics: dict[str, float] = {"rows_in": result.rows_in, "rows_readable": result.rows_readable, **counts}
    if online:
        metrics["written_online"] = result.written_online
    return StepOutcome(
        outputs={"features": folder.artifact(result.files, commit.live_digest, commit.live_rows)},
        metrics=metrics,
        details={
            "group": folder.name,
            "commit": commit.number,
            "snapshot_id": str(commit.snapshot_id),
            "committed": not result.already_ingested,
            "already_ingested": result.already_ingested,
            "deduplicate": commit.deduplicate,
            "outdated_rows": result.outdated,
            "day_partitions_written": result.day_partitions,
            "live_rows": commit.live_rows,
            "files": len(result.files),
            "orphan_files_deleted": result.orphan_files_deleted,
            "timings": {name: round(seconds, 3) for name, seconds in context.seconds.items()},
        },
    )


STEP = StepDefinition(params=IngestFeaturesParams, run=run, inputs=("rows",), outputs=("features",))
