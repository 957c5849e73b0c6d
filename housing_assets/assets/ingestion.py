"""From CSV files to the feature store."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import Any

import dagster as dg

from housing_assets.assets.landing import files_of_days
from housing_assets.checks.gate import require_checks_passed
from housing_assets.config import FeatureGroupConfig, RawCsvConfig
from housing_assets.own_resources import SourceLocation
from housing_assets.partitions import BACKFILL, PARTITIONS
from housing_assets.reporting.metadata import artifact_metadata, column_schema, made_by, materialized, run_metadata
from housing_assets.runs.executor import RAY_POOL
from resources.compute.base import ComputeBackend
from resources.feature_store.base import FeatureStore, OfflineSnapshot
from resources.references.evidence import EvidenceStore
from resources.references.types import DataFile, DatasetRef, SourceRef
from resources.sources.listing import Listing, list_landing, list_source
from step_scripts.parameters import (
    IngestFeaturesParams,
    IngestFeaturesSettings,
    SourceFile,
    ValidateSourceParams,
    ValidateSourceSettings,
)
from step_scripts.runner.code_version import step_version
from step_scripts.runner.contract import StepError
from step_scripts.runner.wording import counted, listed
from step_scripts.table.spec import ColumnRange

_SHOWN, _FILES_SHOWN = 20, 200  # names in a message, rows of a table


@dg.asset(
    group_name="ingestion",
    kinds={"csv", "parquet", "ray", "pandera"},
    code_version=step_version("validate_source"),
    partitions_def=PARTITIONS,
    backfill_policy=BACKFILL,
    pool=RAY_POOL,
)
def raw_csv(
    context: dg.AssetExecutionContext, config: RawCsvConfig, compute: ComputeBackend, source_location: SourceLocation
) -> dg.MaterializeResult[SourceRef]:
    """The house sales of the source as Parquet, each row checked against the schema.

    Rows that violate the schema are left out and listed, each with its reason, in `rejected_rows.csv`. Too many of
    them, or a file that is not such a table at all, fail the asset. Read by `feature_group`.
    """
    compute.prepare(context)  # Ray starts in the background while the schema (pandera) is imported
    from housing_assets.schema import HOUSING_TABLE

    ranges = {name: ColumnRange(**bounds.model_dump()) for name, bounds in config.column_ranges.items()}
    try:
        source, listing = _source_files(context, config, source_location)
        table = HOUSING_TABLE.with_ranges(ranges)
    except (StepError, ValueError) as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    settings = config.model_dump(include=set(ValidateSourceSettings.model_fields))
    params = ValidateSourceParams(**settings, table=table, files=tuple(listing.files))
    result = compute.run(context, "validate_source", params)
    rows = result.outputs["rows"]
    value = SourceRef(
        source=source,
        rows=rows,
        rejected=result.outputs["rejected"],
        table=table,
        rows_total=int(result.metrics["rows"] + result.metrics["rejected_rows"]),
        rows_rejected=int(result.metrics["rejected_rows"]),
        files=_data_files(listing.files, result.details["files"]),
        **made_by(context, result),
    )
    details = dict(result.details)
    examples, source_files = details.pop("rejected_rows"), details.pop("files")
    metadata = {
        "source": source,
        **result.metrics,
        "rejected_examples": examples,
        "source_files": source_files,
        **details,
        **_left_out(context, source, listing),
        "rejected_rows_file": result.outputs["rejected"].uri,
        "dagster/column_schema": column_schema(table),
    }
    return materialized(value, rows, metadata, result)


def _data_files(files: Sequence[SourceFile], read: list[dict[str, Any]]) -> tuple[DataFile, ...]:
    """The files, with row counts and digests for those that the step reports (`read`)."""
    listed = {file["file"]: {"rows": file["rows"], "content": file["content"]} for file in read}
    return tuple(DataFile(**file.model_dump(), **listed.get(file.uri, {})) for file in files)


def _left_out(context: dg.AssetExecutionContext, source: str, listing: Listing) -> dict[str, Any]:
    """Log what the source holds that was not read: files set aside, names that do not match. Also as metadata."""
    left = [{"name": item.name, "why": item.reason, "remedy": item.remedy} for item in listing.set_aside]
    for item in listing.set_aside[:_SHOWN]:
        context.log.warning(f"set aside: {item}")
    if listing.others:
        names = listed(listing.others)
        context.log.info(f"{source} holds what is not taken, because its name does not match: {names}")
        left += [{"name": name, "why": "its name does not match", "remedy": ""} for name in listing.others]
    return {"not_read": left[:_FILES_SHOWN]} if left else {}


def _source_files(
    context: dg.AssetExecutionContext, config: RawCsvConfig, location: SourceLocation
) -> tuple[str, Listing]:
    """The source that the run asks for (or the landing place), and its files. Raises `StepError` if there are none."""
    if location.landing is None or config.source:
        source = config.source or location.resolve()
        return source, list_source(source)
    if not (context.has_partition_key or context.has_partition_key_range):
        raise StepError(
            "raw_csv is ingested by day, because HOUSING_LANDING is set: choose days (--partition 2026-11-23, "
            "--partition-range 2026-11-01...2026-11-23), or unset HOUSING_LANDING"
        )
    days = sorted(date.fromisoformat(key) for key in context.partition_keys)
    listing = list_landing(location.landing) or Listing()
    files, unready = files_of_days(
        listing, location.landing, location.timezone, days, time.time(), location.settle_seconds
    )
    if unready:
        context.log.info(f"left out: {counted(unready, 'file')} modified less than {location.settle_seconds:g} s ago")
    if not files:
        span = f"{days[0]}" if len(days) == 1 else f"{days[0]} to {days[-1]}"
        raise StepError(f"no file of {span} is ready in {location.landing}")
    return location.landing, replace(listing, files=files)


@dg.asset(
    group_name="ingestion",
    kinds={"featurestore", "iceberg", "ray"},
    code_version=step_version("ingest_features"),
    partitions_def=PARTITIONS,
    backfill_policy=BACKFILL,
    pool=RAY_POOL,
)
def feature_group(
    context: dg.AssetExecutionContext,
    config: FeatureGroupConfig,
    raw_csv: SourceRef,
    compute: ComputeBackend,
    feature_store: FeatureStore,
    evidence: EvidenceStore,
) -> dg.MaterializeResult[OfflineSnapshot]:
    """The feature store's records of the source: every version of every record, each with its event time.

    Only new and changed rows are added. The asset fails unless every row that went in can be read back. The splits read
    it as of a point in time.
    """
    from housing_assets.schema import HOUSING_TABLE

    require_checks_passed(context, evidence, "feature_group", raw_csv)
    name = config.feature_group_name or (
        default_group_name(HOUSING_TABLE.name, raw_csv.source) + feature_store.name_suffix
    )
    # Days are not the whole source: what their files lack has not been removed from it.
    by_day = context.has_partition_key or context.has_partition_key_range
    mirror = config.ingestion == "mirror" and not by_day
    try:
        target = feature_store.ensure_group(name, HOUSING_TABLE).model_copy(update={"mirror": mirror})
    except StepError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    snapshot = feature_store.find_ingestion(name, raw_csv.rows.digest)
    if snapshot is not None:
        context.log.info(f"feature group {name} already holds dataset {raw_csv.rows.digest[:12]}: nothing to add")
        figures: dict[str, Any] = {"reused": True, "seconds": 0.0}
    else:
        settings = config.model_dump(include=set(IngestFeaturesSettings.model_fields))
        params = IngestFeaturesParams(**settings, table=HOUSING_TABLE, group=name, target=target)
        result = compute.run(context, "ingest_features", params, {"rows": raw_csv.rows}, cacheable=False)
        figures = {**result.metrics, **result.details, **run_metadata(result)}
        snapshot = feature_store.offline(name, commit=result.details["commit"])
    feature_store.record_dataset(
        name,
        DatasetRef(
            digest=raw_csv.rows.digest,
            source=raw_csv.source,
            files=raw_csv.files,
            rows=raw_csv.rows.rows,
            rows_rejected=raw_csv.rows_rejected,
            run_id=raw_csv.run_id,
            code_version=raw_csv.code_version,
        ),
    )
    snapshot = snapshot.model_copy(update={"run_id": context.run.run_id, "dataset": raw_csv.rows.digest})
    # The metadata have one order, whether rows were ingested or an earlier snapshot is reused.
    metadata = {
        "feature_group_name": name,
        "rows_in": raw_csv.rows.rows or 0,
        "added": 0,
        "commit": snapshot.commit,
        "snapshot_id": str(snapshot.snapshot_id),
        "rows_live": snapshot.artifact.rows,
        **artifact_metadata(snapshot.artifact),
        "dagster/column_schema": column_schema(HOUSING_TABLE),
        **figures,
    }
    return materialized(snapshot, snapshot.artifact, metadata)


def default_group_name(table: str, source: str) -> str:
    """A name that belongs to this source alone: two sources never mix in one group."""
    return f"{table}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
