"""Requests are checked against botocore's service model before they are sent."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from resources.aws.request_validation import InvalidJobRequest, check_request, compiled
from resources.compute.sagemaker import StepJob
from resources.sagemaker.job_requests import TRAINING_ONLY, JobConfig, processing_request, training_request

ROLE = "arn:aws:iam::123456789012:role/housing-assets"
EVERYTHING: dict[str, Any] = {
    "role_arn": ROLE,
    "instance_type": "ml.m5.2xlarge",
    "instance_count": 3,
    "volume_size_gb": 100,
    "max_run_seconds": 3600,
    "subnets": ["subnet-1", "subnet-2"],
    "security_group_ids": ["sg-1"],
    "volume_kms_key": "0a1b2c3d-0000-4000-8000-0123456789ab",
    "output_kms_key": "alias/output",
    "network_isolation": True,
    "encrypt_inter_container_traffic": True,
    "environment": {"COLOUR": "red"},
    "tags": {"cost centre": "42"},
}


def training(**changes: Any) -> dict[str, Any]:
    config = JobConfig(**EVERYTHING | changes)
    request = training_request(
        config,
        image="image",
        entrypoint=["/bin/bash", "run.sh"],
        output_uri="s3://bucket/out",
        channels={"code": "s3://bucket/code/"},
        checkpoint_folder="0123",
    )
    return {**request, "TrainingJobName": "job-1"}


def processing(**changes: Any) -> dict[str, Any]:
    config = JobConfig(**EVERYTHING | changes)
    request = processing_request(config, image="image", entrypoint=["run"], channels={"code": "s3://bucket/code/"})
    return {**request, "ProcessingJobName": "job-1"}


def test_requests_with_every_setting_are_valid_and_hold_it() -> None:
    spot = training(use_spot=True, max_wait_seconds=7200, checkpoint_uri="s3://bucket/checkpoints/")
    check_request("CreateTrainingJob", spot)
    assert spot["CheckpointConfig"] == {"S3Uri": "s3://bucket/checkpoints/0123"}
    assert spot["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 7200}
    warm = training(keep_alive_seconds=600)
    check_request("CreateTrainingJob", warm)
    assert warm["ResourceConfig"] == {
        "InstanceType": "ml.m5.2xlarge",
        "InstanceCount": 3,
        "VolumeSizeInGB": 100,
        "KeepAlivePeriodInSeconds": 600,
        "VolumeKmsKeyId": "0a1b2c3d-0000-4000-8000-0123456789ab",
    }
    assert warm["VpcConfig"] == {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]}
    assert warm["OutputDataConfig"]["KmsKeyId"] == "alias/output"
    assert warm["EnableNetworkIsolation"] is warm["EnableInterContainerTrafficEncryption"] is True
    request = processing()
    check_request("CreateProcessingJob", request)
    assert request["NetworkConfig"]["VpcConfig"]["SecurityGroupIds"] == ["sg-1"]
    assert request["NetworkConfig"]["EnableNetworkIsolation"] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Environment": {"A": "x" * 513}}, r"Environment\['A'\] has 513 characters; .* at most 512"),
        ({"TrainingJobName": "my_job"}, "TrainingJobName is 'my_job', which does not match"),
        ({"TrainingJobName": "x" * 64}, "TrainingJobName has 64 characters; CreateTrainingJob allows at most 63"),
        ({"RoleArn": "housing-role"}, "RoleArn, value: 12, valid min length: 20"),
        ({"RoleArn": "arn:aws:iam::12:role/housing"}, "RoleArn is 'arn:aws:iam::12:.*does not match"),
        ({"Tags": [{"Key": f"k{n}", "Value": ""} for n in range(51)]}, "Tags has 51 entries"),
        ({"Colour": "red"}, 'Unknown parameter in input: "Colour"'),
        ({"StoppingCondition": {"MaxRuntimeInSeconds": "10"}}, "MaxRuntimeInSeconds, value: 10, type: .*str"),
        ({"ResourceConfig": {"InstanceType": "ml.m5.huge", "InstanceCount": 1, "VolumeSizeInGB": 1}}, "one of ml.m5"),
        ({"OutputDataConfig": {}}, 'Missing required parameter in OutputDataConfig: "S3OutputPath"'),
        ({"VpcConfig": {"Subnets": [], "SecurityGroupIds": ["sg-1"]}}, "VpcConfig.Subnets, value: 0, valid min"),
        ({"EnableNetworkIsolation": "yes"}, "EnableNetworkIsolation, value: yes, type: .*bool"),
    ],
)  # fmt: skip
def test_what_the_service_would_refuse_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidJobRequest, match=message):
        check_request("CreateTrainingJob", training() | changes)


def refusal(operation: str, request: dict[str, Any]) -> str:
    """Why the request is refused; empty if it is not."""
    try:
        check_request(operation, request)
    except InvalidJobRequest as error:
        return str(error)
    return ""


def test_all_problems_are_reported_at_once() -> None:
    request = processing() | {"Environment": {"A": "x" * 257, "B": "y" * 300}, "ProcessingJobName": "-"}
    others = {"RoleArn": 7, "Colour": "red", "StoppingCondition": {"MaxRuntimeInSeconds": "1"}}
    message = refusal("CreateProcessingJob", request | others)
    for what in (*("Environment['A'] has 257", "Environment['B'] has 300", "ProcessingJobName is '-'"), *others):
        assert what in message


@settings(deadline=None)
@given(st.integers(0, 600))
def test_the_length_of_environment_values_decides(length: int) -> None:
    environment = {"Environment": {"VALUE": "v" * length}}
    assert bool(refusal("CreateProcessingJob", processing() | environment)) == (length > 256)
    assert bool(refusal("CreateTrainingJob", training() | environment)) == (length > 512)


@settings(deadline=None)
@given(st.text(alphabet=st.characters(categories=["L", "Nd", "Zs"]), max_size=50))
def test_tags_in_any_script_pass(value: str) -> None:
    assert refusal("CreateTrainingJob", training() | {"Tags": [{"Key": "key", "Value": value}]}) == ""


def test_every_pattern_of_the_service_model_is_understood() -> None:
    import botocore.session

    model: Any = botocore.session.get_session().get_service_model("sagemaker")
    patterns = {model.shape_for(name).metadata.get("pattern") for name in model.shape_names} - {None}
    assert len(patterns) > 100
    for pattern in patterns:
        compiled(pattern)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"security_group_ids": []}, "belong together"),
        ({"max_wait_seconds": 10}, "managed spot"),
        ({"use_spot": True, "max_wait_seconds": 10}, "at least max_run_seconds"),
        ({"use_spot": True, "keep_alive_seconds": 10}, "cannot be combined"),
        ({"instance_count": 0}, "instance_count"),
        ({"keep_alive_seconds": 30_000}, "keep_alive_seconds"),
    ],
)
def test_contradictory_configuration_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        JobConfig(**EVERYTHING | changes)


def test_what_only_training_jobs_have_can_be_set_for_a_step() -> None:
    assert set(TRAINING_ONLY) <= set(JobConfig.model_fields) & set(StepJob.model_fields)
