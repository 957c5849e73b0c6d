"""Checks of what goes into the feature store."""

import dagster as dg

from housing_assets.checks.advisory import advisory_check
from housing_assets.checks.blocking import blocking_check
from housing_assets.checks.gate import judged_group, judged_source
from housing_assets.partitions import PARTITIONS
from resources.feature_store.base import FeatureStore, OfflineSnapshot
from resources.references.types import SourceRef
from step_scripts.runner.wording import counted

VALIDATED_ROWS = 1_000_000  # some 0.2 s
COMPARED_IDS = 2_000_000
COMPARED_RECORDS = 100  # one call of the online store


@blocking_check(
    asset="raw_csv",
    judged=lambda given, _: judged_source(given["raw_csv"].rows.digest),
    partitions_def=PARTITIONS,
)
def schema(raw_csv: SourceRef) -> dg.AssetCheckResult:
    """Every validated row has the schema's columns, types and ranges, and rejected rows are within the limit.

    Looks at the files written, not at what the step reported: the columns of all of them, the values of the first
    million rows.
    """
    from step_scripts.data.row_files import schema_violations

    violations, figures = schema_violations(
        raw_csv.rows.file_uris(".parquet"), raw_csv.table, sample_rows=VALIDATED_ROWS
    )
    accepted = raw_csv.rows_total - raw_csv.rows_rejected
    if figures["rows"] != accepted:
        violations.append(f"{counted(figures['rows'], 'row')} in the files, there should be {accepted:,}")
    return dg.AssetCheckResult(
        passed=not violations,
        description="; ".join(violations[:5]) or f"{counted(figures['rows'], 'row')}, conforming to the schema",
        metadata={
            **figures,
            "rows_rejected": raw_csv.rows_rejected,
            "violations": violations[:50],
        },
    )


@blocking_check(
    asset="feature_group",
    judged=lambda given, _: judged_group(
        given["feature_group"].group, given["feature_group"].artifact.digest, given["raw_csv"].rows.digest
    ),
    additional_ins={"raw_csv": dg.AssetIn("raw_csv")},
    partitions_def=PARTITIONS,
)
def reconciliation(
    feature_group: OfflineSnapshot, raw_csv: SourceRef, feature_store: FeatureStore
) -> dg.AssetCheckResult:
    """Every row that went in can be read from the feature store. Compares record ids, not counts alone."""
    from step_scripts.data.row_files import sampled_record_ids

    rows_in, readable = raw_csv.rows.rows or 0, feature_group.artifact.rows or 0
    total = max(rows_in, readable)
    expected, share = sampled_record_ids(raw_csv.rows.file_uris(".parquet"), at_most=COMPARED_IDS, total=total)
    stored, _ = sampled_record_ids(feature_group.artifact.file_uris(".parquet"), at_most=COMPARED_IDS, total=total)
    missing = expected.filter(~expected.is_in(stored.implode()))
    # Several events of one record are one readable record.
    passed = missing.is_empty() and (share < 1 or readable >= expected.n_unique())
    return dg.AssetCheckResult(
        passed=passed,
        description=f"{counted(rows_in, 'row')} in, {readable:,} readable, "
        f"{missing.len():,} of {counted(expected.len(), 'id')} missing",
        metadata={
            "rows_in": rows_in,
            "rows_readable": readable,
            "ids_compared": expected.len(),
            "share_of_ids_compared": share,
            "missing_ids": missing.head(20).to_list(),
        },
    )


@advisory_check(
    asset="feature_group",
    remedy="look whether the online store answers, then execute the check again",
    partitions_def=PARTITIONS,
)
def online_equals_offline(feature_group: OfflineSnapshot, feature_store: FeatureStore) -> dg.AssetCheckResult:
    """Some records of the online store, looked up one by one, equal the latest events of the offline store."""
    compared = feature_store.compare_online(feature_group.group, COMPARED_RECORDS)
    if compared is None:
        return dg.AssetCheckResult(passed=True, description="the feature group has no online store")
    records, differing = compared
    found = f"{len(differing):,} of {counted(records, 'record')} differ"
    if differing:
        found += (
            ": somebody else writes to the online store. A record is written again when it changes; all are if the "
            "feature group is deleted and materialized again"
        )
    return dg.AssetCheckResult(
        passed=not differing,
        severity=dg.AssetCheckSeverity.WARN,
        description=found,
        metadata={"records": records, "differing_ids": differing[:20]},
    )
