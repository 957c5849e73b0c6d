"""Requests are checked against botocore's service model, and answered in AWS's words."""

import json
import shutil
import subprocess
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.sagemaker_emulator import SageMakerEmulator, validation
from tests.sagemaker_emulator.testing import Aws


def refused(aws: Aws, name: str, **changes: Any) -> str:
    with pytest.raises(aws.sagemaker.exceptions.ClientError) as caught:
        aws.sagemaker.create_training_job(**{**aws.training_request(name, ""), **changes})
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
    return f"{caught.value.response['Error']['Code']}: {caught.value.response['Error']['Message']}"


def test_patterns_lengths_enumerations_ranges(aws: Aws) -> None:
    pattern = "[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}"
    assert refused(aws, "under_score") == (
        "ValidationException: 1 validation error detected: Value 'under_score' at 'trainingJobName' failed to satisfy "
        f"constraint: Member must satisfy regular expression pattern: {pattern}"
    )
    long = refused(aws, "x" * 64, RoleArn="arn:aws:iam::nobody:role/x")
    assert "3 validation errors detected" in long
    assert "Member must have length less than or equal to 63" in long
    environment = refused(aws, "a", Environment={"CONTEXT": "x" * 513})
    assert "Map value must satisfy constraint: [Member must have length less than or equal to 512]" in environment
    resources = {"InstanceType": "ml.toaster", "InstanceCount": 1, "VolumeSizeInGB": 1}
    assert "at 'resourceConfig.instanceType' failed to satisfy constraint: Member must satisfy enum value set" in (
        refused(aws, "a", ResourceConfig=resources)
    )
    keep = {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1, "KeepAlivePeriodInSeconds": 21601}
    assert "Member must have value less than or equal to 21600" in refused(aws, "a", ResourceConfig=keep)
    multiline = {
        "ContainerEntrypoint": ["sh", "-c", "echo a\necho b"],
        "TrainingImage": "i",
        "TrainingInputMode": "File",
    }
    assert "containerEntrypoint.3.member" in refused(aws, "a", AlgorithmSpecification=multiline)


def test_rules_beyond_the_model(aws: Aws) -> None:
    spot = {"EnableManagedSpotTraining": True}
    algorithm = aws.training_request("a", "")["AlgorithmSpecification"]
    metrics = {**algorithm, "MetricDefinitions": [{"Name": "rmse", "Regex": "rmse=("}]}
    assert "The regex of metric rmse is invalid" in refused(aws, "a", AlgorithmSpecification=metrics)
    assert "MaxWaitTimeInSeconds must be specified" in refused(aws, "a", **spot)
    short = {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 30}
    assert "greater than or equal to MaxRuntimeInSeconds" in refused(aws, "a", StoppingCondition=short, **spot)
    assert refused(aws, "a", RemoteDebugConfig={"EnableRemoteDebug": True}) == (
        "NotEmulated: The SageMaker emulator does not emulate RemoteDebugConfig of training jobs."
    )
    with pytest.raises(aws.sagemaker.exceptions.ClientError, match="does not emulate ListAutoMLJobs"):
        aws.sagemaker.list_auto_ml_jobs()


def test_duplicate_and_unknown_names(aws: Aws) -> None:
    aws.train("twice", "")
    with pytest.raises(aws.sagemaker.exceptions.ResourceInUse, match="Training job names must be unique"):
        aws.sagemaker.create_training_job(**aws.training_request("twice", ""))
    error = aws.sagemaker.exceptions.ClientError
    with pytest.raises(error, match=r"ValidationException.*Requested resource not found"):
        aws.describe_training("nobody")
    with pytest.raises(error, match="Could not find requested job with name: nobody"):
        aws.sagemaker.describe_processing_job(ProcessingJobName="nobody")
    with pytest.raises(error, match="Could not find model"):
        aws.sagemaker.describe_model(ModelName="nobody")


def test_required_members_without_boto3(aws: Aws) -> None:
    request = urllib.request.Request(
        aws.emulator.endpoint_url, b'{"TrainingJobName": "a"}', {"X-Amz-Target": "SageMaker.CreateTrainingJob"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=5)
    answer = json.loads(caught.value.read())
    assert "Value null at 'roleArn' failed to satisfy constraint: Member must not be null" in (answer["message"])


@pytest.mark.parametrize("service", ["sagemaker", "sagemaker-runtime", "sagemaker-featurestore-runtime"])
def test_every_pattern_of_the_model_compiles(service: str) -> None:
    model = validation.service_model(service)
    for name in model.shape_names:
        if pattern := model.shape_for(name).metadata.get("pattern"):
            validation.compiled(pattern)


def test_tag_values_may_be_text_in_any_script(aws: Aws) -> None:
    request = {**aws.training_request("tagged", ""), "Tags": [{"Key": "Wörk/ключ", "Value": "a b+c@d=1"}]}
    arn = aws.sagemaker.create_training_job(**request)["TrainingJobArn"]
    assert aws.sagemaker.list_tags(ResourceArn=arn)["Tags"] == request["Tags"]
    aws.await_training("tagged")
    with pytest.raises(aws.sagemaker.exceptions.ClientError, match=r"tags\.1\.member\.value"):
        aws.sagemaker.add_tags(ResourceArn=arn, Tags=[{"Key": "a", "Value": "no#hash"}])


@pytest.mark.skipif(shutil.which("aws") is None, reason="the AWS CLI is not installed")
def test_aws_cli(aws_environment: SageMakerEmulator) -> None:
    done = subprocess.run(
        ["aws", "sagemaker", "list-training-jobs", "--max-results", "1"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "TrainingJobSummaries" in json.loads(done.stdout)
