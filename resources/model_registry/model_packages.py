"""Model package groups and model packages of SageMaker: the calls on them, and the request to create one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resources.aws.calls import already_exists, error_code, if_found, is_missing, pages
from resources.aws.ownership import is_ours, owned, tags_of
from resources.aws.request_validation import check_request
from resources.waiting import wait_until

CONTENT_TYPES = ("text/csv", "application/json", "application/jsonlines")
GROUP = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
DESCRIPTION_LIMIT = 1024


def package_request(
    group: str,
    *,
    container: Mapping[str, Any],
    archive_uri: str,
    metrics: tuple[str, str],
    properties: Mapping[str, str],
    status: str,
    description: str,
    instance_types: Sequence[str],
    transform_instance_types: Sequence[str],
) -> dict[str, Any]:
    """Parameters of `create_model_package` without a token. A version has its group's tags and may have none itself."""
    metrics_uri, metrics_digest = metrics
    return {
        "ModelPackageGroupName": group,
        "ModelPackageDescription": description,
        "ModelApprovalStatus": status,
        "InferenceSpecification": {
            "Containers": [{**container, "ModelDataUrl": archive_uri, "Framework": "XGBOOST"}],
            "SupportedContentTypes": list(CONTENT_TYPES),
            "SupportedResponseMIMETypes": list(CONTENT_TYPES),
            "SupportedRealtimeInferenceInstanceTypes": list(instance_types),
            "SupportedTransformInstanceTypes": list(transform_instance_types),
        },
        "ModelMetrics": {
            "ModelQuality": {
                "Statistics": {
                    "ContentType": "application/json",
                    "ContentDigest": metrics_digest,
                    "S3Uri": metrics_uri,
                }
            }
        },
        "CustomerMetadataProperties": dict(properties),
    }


def one_line(text: str, limit: int = DESCRIPTION_LIMIT) -> str:
    """`text` as descriptions may be: without line ends, not longer than `limit`."""
    return " ".join(text.split())[:limit]


@dataclass(frozen=True)
class ModelPackages:
    """Calls on model packages. `settle_seconds`: how long what was created may take to be there."""

    client: Any
    settle_seconds: float = 120.0

    @property
    def region(self) -> str:
        """The region that is asked."""
        return self.client.meta.region_name

    def group(self, name: str) -> dict[str, Any] | None:
        """DescribeModelPackageGroup; None if there is no such group."""
        return if_found(self.client.describe_model_package_group, ModelPackageGroupName=name)

    def arn(self, group: str, version: int) -> str | None:
        """ARN that a version has, whether it exists or not; None if the group does not exist."""
        found = self.group(group)
        if found is None:
            return None
        return f"{found['ModelPackageGroupArn'].replace(':model-package-group/', ':model-package/')}/{version}"

    def ensure_group(self, name: str, tags: Mapping[str, str]) -> None:
        """Create the group unless it is there. Raises `TimeoutError` if it does not get ready."""
        from botocore.exceptions import ClientError

        if self.group(name) is not None:
            return
        request = {"ModelPackageGroupName": name, "Tags": owned(tags)}
        check_request("CreateModelPackageGroup", request)
        try:
            self.client.create_model_package_group(**request)
        except ClientError as error:
            if not already_exists(error):  # created by another process in the meantime
                raise
        self._await(f"model package group {name}", "ModelPackageGroupStatus", lambda: self.group(name))

    def delete_group(self, name: str) -> None:
        """Remove the group if this project created it and it is empty."""
        found = self.group(name)
        if found and is_ours(tags_of(self.client, found["ModelPackageGroupArn"])) and not self.list(name):
            self.client.delete_model_package_group(ModelPackageGroupName=name)

    def list(self, group: str, status: str | None = None) -> Sequence[dict[str, Any]]:
        """Summaries of the versions (with an approval status), oldest first; empty if there is no such group."""
        from botocore.exceptions import ClientError

        params = {"ModelPackageGroupName": group, "SortBy": "CreationTime", "SortOrder": "Ascending"}
        params |= {"ModelApprovalStatus": status} if status else {}
        try:
            return [*pages(self.client, "list_model_packages", "ModelPackageSummaryList", **params)]
        except ClientError as error:
            if is_missing(error):
                return []
            raise

    def describe(self, arn: str) -> dict[str, Any] | None:
        """DescribeModelPackage; None if there is no such package."""
        return if_found(self.client.describe_model_package, ModelPackageName=arn)

    def create(self, request: Mapping[str, Any], token: str) -> dict[str, Any] | None:
        """Create a version and describe it; None if the token has been used otherwise.

        Raises `RuntimeError` if SageMaker refuses the package after all, `TimeoutError` if it does not get ready.
        """
        from botocore.exceptions import ClientError

        try:
            arn = self.client.create_model_package(ClientToken=token, **request)["ModelPackageArn"]
        except ClientError as error:
            if error_code(error) == "ConflictException":
                return None
            raise
        try:
            wait_until(lambda: self.describe(arn), timeout=1.0, interval=1.0, what=f"the appearance of {arn}")
        except TimeoutError:  # a version that the token once made, and that has been deleted
            return None
        return self._await(arn, "ModelPackageStatus", lambda: self.describe(arn))

    def update(self, request: Mapping[str, Any]) -> None:
        """UpdateModelPackage."""
        check_request("UpdateModelPackage", request)
        self.client.update_model_package(**request)

    def delete(self, arn: str) -> None:
        """Remove a version. Nothing happens if there is none."""
        if_found(self.client.delete_model_package, ModelPackageName=arn)

    def _await(self, name: str, member: str, describe: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:

        def ready() -> dict[str, Any] | None:
            found = describe() or {}
            if found.get(member) == "Failed":
                raise RuntimeError(f"{name} failed: {found.get('ModelPackageStatusDetails', 'no reason given')}")
            return found if found.get(member) == "Completed" else None

        return wait_until(ready, timeout=self.settle_seconds, interval=0.5, what=f"the creation of {name}")
