"""Which AWS resources are this project's: the tag that says so, and how to read it.

Everything that the registry and the endpoint host create carries it, and nothing without it is ever changed or removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from resources.aws.calls import is_missing, pages
from resources.aws.tags import VALUE_LENGTH, sanitised, tag_list

CREATED_BY_TAG = "housing-assets:created-by"
CREATED_BY = "housing-assets"
# The prefix that a deployment keeps everything of a kind below: two deployments in one account never touch each other.
ROOT_TAG = "housing-assets:root"


def owned(*sources: Mapping[str, str]) -> list[dict[str, str]]:
    """Tags as the API takes them, with the one that marks what this project created."""
    return tag_list({CREATED_BY_TAG: CREATED_BY}, *sources)


def is_ours(tags: Mapping[str, str]) -> bool:
    """Whether the tags are those of something that this project created."""
    return tags.get(CREATED_BY_TAG) == CREATED_BY


def root_tags(root: str) -> dict[str, str]:
    """The tag that says to which deployment something belongs."""
    return {ROOT_TAG: sanitised(root.rstrip("/"), VALUE_LENGTH)}


def creation_tags(root: str) -> dict[str, str]:
    """The tags of everything that this deployment creates."""
    return {CREATED_BY_TAG: CREATED_BY, **root_tags(root)}


def belongs_to(tags: Mapping[str, str], root: str) -> bool:
    """Whether the tags are those of something that this very deployment created."""
    return is_ours(tags) and tags.get(ROOT_TAG) == root_tags(root)[ROOT_TAG]


def tags_of(client: Any, arn: str) -> dict[str, str]:
    """All tags of a SageMaker resource; none if it does not exist."""
    from botocore.exceptions import ClientError

    try:
        return {tag["Key"]: tag["Value"] for tag in pages(client, "list_tags", "Tags", ResourceArn=arn)}
    except ClientError as error:
        if is_missing(error):
            return {}
        raise


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
