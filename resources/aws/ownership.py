"""Tags: which AWS resources are this project's, and the Dagster run that a job belongs to, within SageMaker's rules.

Everything that the project creates carries the first, and nothing without it is ever changed or removed.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from resources.aws.calls import if_found, pages

if TYPE_CHECKING:
    import dagster as dg

CREATED_BY_TAG = "housing-assets:created-by"
CREATED_BY = "housing-assets"
# The prefix that a deployment keeps everything of a kind below: two deployments in one account never touch each other.
ROOT_TAG = "housing-assets:root"
_LIMIT = 50
WORK_TAG = "dagster/work"
RUN_TAG = "dagster/run_id"
_VALUE_LENGTH = 256
_KEY_LENGTH = 128
_PUNCTUATION = set("_.:/=+-@")


def owned(*sources: Mapping[str, str]) -> list[dict[str, str]]:
    """Tags as the API takes them, after the one that marks what this project created.

    Of equal keys the first source wins; beyond 50 the last are left out. Keys that start with `aws:`, which AWS keeps
    for itself, are left out too.
    """
    tags = {CREATED_BY_TAG: CREATED_BY}
    for source in sources:
        for key, value in source.items():
            clean = sanitised(key, _KEY_LENGTH)
            if clean and not clean.lower().startswith("aws:"):
                tags.setdefault(clean, sanitised(value, _VALUE_LENGTH))
    return [{"Key": key, "Value": value} for key, value in list(tags.items())[:_LIMIT]]


def is_ours(tags: Mapping[str, str]) -> bool:
    """Whether the tags are those of something that this project created."""
    return tags.get(CREATED_BY_TAG) == CREATED_BY


def root_tags(root: str) -> dict[str, str]:
    """The tag that says to which deployment something belongs."""
    return {ROOT_TAG: sanitised(root.rstrip("/"), _VALUE_LENGTH)}


def belongs_to(tags: Mapping[str, str], root: str) -> bool:
    """Whether the tags are those of something that this very deployment created."""
    return is_ours(tags) and tags.get(ROOT_TAG) == root_tags(root)[ROOT_TAG]


def tags_of(client: Any, arn: str) -> dict[str, str]:
    """All tags of a SageMaker resource; none if it does not exist."""
    found = if_found(lambda: [*pages(client, "list_tags", "Tags", ResourceArn=arn)])
    return {tag["Key"]: tag["Value"] for tag in found or []}


def created_here(
    client: Any,
    operation: str,
    member: str,
    arn_member: str,
    root: str,
    may_be_ours: Callable[[Mapping[str, Any]], bool] = lambda summary: True,
    **params: Any,
) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Summary and tags of each resource that a List operation finds and that this very deployment created.

    All are listed before the first one is yielded: removing it would shift the pages. Tags are a call each; they are
    not asked for where `may_be_ours` rules a resource out.
    """
    for summary in [found for found in pages(client, operation, member, **params) if may_be_ours(found)]:
        tags = tags_of(client, summary[arn_member])
        if belongs_to(tags, root):
            yield summary, tags


def sanitised(text: str, limit: int) -> str:
    """`text` with characters that tags may not hold replaced by `_`, cut to `limit` characters.

    Allowed are letters, digits and spaces of any script (Unicode classes L, N, Z) and `_.:/=+-@`.
    """
    allowed = (c if c in _PUNCTUATION or unicodedata.category(c)[0] in "LNZ" else "_" for c in text)
    return "".join(allowed)[:limit]


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
        specs = [spec for spec in context.assets_def.specs if spec.key in context.selected_asset_keys]
        if owners := {owner for spec in specs for owner in spec.owners}:
            tags["dagster/owner"] = " ".join(sorted(owners))
    if context.has_partition_key:
        tags["dagster/partition"] = context.partition_key
    for key, value in run.dagster_execution_info.items():
        if key not in ("dagster/run-id", "dagster/job", "dagster/partition"):
            tags.setdefault(key, value)
    return tags


def asset_names(context: dg.OpExecutionContext | dg.AssetExecutionContext) -> list[str]:
    """The assets that the step materializes, sorted; empty for an op."""
    if not context.has_assets_def:
        return []
    return sorted(key.to_user_string() for key in context.selected_asset_keys)
