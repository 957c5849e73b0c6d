"""Model package groups and model packages of SageMaker: the calls on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from resources.aws.calls import already_exists, error_code, if_found, pages
from resources.aws.ownership import owned
from resources.aws.request_validation import check_request
from resources.waiting import wait_until


def find_package(client: Any, group: str, version: int) -> dict[str, Any] | None:
    """DescribeModelPackage; None if there is no such version."""
    found = if_found(client.describe_model_package_group, ModelPackageGroupName=group)
    if found is None:
        return None
    arn = found["ModelPackageGroupArn"].replace(":model-package-group/", ":model-package/")
    return describe_package(client, f"{arn}/{version}")


def describe_package(client: Any, arn: str) -> dict[str, Any] | None:
    """DescribeModelPackage; None if there is no such package."""
    return if_found(client.describe_model_package, ModelPackageName=arn)


def list_packages(client: Any, group: str, status: str | None = None) -> list[dict[str, Any]]:
    """Summaries of the versions (with an approval status), oldest first; empty if there is no such group."""
    params = {"ModelPackageGroupName": group, "SortBy": "CreationTime", "SortOrder": "Ascending"}
    params |= {"ModelApprovalStatus": status} if status else {}
    return if_found(lambda: [*pages(client, "list_model_packages", "ModelPackageSummaryList", **params)]) or []


def ensure_group(client: Any, name: str, tags: Mapping[str, str], seconds: float) -> None:
    """Create the group unless it is there. Raises `TimeoutError` if it does not get ready within `seconds`."""
    from botocore.exceptions import ClientError

    describe = partial(if_found, client.describe_model_package_group, ModelPackageGroupName=name)
    if describe() is not None:
        return
    request = {"ModelPackageGroupName": name, "Tags": owned(tags)}
    check_request("CreateModelPackageGroup", request)
    try:
        client.create_model_package_group(**request)
    except ClientError as error:
        if not already_exists(error):  # created by another process in the meantime
            raise
    _await(f"model package group {name}", "ModelPackageGroupStatus", describe, seconds)


def create_package(client: Any, request: Mapping[str, Any], token: str, seconds: float) -> dict[str, Any] | None:
    """Create a version and describe it; None if the token has been used otherwise.

    Raises `RuntimeError` if SageMaker refuses the package after all, `TimeoutError` if it does not get ready within
    `seconds`.
    """
    from botocore.exceptions import ClientError

    try:
        arn = client.create_model_package(ClientToken=token, **request)["ModelPackageArn"]
    except ClientError as error:
        if error_code(error) == "ConflictException":
            return None
        raise

    describe = partial(describe_package, client, arn)
    try:
        wait_until(describe, timeout=1.0, interval=1.0, what=f"the appearance of {arn}")
    except TimeoutError:  # a version that the token once made, and that has been deleted
        return None
    return _await(arn, "ModelPackageStatus", describe, seconds)


def _await(name: str, member: str, describe: Callable[[], dict[str, Any] | None], seconds: float) -> dict[str, Any]:
    def ready() -> dict[str, Any] | None:
        found = describe() or {}
        if found.get(member) == "Failed":
            raise RuntimeError(f"{name} failed: {found.get('ModelPackageStatusDetails', 'no reason given')}")
        return found if found.get(member) == "Completed" else None

    return wait_until(ready, timeout=seconds, interval=0.5, what=f"the creation of {name}")
