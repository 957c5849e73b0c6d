"""Processing jobs that really run: inputs, outputs, hosts, messages, stopping."""

import json
from typing import Any

import pytest

from tests.sagemaker_emulator.testing import Aws, processing_input
from tests.waiting import until


def output(name: str, uri: str, mode: str = "EndOfJob") -> dict[str, Any]:
    return {
        "OutputName": name,
        "S3Output": {"S3Uri": uri, "LocalPath": f"/opt/ml/processing/{name}", "S3UploadMode": mode},
    }


def test_inputs_outputs_and_configuration(aws: Aws) -> None:

    script = """
import json, os, sys
resources = json.load(open("/opt/ml/config/resourceconfig.json"))
job = json.load(open("/opt/ml/config/processingjobconfig.json"))
host = resources["current_host"]
rows = [open("/opt/ml/processing/data/" + f).read() for f in sorted(os.listdir("/opt/ml/processing/data"))]
json.dump({"rows": rows, "colour": os.environ["COLOUR"], "argv": sys.argv[1:], "name": job["ProcessingJobName"],
           "hosts": resources["hosts"]}, open(f"/opt/ml/processing/result/{host}.json", "w"))
open("/opt/ml/output/message", "w").write("all well")
"""
    for part in "abc":
        aws.put(f"data/{part}.csv", part)
    done = aws.process(
        "process",
        script,
        hosts=2,
        Environment={"COLOUR": "red"},
        ProcessingInputs=[processing_input("data", aws.uri("data/"), S3DataDistributionType="ShardedByS3Key")],
        ProcessingOutputConfig={"Outputs": [output("result", aws.uri("result"))]},
    )
    assert done["ProcessingJobStatus"] == "Completed", done
    assert done["ExitMessage"] == "all well"
    assert done["ProcessingStartTime"] <= done["ProcessingEndTime"]
    results = [json.loads(aws.get(f"result/algo-{n}.json")) for n in (1, 2)]
    assert [r["rows"] for r in results] == [["a", "c"], ["b"]]
    assert results[0]["name"] == "process"
    assert results[0]["hosts"] == ["algo-1", "algo-2"]
    assert results[0]["colour"] == "red"


def test_arguments_continuous_output_and_stop(aws: Aws) -> None:
    script = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
open("/opt/ml/processing/live/early", "w").write(" ".join(sys.argv[1:]))
print("waiting", flush=True)
while True: time.sleep(0.05)
"""
    aws.process(
        "live-output",
        script,
        wait=False,
        AppSpecification={
            "ImageUri": "any",
            "ContainerEntrypoint": ["python3", "/opt/ml/processing/code/job.py"],
            "ContainerArguments": ["--rows", "3"],
        },
        ProcessingOutputConfig={"Outputs": [output("live", aws.uri("live"), "Continuous")]},
    )
    until(lambda: aws.keys("live/"))
    assert aws.get("live/early") == b"--rows 3"
    assert aws.logs("live-output", "ProcessingJobs") == {"algo-1": ["waiting"]}
    aws.sagemaker.stop_processing_job(ProcessingJobName="live-output")
    assert aws.await_processing("live-output")["ProcessingJobStatus"] == "Stopped"


def test_failure_uploads_nothing(aws: Aws) -> None:
    script = "open('/opt/ml/processing/result/x', 'w').write('x')\nprint('about to fail')\nraise SystemExit(4)"
    done = aws.process("broken", script, ProcessingOutputConfig={"Outputs": [output("result", aws.uri("broken"))]})
    assert done["ProcessingJobStatus"] == "Failed"
    assert done["FailureReason"].endswith("exit code: 4")
    assert aws.keys("broken/") == []
    summaries = aws.sagemaker.list_processing_jobs(StatusEquals="Failed", NameContains="broken")
    assert [s["ProcessingJobName"] for s in summaries["ProcessingJobSummaries"]] == ["broken"]


def test_run_time_limit_and_paths(aws: Aws) -> None:

    done = aws.process("slow", "import time; time.sleep(60)", StoppingCondition={"MaxRuntimeInSeconds": 1})
    assert done["ProcessingJobStatus"] == "Stopped"
    bad = processing_input("etc", aws.uri("data/"), LocalPath="/etc")
    with pytest.raises(aws.sagemaker.exceptions.ClientError, match="must be /opt/ml/processing or a path below"):
        aws.process("path", "", ProcessingInputs=[bad])
