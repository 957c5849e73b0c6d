"""Checks of what goes into the feature store."""

import dagster as dg
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationTargetMaterializationData

from housing_assets.assets.ingestion import PARTITIONS
from resources.feature_store.base import FeatureStore, OfflineSnapshot
from resources.references import SourceRef

PANDERA_ROWS = 10_000
COMPARED_IDS = 2_000_000


@dg.asset_check(asset="raw_csv", blocking=True, partitions_def=PARTITIONS)
def schema(context: dg.AssetCheckExecutionContext, raw_csv: SourceRef) -> dg.AssetCheckResult:
    """Every validated row has the schema's columns, types and ranges, and rejected rows are within the limit.

    Looks at the files written, not at what the step said of them: footers of all of them, pandera on the first rows.
    """
    from step_scripts.parquet_checks import schema_violations

    violations, figures = schema_violations(raw_csv.rows.file_uris(".parquet"), raw_csv.table, sample_rows=PANDERA_ROWS)
    accepted = raw_csv.rows_total - raw_csv.rows_rejected
    if figures["rows"] != accepted:
        violations.append(f"{figures['rows']} rows lie in the files, {accepted} should")
    result = dg.AssetCheckResult(
        passed=not violations,
        description="; ".join(violations[:5]) or f"{figures['rows']:,} rows conform to the schema",
        metadata={
            **figures,
            "rows_rejected": raw_csv.rows_rejected,
            "violations": dg.MetadataValue.json(violations[:50]),
        },
    )
    _record_by_day(context, "raw_csv", "schema", result)
    return result


@dg.asset_check(
    asset="feature_group",
    additional_ins={"raw_csv": dg.AssetIn("raw_csv")},
    blocking=True,
    partitions_def=PARTITIONS,
)
def reconciliation(
    context: dg.AssetCheckExecutionContext,
    feature_group: OfflineSnapshot,
    raw_csv: SourceRef,
    feature_store: FeatureStore,
) -> dg.AssetCheckResult:
    """Every row that went in can be read from the feature store. Compares record ids, not counts alone."""
    from step_scripts.parquet_checks import sampled_record_ids

    rows_in, readable = raw_csv.rows.rows or 0, feature_group.artifact.rows or 0
    total = max(rows_in, readable)
    expected, share = sampled_record_ids(raw_csv.rows.file_uris(".parquet"), at_most=COMPARED_IDS, total=total)
    stored, _ = sampled_record_ids(feature_group.artifact.file_uris(".parquet"), at_most=COMPARED_IDS, total=total)
    missing = expected.filter(~expected.is_in(stored.implode()))
    # Several events of one record are one readable record.
    passed = missing.is_empty() and (share < 1 or readable >= expected.n_unique())
    result = dg.AssetCheckResult(
        passed=passed,
        description=f"{rows_in:,} rows in, {readable:,} readable, {missing.len():,} of {expected.len():,} ids missing",
        metadata={
            "rows_in": rows_in,
            "rows_readable": readable,
            "ids_compared": expected.len(),
            "share_of_ids_compared": share,
            "missing_ids": dg.MetadataValue.json(missing.head(20).to_list()),
        },
    )
    _record_by_day(context, "feature_group", "reconciliation", result)
    return result


def _record_by_day(context: dg.AssetCheckExecutionContext, asset: str, check: str, result: dg.AssetCheckResult) -> None:
    """Record the result of a run over several days for each of them.

    Dagster 1.13 records it without a day, and whoever waits for checked days (`keep_up_to_date`) would wait for ever.
    """
    run = context.op_execution_context
    if PARTITIONS is None or run.has_partition_key or not run.has_partition_key_range:
        return
    days = PARTITIONS.get_partition_keys_in_range(run.partition_key_range)
    made = dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=days)
    for record in context.instance.fetch_materializations(made, limit=len(days)).records:
        target = AssetCheckEvaluationTargetMaterializationData(
            storage_id=record.storage_id, run_id=record.run_id, timestamp=record.timestamp
        )
        context.instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=dg.AssetKey(asset),
                check_name=check,
                passed=result.passed,
                metadata=result.metadata,
                description=result.description,
                severity=result.severity,
                blocking=True,
                partition=record.partition_key,
                target_materialization_data=target,
            )
        )
