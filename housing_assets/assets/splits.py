"""Train, validation and test split."""

from collections.abc import Iterator
from datetime import datetime

import dagster as dg

from housing_assets.checks.gate import require_checks_passed
from housing_assets.config import SplitsConfig
from housing_assets.reporting.metadata import column_schema, made_by, materialized
from housing_assets.runs.executor import RAY_POOL
from resources.compute.base import ComputeBackend
from resources.feature_store.base import FeatureStore, OfflineSnapshot
from resources.references.evidence import EvidenceStore
from resources.references.types import SplitRef
from step_scripts.parameters import PrepareSplitsParams, PrepareSplitsSettings
from step_scripts.runner.code_version import step_version

SPLITS = ("train", "validation", "test")
_PURPOSE = {
    "train": "Records that the model is fitted on, with the scaling statistics fitted on them (and on them only).",
    "validation": "Records that hyperparameters and the number of rounds are chosen with.",
    "test": "Records that nothing but the evaluation of the final model ever sees.",
}


@dg.multi_asset(
    name="splits",
    group_name="splits",
    pool=RAY_POOL,
    outs={
        f"{split}_split": dg.AssetOut(
            description=f"{_PURPOSE[split]} A record's side follows from a hash of its id: it never changes.",
            kinds={"parquet", "ray"},
            code_version=step_version("prepare_splits"),
            dagster_type=SplitRef,
        )
        for split in SPLITS
    },
)
def splits(
    context: dg.AssetExecutionContext,
    config: SplitsConfig,
    feature_group: OfflineSnapshot,
    compute: ComputeBackend,
    feature_store: FeatureStore,
    evidence: EvidenceStore,
) -> Iterator[dg.MaterializeResult]:
    """Assign every record of the feature group to train, validation or test, by a hash of its id."""
    from housing_assets.schema import HOUSING_TABLE

    snapshot = feature_group
    if config.as_of:
        as_of = datetime.fromisoformat(config.as_of)
        snapshot = feature_store.offline(feature_group.group, as_of, feature_group.commit)
    read = feature_store.snapshot_lineage(snapshot.model_copy(update={"run_id": feature_group.run_id}))
    judged, _ = require_checks_passed(context, evidence, "train_split", feature_group, read)
    params = PrepareSplitsParams(
        **config.model_dump(include=set(PrepareSplitsSettings.model_fields)),
        table=HOUSING_TABLE,
        deduplicate=snapshot.deduplicate,
        as_of=snapshot.as_of,
    )
    result = compute.run(context, "prepare_splits", params, {"features": snapshot.artifact})
    total = sum(result.outputs[split].rows or 0 for split in SPLITS)
    for split in SPLITS:
        rows = result.outputs[split]
        value = SplitRef(
            name=split,
            rows=rows,
            fraction=(rows.rows or 0) / total,
            configured_fraction=getattr(config, f"{split}_size"),
            statistics=result.outputs["statistics"] if split == "train" else None,
            snapshot=read if split == "train" else None,
            splits={name: result.outputs[name].digest for name in SPLITS},
            judged=judged,
            **made_by(context, result),
        )
        metadata = {
            "fraction": value.fraction,
            "configured_fraction": value.configured_fraction,
            "dagster/column_schema": column_schema(HOUSING_TABLE),
            **(result.details if split == "train" else {}),
        }
        yield materialized(value, rows, metadata, result, f"{split}_split")
