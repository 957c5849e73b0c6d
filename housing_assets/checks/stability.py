"""Whether data is distributed as a model's training data: the population stability index (PSI), column by column."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import dagster as dg

from resources.compute.base import table
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact

PSI_THRESHOLD = 0.2  # the customary limit above which a population counts as shifted


def distributions(artifact: Artifact) -> dict[str, Any]:
    """Distributions in the training split, by column, as a model or the split's statistics hold them."""
    return json.loads(storage.read_bytes(artifact.file_uri("statistics.json"))).get("distributions", {})


def stability_indices(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
    """The index of each column that both have."""
    from step_scripts.table.distributions import psi

    return {name: round(psi(before[name], now[name]), 4) for name in now if name in before}


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
