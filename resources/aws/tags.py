"""Tags that lead from a SageMaker job back to the Dagster run, within SageMaker's rules."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import dagster as dg

LIMIT = 50
WORK_TAG = "dagster/work"
RUN_TAG = "dagster/run_id"
VALUE_LENGTH = 256
_KEY_LENGTH = 128
_PUNCTUATION = set("_.:/=+-@")


def sanitised(text: str, limit: int) -> str:
    """`text` with characters that tags may not hold replaced by `_`, cut to `limit` characters.

    Allowed are letters, digits and spaces of any script (Unicode classes L, N, Z) and `_.:/=+-@`.
    """
    allowed = (c if c in _PUNCTUATION or unicodedata.category(c)[0] in "LNZ" else "_" for c in text)
    return "".join(allowed)[:limit]


def tag_list(*sources: Mapping[str, str]) -> list[dict[str, str]]:
    """Tags as the API takes them. Of equal keys the first source wins; beyond 50 the last are left out.

    Keys that start with `aws:`, which AWS keeps for itself, are left out too.
    """
    tags: dict[str, str] = {}
    for source in sources:
        for key, value in source.items():
            clean = sanitised(key, _KEY_LENGTH)
            if clean and not clean.lower().startswith("aws:"):
                tags.setdefault(clean, sanitised(value, VALUE_LENGTH))
    return [{"Key": key, "Value": value} for key, value in list(tags.items())[:LIMIT]]


def run_tags(context: dg.OpExecutionContext | dg.AssetExecutionContext) -> dict[str, str]:
    """Run, root run, job, step, assets, partition, owners; code location and user where they are known."""
    run = context.run
    tags = {
        RUN_TAG: run.run_id,
        "dagster/root_run_id": run.root_run_id or run.run_id,
        "dagster/job": run.job_name,
        "dagster/step": str(context.op_handle),
    }
    if assets := asset_names(context):
        tags["dagster/asset"] = " ".join(assets)
    if context.has_partition_key:
        tags["dagster/partition"] = context.partition_key
    if owners := _owners(context):
        tags["dagster/owner"] = " ".join(owners)
    for key, value in run.dagster_execution_info.items():
        if key not in ("dagster/run-id", "dagster/job", "dagster/partition"):
            tags.setdefault(key, value)
    return tags


def asset_names(context: dg.OpExecutionContext | dg.AssetExecutionContext) -> list[str]:
    """The assets that the step materializes, sorted; empty for an op."""
    if not context.has_assets_def:
        return []
    return sorted(key.to_user_string() for key in context.selected_asset_keys)


def _owners(context: dg.OpExecutionContext | dg.AssetExecutionContext) -> Sequence[str]:
    if not context.has_assets_def:
        return []
    selected = context.selected_asset_keys
    return sorted({o for spec in context.assets_def.specs if spec.key in selected for o in spec.owners})
