"""Whether data is distributed as a model's training data: the population stability index (PSI), column by column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from resources.compute.base import table

PSI_THRESHOLD = 0.2  # the customary limit above which a population counts as shifted


def stability_result(
    found: Mapping[str, float], reference: str, facts: Mapping[str, Any] | None = None
) -> dg.AssetCheckResult:
    """A warning if the index of a column is above the threshold. `reference`: the model version compared with."""
    ranked = sorted(found.items(), key=lambda item: -item[1])
    shifted = [column for column, index in found.items() if index > PSI_THRESHOLD]
    known = f"the training data of {reference}"
    return dg.AssetCheckResult(
        passed=not shifted,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"shifted against {known}: {', '.join(shifted)}" if shifted else f"as {known}",
        metadata={
            **(facts or {}),
            "threshold": PSI_THRESHOLD,
            "largest_psi": max(found.values(), default=0.0),
            "psi": table([{"column": name, "psi": index} for name, index in ranked]),
        },
    )
