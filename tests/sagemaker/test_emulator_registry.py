"""Model package groups and packages."""

from typing import Any

import pytest

from tests.sagemaker_emulator.testing import Aws


def package(aws: Aws, group: str, **members: Any) -> str:
    inference = {
        "Containers": [{"Image": "serving-image", "ModelDataUrl": aws.uri("model.tar.gz")}],
        "SupportedContentTypes": ["text/csv"],
        "SupportedResponseMIMETypes": ["text/csv"],
    }
    request = {"ModelPackageGroupName": group, "InferenceSpecification": inference, **members}
    return aws.sagemaker.create_model_package(**request)["ModelPackageArn"]


def test_versions_approval_and_filter(aws: Aws) -> None:
    sagemaker = aws.sagemaker
    sagemaker.create_model_package_group(ModelPackageGroupName="prices")
    with pytest.raises(sagemaker.exceptions.ClientError, match="already exists"):
        sagemaker.create_model_package_group(ModelPackageGroupName="prices")
    first = package(aws, "prices", CustomerMetadataProperties={"run": "1", "old": "x"})
    second = package(aws, "prices", ModelApprovalStatus="Approved")
    assert [first[-9:], second[-9:]] == ["/prices/1", "/prices/2"]

    def listed(**filters: Any) -> list[int]:
        found = sagemaker.list_model_packages(ModelPackageGroupName="prices", **filters)["ModelPackageSummaryList"]
        return [p["ModelPackageVersion"] for p in found]

    assert listed() == [1, 2]
    assert listed(ModelApprovalStatus="Approved") == [2]
    assert listed(ModelApprovalStatus="PendingManualApproval", SortOrder="Descending") == [1]
    sagemaker.update_model_package(
        ModelPackageArn=first,
        ModelApprovalStatus="Rejected",
        ApprovalDescription="too old",
        CustomerMetadataProperties={"run": "2"},
        CustomerMetadataPropertiesToRemove=["old"],
    )
    described = sagemaker.describe_model_package(ModelPackageName=first)
    assert described["ModelApprovalStatus"] == "Rejected"
    assert described["ApprovalDescription"] == "too old"
    assert described["CustomerMetadataProperties"] == {"run": "2"}
    assert listed(ModelApprovalStatus="PendingManualApproval") == []
    with pytest.raises(sagemaker.exceptions.ClientError, match="satisfy enum value set"):
        sagemaker.update_model_package(ModelPackageArn=first, ModelApprovalStatus="Maybe")
    with pytest.raises(sagemaker.exceptions.ConflictException):
        sagemaker.delete_model_package_group(ModelPackageGroupName="prices")
    for arn in (first, second):
        sagemaker.delete_model_package(ModelPackageName=arn)
    sagemaker.delete_model_package_group(ModelPackageGroupName="prices")
    with pytest.raises(sagemaker.exceptions.ClientError, match="does not exist"):
        listed()
