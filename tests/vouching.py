"""Evidence of checks, for tests of what stands behind them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from housing_assets.checks import gate
from resources.model_registry.base import ModelVersion
from resources.references.evidence import Evidence, EvidenceStore, Judged

# As it is kept with a version: where the data of a model came from, by their digests.
LINEAGE: dict[str, Any] = {
    "run_id": "run-1",
    **{f"{split}_digest": f"{split}-digest" for split in ("train", "validation", "test")},
    "feature_group": {"group": "sales", "commit": 1, "digest": "group-digest"},
    "datasets": [{"digest": "rows-digest"}],
}
CHECKS = {
    "raw_csv": ("schema",),
    "feature_group": ("reconciliation",),
    "train_split": ("no_leakage", "split_fractions"),
    "evaluation_report": (gate.GATE_CHECK,),
}


def record(store: EvidenceStore, judged: Judged, check: str, *, passed: bool = True, run: str = "run-check") -> None:
    """One evaluation of a check."""
    store.record(
        Evidence(
            check=check, judged=judged, passed=passed, severity="ERROR", description="as the test says", run_id=run,
            at=datetime.now(UTC),
        )
    )  # fmt: skip


def judged_before(version: ModelVersion) -> list[Judged]:
    """What a version with `LINEAGE` stands on."""
    return [
        gate.judged_source("rows-digest"),
        gate.judged_group("sales", "group-digest", "rows-digest"),
        gate.judged_splits({split: f"{split}-digest" for split in ("train", "validation", "test")}),
        gate.judged_evaluation(version.artifact.digest, version.gate.evaluation_digest, version.gate.threshold),
    ]


def vouch_for(store: EvidenceStore, version: ModelVersion) -> None:
    """Let all checks before a version with `LINEAGE` have passed."""
    for judged in judged_before(version):
        for check in CHECKS[judged.asset]:
            record(store, judged, check)
