"""What the splits hold: artifacts, statistics of the training rows, and tables for people."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from step_scripts.data.splits import SPLITS, SplitPlan, SplitReport
from step_scripts.parameters import PrepareSplitsParams
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepContext, StepError, StepOutcome, file_info, write_json
from step_scripts.runner.wording import counted, rounded
from step_scripts.table.distributions import MOST_VALUES, TableSketch, quantile
from step_scripts.table.hashes import RowSetDigest
from step_scripts.table.moments import Moments
from step_scripts.table.spec import TableSpec


def _counts(plan: SplitPlan, reports: list[SplitReport]) -> dict[str, int]:
    """Rows read, and how many of them went nowhere, by reason."""
    found = plan.latest
    return {
        "rows_read": found.read if found else sum(report.rows_read for report in reports),
        "rows_later": found.later if found else sum(report.rows_later for report in reports),
        "rows_superseded": found.superseded if found else 0,
        "rows_deleted": found.deleted if found else sum(report.rows_deleted for report in reports),
    }


def split_outcome(
    context: StepContext,
    params: PrepareSplitsParams,
    plan: SplitPlan,
    reports: list[SplitReport],
    sketch: TableSketch,
) -> StepOutcome:
    """Write output `statistics`; what the splits hold. Raises `StepError` if one of them would be empty."""
    counts = _counts(plan, reports)
    splits: dict[str, Artifact] = {}
    for split in SPLITS:
        digest = RowSetDigest()
        for report in reports:
            digest = digest.merge(report.digests[split])
        files = [file for report in reports for file in report.files[split]]
        splits[split] = Artifact.of(plan.uris[split], files, digest=digest.hexdigest(_schema_text(plan.table)))
    rows = {split: splits[split].rows or 0 for split in SPLITS}
    _require_rows(params, rows, counts)
    with context.phase("statistics"):
        scaler = _scaler(plan, reports)
        distributions = sketch.distributions(plan.statistics_columns)
        statistics = _write_statistics(context, plan, splits["train"], scaler, distributions)
    total = sum(rows.values())
    wanted = {"train": params.train_size, "validation": params.validation_size, "test": params.test_size}
    return StepOutcome(
        outputs={**splits, "statistics": statistics},
        metrics={
            **{f"{split}_rows": float(rows[split]) for split in SPLITS},
            **{f"{split}_fraction": rows[split] / total for split in SPLITS},
            **{name: float(count) for name, count in counts.items()},
        },
        details={
            "splits": [
                {
                    "split": split,
                    "rows": rows[split],
                    "fraction": rounded(rows[split] / total),
                    "configured": wanted[split],
                    "files": len(splits[split].files),
                }
                for split in SPLITS
            ],
            "columns": _summary(distributions, scaler),
            "scaler": scaler,
        },
    )


def _require_rows(params: PrepareSplitsParams, rows: dict[str, int], counts: dict[str, int]) -> None:
    empty = [split for split in SPLITS if not rows[split]]
    if not empty:
        return
    total = sum(rows.values())
    left_out = (
        f"{counted(counts['rows_read'], 'row')} read, {counts['rows_deleted']:,} deleted, "
        f"{counts['rows_superseded']:,} superseded, {counts['rows_later']:,} later than {params.as_of or 'now'}"
    )
    if not total:
        raise StepError(
            f"the feature store has no live records to split ({left_out}): "
            "ingest rows first, or choose a later `as_of`",
            details={**rows, **counts},
        )
    shares = ", ".join(f"{split} {rows[split]:,}" for split in SPLITS)
    raise StepError(
        f"no records for {' and '.join(empty)}: of {counted(total, 'record')}, {shares}. Records go by a hash of their "
        "id, so that a few may all fall on one side: bring more rows, or give the empty split a larger fraction "
        "(train_size, validation_size, test_size)",
        details={**rows, **counts},
    )


def _scaler(plan: SplitPlan, reports: list[SplitReport]) -> dict[str, Any]:
    """Mean and population standard deviation of each feature in the training split."""
    features = plan.table.features
    moments = Moments.empty(len(features))
    for report in reports:
        moments = moments.merge(report.moments)
    # A column without any value, or with one value only, is left as it is.
    mean = np.nan_to_num(moments.mean)
    scale = np.where(moments.deviation > 0, moments.deviation, 1.0)
    return {
        "mean": dict(zip(features, mean.tolist(), strict=True)),
        "scale": dict(zip(features, scale.tolist(), strict=True)),
        "rows": sum(report.digests["train"].rows for report in reports),
    }


def _write_statistics(
    context: StepContext, plan: SplitPlan, train: Artifact, scaler: dict[str, Any], distributions: dict[str, Any]
) -> Artifact:
    uri = context.output_uri("statistics")
    described = {"rows": scaler["rows"], "target": plan.table.target, "distributions": distributions}
    write_json(storage.join(uri, "scaler.json"), scaler)
    write_json(storage.join(uri, "statistics.json"), described)
    files = [file_info(storage.join(uri, name), uri) for name in ("scaler.json", "statistics.json")]
    # They follow from the training rows alone. The last binary digit of a mean also depends on how rows were divided
    # into files; it must not make the same data look changed.
    digest = hashlib.sha256(f"statistics\0{train.digest}\0{','.join(plan.statistics_columns)}".encode()).hexdigest()
    return Artifact.of(uri, files, digest=digest)


def _summary(distributions: dict[str, Any], scaler: dict[str, Any]) -> list[dict[str, Any]]:
    summary = []
    for name, distribution in distributions.items():
        few = distribution["kind"] == "counts"
        row: dict[str, Any] = {"column": name, "role": "feature" if name in scaler["mean"] else "target"}
        for label, fraction in (("minimum", 0.0), ("median", 0.5), ("maximum", 1.0)):
            row[label] = rounded(quantile(distribution, fraction))
        row["missing"] = distribution["missing"]
        row["distinct"] = str(len(distribution["values"])) if few else f"more than {MOST_VALUES}"
        row["mean"] = rounded(scaler["mean"][name]) if name in scaler["mean"] else ""
        row["standard_deviation"] = rounded(scaler["scale"][name]) if name in scaler["scale"] else ""
        summary.append(row)
    return summary


def _schema_text(table: TableSpec) -> str:
    return ",".join(f"{column.name}:{column.dtype}" for column in table.columns)
