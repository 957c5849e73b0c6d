"""Scripts of tiny jobs that speak Dagster Pipes, and requests that run them on the emulator."""

from __future__ import annotations

from typing import Any

from resources.sagemaker.job_files import JobPolling

ROLE = "arn:aws:iam::123456789012:role/housing-assets"
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/jobs:1"
FAST = JobPolling(interval=0.1, longest_interval=0.5, retry=60.0, drain=6.0, quiet=0.3, stop=10.0, lease=2.0)
# A core and little memory for each host; what another host or process has done is noticed after half a second.
SMALL_HOSTS = {
    "HOUSING_NODE_CPUS": "1",
    "HOUSING_OBJECT_STORE_BYTES": str(100 << 20),
    "HOUSING_CLUSTER_POLL_SECONDS": "0.5",
}
# Only the first host speaks Pipes, as Ray's head does. Every host prints a line: a log that stays empty is waited for.
PREAMBLE = """
import contextlib, json, os, sys, time
os.environ |= {"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": "30"}
import boto3
from dagster_pipes import PipesS3ContextLoader, PipesS3MessageWriter, open_dagster_pipes
for place in ("/opt/ml/input/config", "/opt/ml/config"):
    with contextlib.suppress(FileNotFoundError):
        host = json.load(open(place + "/resourceconfig.json"))["current_host"]
print("starts", flush=True)
def pipes():
    s3 = boto3.client("s3")
    return open_dagster_pipes(
        context_loader=PipesS3ContextLoader(client=s3), message_writer=PipesS3MessageWriter(client=s3, interval=0)
    )
"""


def training_request(aws: Any, script: str, hosts: int = 1, **changes: Any) -> dict[str, Any]:
    """Parameters of `create_training_job`, without a name. The script is delivered by a channel."""
    request = aws.training_request(f"script-{abs(hash(script)) % 10**9}", PREAMBLE + script, hosts, **changes)
    del request["TrainingJobName"]
    request["StoppingCondition"] = {"MaxRuntimeInSeconds": 600}
    return request


def processing_request(aws: Any, script: str, hosts: int = 1, **changes: Any) -> dict[str, Any]:
    """Parameters of `create_processing_job`, without a name."""
    code = aws.put(f"code/script-{abs(hash(script)) % 10**9}/job.py", PREAMBLE + script)
    return {
        "RoleArn": ROLE,
        "AppSpecification": {"ImageUri": IMAGE, "ContainerEntrypoint": ["python3", "/opt/ml/processing/code/job.py"]},
        "ProcessingInputs": [
            {
                "InputName": "code",
                "S3Input": {
                    "S3Uri": code,
                    "LocalPath": "/opt/ml/processing/code",
                    "S3DataType": "S3Prefix",
                    "S3InputMode": "File",
                },
            }
        ],
        "ProcessingResources": {
            "ClusterConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": hosts, "VolumeSizeInGB": 10}
        },
        **changes,
    }
