"""Endpoints that run the real container command: create, update, roll back, invoke, capture, delete."""

import io
import json
import tarfile
from typing import Any

import pytest

from tests.sagemaker_emulator.testing import ROLE, Aws
from tests.waiting import until

SERVE = """
import os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
assert sys.argv[1:] == ["serve"], sys.argv
print("serving", os.environ["VERSION"], flush=True)
class Handler(BaseHTTPRequestHandler):
    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Type", "text/csv")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer(200 if self.path == "/ping" else 404, b"")
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if body == b"bad": return self.answer(400, b"bad row")
        self.answer(200, os.environ["VERSION"].encode() + b":" + str(len(body)).encode())
    def log_message(self, *args): pass
port = int(os.environ.get("SAGEMAKER_BIND_TO_PORT", "8080"))
ThreadingHTTPServer(("0.0.0.0", port), Handler).serve_forever()
"""


def archive(script: str, name: str = "serve.py") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as opened:
        info = tarfile.TarInfo(name)
        info.size = len(script)
        opened.addfile(info, io.BytesIO(script.encode()))
    return buffer.getvalue()


def configure(aws: Aws, name: str, version: str, script: str = SERVE, **config: Any) -> str:
    """A model and an endpoint configuration of one name."""

    url = aws.put(f"{name}/model.tar.gz", archive(script))
    container = {"Image": "serving-image", "ModelDataUrl": url, "Environment": {"VERSION": version}}
    aws.sagemaker.create_model(ModelName=name, PrimaryContainer=container, ExecutionRoleArn=ROLE)
    variant = {"VariantName": "All", "ModelName": name, "InitialInstanceCount": 1, "InstanceType": "ml.m5.large"}
    aws.sagemaker.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant], **config)
    return name


def settled(aws: Aws, name: str) -> dict[str, Any]:
    def describe() -> dict[str, Any]:
        return aws.sagemaker.describe_endpoint(EndpointName=name)

    until(lambda: describe()["EndpointStatus"] in ("InService", "Failed"))
    return describe()


def invoke(aws: Aws, name: str, body: str | bytes = "1,2") -> str:
    answer = aws.client("sagemaker-runtime").invoke_endpoint(EndpointName=name, ContentType="text/csv", Body=body)
    assert answer["ContentType"] == "text/csv"
    return answer["Body"].read().decode()


def test_create_invoke_update_roll_back_delete(aws: Aws) -> None:
    sagemaker = aws.sagemaker
    error = sagemaker.exceptions.ClientError
    name = configure(aws, "one", "v1")
    sagemaker.create_endpoint(EndpointName="ep", EndpointConfigName=name)
    assert settled(aws, "ep")["EndpointStatus"] == "InService"
    assert invoke(aws, "ep") == "v1:3"
    runtime = aws.client("sagemaker-runtime")
    with pytest.raises(runtime.exceptions.ModelError) as caught:
        invoke(aws, "ep", "bad")
    assert caught.value.response["OriginalStatusCode"] == 400
    assert caught.value.response["OriginalMessage"] == "bad row"
    assert invoke(aws, "ep", b"x" * 6291456) == "v1:6291456"
    with pytest.raises(error, match="less than or equal to 6291456"):
        invoke(aws, "ep", b"x" * 6291457)
    with pytest.raises(error, match="not found"):
        invoke(aws, "nobody")

    sagemaker.update_endpoint(EndpointName="ep", EndpointConfigName=configure(aws, "two", "v2"))
    assert sagemaker.describe_endpoint(EndpointName="ep")["EndpointStatus"] == "Updating"
    with pytest.raises(error, match="Cannot update in-progress endpoint"):
        sagemaker.update_endpoint(EndpointName="ep", EndpointConfigName="one")
    while sagemaker.describe_endpoint(EndpointName="ep")["EndpointStatus"] == "Updating":
        assert invoke(aws, "ep") in ("v1:3", "v2:3")
    assert settled(aws, "ep")["EndpointConfigName"] == "two"
    assert invoke(aws, "ep") == "v2:3"

    sagemaker.update_endpoint(
        EndpointName="ep", EndpointConfigName=configure(aws, "three", "v3", "raise SystemExit(1)")
    )
    done = settled(aws, "ep")
    assert done["EndpointConfigName"] == "two"
    assert "did not pass the ping health check" in done["FailureReason"]
    assert invoke(aws, "ep") == "v2:3"
    streams = aws.client("logs").describe_log_streams(logGroupName="/aws/sagemaker/Endpoints/ep")["logStreams"]
    assert len(streams) >= 2

    sagemaker.delete_endpoint(EndpointName="ep")

    def gone() -> bool:
        return not sagemaker.list_endpoints(NameContains="ep")["Endpoints"]

    until(gone)
    with pytest.raises(error, match="Could not find endpoint"):
        sagemaker.describe_endpoint(EndpointName="ep")


