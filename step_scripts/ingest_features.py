"""Step: ingest validated rows into a feature store.

Ray actors compare the rows with what is stored, write what is new or changed, and read it back; then one commit makes
it visible. If a single row cannot be read back, nothing is committed and the step fails.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from step_scripts.actor_pool import ActorPool
from step_scripts.contract import StepContext, StepDefinition, StepError, StepOutcome
from step_scripts.feature_ingestion import IngestionResult, ingest
from step_scripts.group_folder import LOCK_SECONDS, GroupFolder
from step_scripts.parameters import IngestFeaturesParams

_ROWS_WORTH_AN_ACTOR = 100_000


class LocalTarget(BaseModel):
    """Where a local feature store is, and how rows enter it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["local"]
    root: str
    mirror: bool = Field(default=False, description="Delete the group's records that the dataset lacks.")
    lock_seconds: float = Field(default=LOCK_SECONDS, ge=0, description="How long to wait for another writer; seconds.")


def run(context: StepContext, params: IngestFeaturesParams) -> StepOutcome:
    """Ingest the artifact `rows`; the output `features` are the group's files and the digest of its live records.

    Raises `StepError`, having changed nothing, for a target of another kind, and for all that `ingest` refuses.
    """
    try:
        target = LocalTarget.model_validate(params.target)
    except ValidationError as error:
        raise StepError(f"target of step ingest_features is not that of a local feature store: {error}") from error
    folder = GroupFolder(target.root, params.group)
    rows = context.inputs["rows"].rows
    # Starting a process takes as long as it takes to ingest this many rows.
    enough = None if rows is None else -(-rows // _ROWS_WORTH_AN_ACTOR) or 1
    with ActorPool(params.num_actors or enough) as pool:
        result = ingest(
            folder,
            params.table,
            context.inputs["rows"],
            pool.run,
            context.log,
            mirror=target.mirror,
            workers=pool.size,
            lock_seconds=target.lock_seconds,
            phase=context.phase,
        )
    return _outcome(context, folder, result)


def _outcome(context: StepContext, folder: GroupFolder, result: IngestionResult) -> StepOutcome:
    commit = result.commit
    counts = {name: getattr(result, name) for name in ("added", "unchanged", "superseded", "deleted")}
    context.log.info(
        f"feature group {folder.name}: {result.rows_in:,} rows in, {result.rows_readable:,} readable; "
        + ", ".join(f"{count:,} {name}" for name, count in counts.items())
        + f"; commit {commit.number}, {commit.live_rows:,} live records"
    )
    if result.outdated:
        context.log.warning(f"{result.outdated:,} rows are older than what the feature group holds of their records")
    return StepOutcome(
        outputs={"features": folder.artifact(result.files, commit.live_digest, commit.live_rows)},
        metrics={"rows_in": result.rows_in, "rows_readable": result.rows_readable, **counts},
        details={
            "group": folder.name,
            "commit": commit.number,
            "committed": result.committed,
            "already_ingested": result.already_ingested,
            "deduplicate": commit.deduplicate,
            "outdated_rows": result.outdated,
            "hour_partitions_written": result.hour_partitions,
            "live_rows": commit.live_rows,
            "files": len(result.files),
            "stray_files_removed": result.strays_removed,
            "timings": {name: round(seconds, 3) for name, seconds in context.seconds.items()},
        },
    )


STEP = StepDefinition(params=IngestFeaturesParams, run=run, inputs=("rows",), outputs=("features",))
