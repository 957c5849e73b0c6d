"""Checks of the splits."""

import math
from collections.abc import Mapping

import dagster as dg

from housing_assets.checks.advisory import advisory_check
from housing_assets.checks.blocking import blocking_check
from housing_assets.checks.comparisons import distributions, stability_indices, stability_result
from housing_assets.checks.gate import judged_splits
from resources.model_registry.base import ModelRegistry
from resources.references.evidence import Judged
from resources.references.types import SplitRef
from step_scripts.runner.wording import rounded

COMPARED_IDS = 2_000_000
# Fractions of n hashed records scatter binomially: four standard deviations are exceeded once in 16,000 times.
STANDARD_DEVIATIONS = 4.0

_SPLITS = {f"{name}_split": dg.AssetIn(f"{name}_split") for name in ("validation", "test")}


def _judged(given: Mapping[str, SplitRef], _: dg.AssetCheckResult) -> Judged:
    return judged_splits({name: given[f"{name}_split"].rows.digest for name in ("train", "validation", "test")})


@blocking_check(asset="train_split", judged=_judged, additional_ins=_SPLITS)
def no_leakage(train_split: SplitRef, validation_split: SplitRef, test_split: SplitRef) -> dg.AssetCheckResult:
    """No record is in two splits."""
    import polars as pl

    from step_scripts.data.row_files import sampled_record_ids

    splits = {"train": train_split, "validation": validation_split, "test": test_split}
    total = sum(split.rows.rows or 0 for split in splits.values())
    frames, share = [], 1.0
    for name, split in splits.items():
        ids, share = sampled_record_ids(split.rows.file_uris(".parquet"), at_most=COMPARED_IDS, total=total)
        frames.append(pl.DataFrame({"record_id": ids.unique()}).with_columns(split=pl.lit(name)))
    shared = pl.concat(frames).group_by("record_id").agg(pl.col("split").sort()).filter(pl.col("split").list.len() > 1)
    return dg.AssetCheckResult(
        passed=shared.is_empty(),
        description=f"records in more than one split: {shared.height:,}",
        metadata={
            "records": total,
            "share_of_ids_compared": share,
            "shared_records": shared.height,
            "threshold": 0,
            "examples": dg.MetadataValue.json(shared.head(20).to_dicts()),
        },
    )


@blocking_check(asset="train_split", judged=_judged, additional_ins=_SPLITS)
def split_fractions(train_split: SplitRef, validation_split: SplitRef, test_split: SplitRef) -> dg.AssetCheckResult:
    """The splits have the configured sizes, within what hashing leaves to chance."""
    splits = {"train": train_split, "validation": validation_split, "test": test_split}
    total = sum(split.rows.rows or 0 for split in splits.values())
    rows = []
    for name, split in splits.items():
        p = split.configured_fraction
        tolerance = STANDARD_DEVIATIONS * math.sqrt(p * (1 - p) / max(total, 1))
        rows.append(
            {
                "split": name,
                "rows": split.rows.rows or 0,
                "fraction": rounded(split.fraction),
                "configured": p,
                "tolerance": rounded(tolerance),
                "passed": abs(split.fraction - p) <= tolerance,
            }
        )
    failed = [row["split"] for row in rows if not row["passed"]]
    return dg.AssetCheckResult(
        passed=not failed,
        description=f"outside the tolerance: {', '.join(failed)}" if failed else "all within the tolerance",
        metadata={"fractions": rows},
    )


@advisory_check(
    asset="train_split",
    remedy="see whether the statistics of train_split and of the approved model are there; materialize train_split "
    "again, or register and approve a new model",
)
def feature_drift(train_split: SplitRef, model_registry: ModelRegistry) -> dg.AssetCheckResult:
    """The training data is distributed as that of the latest approved model (population stability index)."""
    champion = model_registry.latest(model_registry.default_group, "Approved")
    if champion is None or train_split.statistics is None:
        return dg.AssetCheckResult(passed=True, description="no approved model to compare with")
    before, now = distributions(champion.artifact), distributions(train_split.statistics)
    found = stability_indices(before, now)
    name = champion.reference
    if found:
        return stability_result(found, name, {"champion": name})
    columns = {"columns": ", ".join(sorted(now)), "columns_of_champion": ", ".join(sorted(before))}
    return dg.AssetCheckResult(
        passed=False,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{name} was trained on another table: not one column in common. Remedy: keep the models of "
        "another table apart, with a model group (registered_model.model_group) or HOUSING_ENVIRONMENT of its own, or "
        f"approve a model of this table in the place of {name}.",
        metadata={"champion": name, **columns},
    )