def test_canary_rolls_back_on_an_alarm(aws: Aws) -> None:
    alarm = {"Namespace": "x", "MetricName": "x", "Period": 60, "EvaluationPeriods": 1, "Threshold": 1.0,
             "ComparisonOperator": "GreaterThanThreshold", "Statistic": "Sum"}  # fmt: skip
    watch = aws.client("cloudwatch")
    watch.put_metric_alarm(AlarmName="errors", **alarm)
    aws.sagemaker.create_endpoint(EndpointName="canary", EndpointConfigName=configure(aws, "canary-1", "v1"))
    settled(aws, "canary")
    aws.sagemaker.update_endpoint(
        EndpointName="canary",
        EndpointConfigName=configure(aws, "canary-2", "v2"),
        DeploymentConfig={
            "BlueGreenUpdatePolicy": {
                "TrafficRoutingConfiguration": {
                    "Type": "CANARY",
                    "WaitIntervalInSeconds": 3600,
                    "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": 50},
                }
            },
            "AutoRollbackConfiguration": {"Alarms": [{"AlarmName": "errors"}]},
        },
    )
    seen: set[str] = set()
    until(lambda: seen.add(invoke(aws, "canary")) or len(seen) == 2)
    watch.set_alarm_state(AlarmName="errors", StateValue="ALARM", StateReason="test")
    done = settled(aws, "canary")
    assert done["EndpointConfigName"] == "canary-1"
    assert "Alarms errors were in state ALARM" in done["FailureReason"]
    assert {invoke(aws, "canary") for _ in range(10)} == {"v1:3"}


def test_data_capture(aws: Aws) -> None:
    capture = {
        "EnableCapture": True,
        "InitialSamplingPercentage": 100,
        "DestinationS3Uri": aws.uri("capture"),
        "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
        "CaptureContentTypeHeader": {"CsvContentTypes": ["text/csv"]},
    }
    name = configure(aws, "captured", "v1", DataCaptureConfig=capture)
    aws.sagemaker.create_endpoint(EndpointName="captured", EndpointConfigName=name)
    assert settled(aws, "captured")["DataCaptureConfig"]["CaptureStatus"] == "Started"
    invoke(aws, "captured", "7,8")
    key = until(lambda: aws.keys("capture/captured/All/"))[0]
    line = json.loads(aws.get(key).decode().splitlines()[0])
    assert line["captureData"]["endpointInput"] == {
        "observedContentType": "text/csv", "mode": "INPUT", "data": "7,8", "encoding": "CSV",
    }  # fmt: skip
    assert line["captureData"]["endpointOutput"]["data"] == "v1:3"


@pytest.mark.parametrize("mode", ["exit", "ping"])
def test_failing_container_and_serverless(aws: Aws, mode: str) -> None:
    name = configure(aws, f"fault-{mode}", "v1")
    aws.faults.fail_endpoint(f"fault-{mode}", mode=mode, count=1)
    aws.sagemaker.create_endpoint(EndpointName=f"fault-{mode}", EndpointConfigName=name)
    assert "ping health check" in settled(aws, f"fault-{mode}")["FailureReason"]
    serverless = {
        "VariantName": "All", "ModelName": name, "ServerlessConfig": {"MemorySizeInMB": 1024, "MaxConcurrency": 1},
    }  # fmt: skip
    aws.sagemaker.create_endpoint_config(EndpointConfigName=f"less-{mode}", ProductionVariants=[serverless])
    aws.sagemaker.create_endpoint(EndpointName=f"less-{mode}", EndpointConfigName=f"less-{mode}")
    assert settled(aws, f"less-{mode}")["EndpointStatus"] == "InService"
    assert invoke(aws, f"less-{mode}") == "v1:3"


def test_archive_that_would_leave_the_model_directory(aws: Aws) -> None:
    name = configure(aws, "evil", "v1")
    aws.put("evil/model.tar.gz", archive("x", "../../evil.py"))
    aws.sagemaker.create_endpoint(EndpointName="evil", EndpointConfigName=name)
    done = settled(aws, "evil")
    assert done["EndpointStatus"] == "Failed"
    assert "outside the destination" in done["FailureReason"]
