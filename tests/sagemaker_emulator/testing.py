"""A small helper for tests: boto3 on an emulator, and short ways to start tiny jobs and await them."""

import uuid
from typing import Any

import boto3

from tests.sagemaker_emulator.emulator import SageMakerEmulator
from tests.sagemaker_emulator.faults import Faults
from tests.waiting import until

ROLE = "arn:aws:iam::123456789012:role/housing-assets"
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/jobs:1"
CREDENTIALS = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}


class Aws:
    """boto3 clients on an emulator, and short ways to start tiny jobs and await them."""

    def __init__(self, endpoint_url: str, emulator: SageMakerEmulator | None = None) -> None:
        self._emulator = emulator
        self._endpoint_url = endpoint_url
        self._clients: dict[str, Any] = {}
        self.bucket = f"test-{uuid.uuid4().hex[:12]}"
        self.s3 = self.client("s3")
        self.sagemaker = self.client("sagemaker")
        self.s3.create_bucket(Bucket=self.bucket)

    @property
    def emulator(self) -> SageMakerEmulator:
        """The emulator, where it runs in this process."""
        assert self._emulator is not None
        return self._emulator

    @property
    def faults(self) -> Faults:
        """Its faults."""
        return self.emulator.faults

    def client(self, service: str, **options: Any) -> Any:
        """A boto3 client; kept unless it has options."""
        if options or service not in self._clients:
            client = boto3.client(service, endpoint_url=self._endpoint_url, **CREDENTIALS, **options)
            if options:
                return client
            self._clients[service] = client
        return self._clients[service]

    def uri(self, key: str = "") -> str:
        """URI in this test's bucket."""
        return f"s3://{self.bucket}/{key}"

    def put(self, key: str, body: str | bytes) -> str:
        """Write an object; returns its URI."""
        self.s3.put_object(Bucket=self.bucket, Key=key, Body=body)
        return self.uri(key)

    def get(self, key: str) -> bytes:
        """Read an object."""
        return self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def keys(self, prefix: str = "") -> list[str]:
        """Keys below a prefix."""
        found = self.s3.list_objects_v2(Bucket=self.bucket, Prefix=prefix).get("Contents", [])
        return [item["Key"] for item in found]

    def training_request(self, name: str, script: str, hosts: int = 1, **changes: Any) -> dict[str, Any]:
        """A CreateTrainingJob request that runs a Python script, delivered through a channel."""
        code = self.put(f"code/{name}/job.py", script)
        request: dict[str, Any] = {
            "TrainingJobName": name,
            "RoleArn": ROLE,
            "AlgorithmSpecification": {
                "TrainingImage": IMAGE,
                "TrainingInputMode": "File",
                "ContainerEntrypoint": ["python3", "/opt/ml/input/data/code/job.py"],
            },
            "InputDataConfig": [channel("code", code)],
            "OutputDataConfig": {"S3OutputPath": self.uri("out")},
            "ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": hosts, "VolumeSizeInGB": 10},
            "StoppingCondition": {"MaxRuntimeInSeconds": 60},
        }
        for key, value in changes.items():
            request[key] = {**request[key], **value} if isinstance(request.get(key), dict) else value
        return request

    def train(self, name: str, script: str, hosts: int = 1, wait: bool = True, **changes: Any) -> dict[str, Any]:
        """Start a training job and, unless told otherwise, await its end."""
        self.sagemaker.create_training_job(**self.training_request(name, script, hosts, **changes))
        return self.await_training(name) if wait else self.describe_training(name)

    def describe_training(self, name: str) -> dict[str, Any]:
        """DescribeTrainingJob."""
        return self.sagemaker.describe_training_job(TrainingJobName=name)

    def await_training(self, name: str) -> dict[str, Any]:
        """The description of a training job that has ended."""
        until(lambda: self.describe_training(name)["TrainingJobStatus"] in ENDED)
        return self.describe_training(name)

    def process(self, name: str, script: str, hosts: int = 1, wait: bool = True, **changes: Any) -> dict[str, Any]:
        """Start a processing job that runs a Python script and, unless told otherwise, await its end."""
        code = self.put(f"code/{name}/job.py", script)
        inputs = [processing_input("code", code), *changes.pop("ProcessingInputs", [])]
        request = {
            "ProcessingJobName": name,
            "RoleArn": ROLE,
            "AppSpecification": {
                "ImageUri": IMAGE,
                "ContainerEntrypoint": ["python3", "/opt/ml/processing/code/job.py"],
            },
            "ProcessingInputs": inputs,
            "ProcessingResources": {
                "ClusterConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": hosts, "VolumeSizeInGB": 10}
            },
            **changes,
        }
        self.sagemaker.create_processing_job(**request)
        return self.await_processing(name) if wait else {}

    def await_processing(self, name: str) -> dict[str, Any]:
        """The description of a processing job that has ended."""

        def describe() -> dict[str, Any]:
            return self.sagemaker.describe_processing_job(ProcessingJobName=name)

        until(lambda: describe()["ProcessingJobStatus"] in ENDED)
        return describe()

    def logs(self, job: str, kind: str = "TrainingJobs") -> dict[str, list[str]]:
        """Log lines of a job by host."""
        client, group = self.client("logs"), f"/aws/sagemaker/{kind}"
        if not client.describe_log_groups(logGroupNamePrefix=group)["logGroups"]:
            return {}
        streams = client.describe_log_streams(logGroupName=group, logStreamNamePrefix=f"{job}/")["logStreams"]
        lines: dict[str, list[str]] = {}
        for name in sorted(stream["logStreamName"] for stream in streams):
            events = client.get_log_events(logGroupName=group, logStreamName=name, startFromHead=True)["events"]
            host = name.split("/")[1].rpartition("-")[0]
            lines.setdefault(host, []).extend(event["message"] for event in events)
        return lines

    def feature_groups(self, name: str) -> list[dict[str, Any]]:
        """Summaries of the feature groups whose names contain `name`."""
        return self.sagemaker.list_feature_groups(NameContains=name)["FeatureGroupSummaries"]

    def feature_tables(self, name: str) -> list[str]:
        """The tables of such groups in Glue, also of deleted ones."""
        glue = self.client("glue")
        try:
            tables = glue.get_tables(DatabaseName="sagemaker_featurestore")["TableList"]
        except glue.exceptions.EntityNotFoundException:
            return []
        return [table["Name"] for table in tables if name in table["Name"]]

    def remove_feature_groups(self, name: str) -> None:
        """Delete the groups, and the tables, which SageMaker leaves: they belong to the account, not to a bucket."""
        for found in self.feature_groups(name):
            if found["FeatureGroupStatus"] != "Deleting":
                self.sagemaker.delete_feature_group(FeatureGroupName=found["FeatureGroupName"])
        until(lambda: not self.feature_groups(name))
        for table in self.feature_tables(name):
            self.client("glue").delete_table(DatabaseName="sagemaker_featurestore", Name=table)


ENDED = ("Completed", "Failed", "Stopped")


def channel(name: str, uri: str, **source: Any) -> dict[str, Any]:
    """A training channel on S3."""
    return {"ChannelName": name, "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": uri, **source}}}


def processing_input(name: str, uri: str, **source: Any) -> dict[str, Any]:
    """A processing input on S3, below /opt/ml/processing."""
    place = {"S3Uri": uri, "LocalPath": f"/opt/ml/processing/{name}", "S3DataType": "S3Prefix", "S3InputMode": "File"}
    return {"InputName": name, "S3Input": {**place, **source}}
