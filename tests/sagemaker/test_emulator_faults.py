"""Faults on demand, by Python and by HTTP."""

import json
import time
import urllib.error
import urllib.request
from typing import Any

import pytest
from botocore.config import Config

from tests.sagemaker_emulator.testing import Aws
from tests.waiting import until

NO_RETRY = Config(retries={"total_max_attempts": 1})

LOOK = """
import json, socket, time
config = json.load(open("/opt/ml/input/config/resourceconfig.json"))
def known(name):
    try: return bool(socket.gethostbyname(name))
    except OSError: return False
first = [known(h) for h in config["hosts"]]
begun = time.time()
while not all(map(known, config["hosts"])) and time.time() - begun < 20: time.sleep(0.1)
print(json.dumps({"first": first, "waited": time.time() - begun}))
"""
SLEEP = """
import json, time, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
config = json.load(open("/opt/ml/input/config/resourceconfig.json"))
print("up", flush=True)
time.sleep(0.8 if config["current_host"] == "algo-1" else 60)
"""


def admin(aws: Aws, method: str, body: dict[str, Any] | None = None, query: str = "") -> Any:
    request = urllib.request.Request(
        f"{aws.emulator.endpoint_url}/_emulator/faults{query}",
        json.dumps(body).encode() if body else None,
        method=method,
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.loads(answer.read())


def test_throttling_by_count_time_service_and_http(aws: Aws) -> None:
    sagemaker = aws.client("sagemaker", config=NO_RETRY)
    aws.faults.throttle("ListTrainingJobs", count=2)
    for _ in range(2):
        with pytest.raises(sagemaker.exceptions.ClientError, match="ThrottlingException"):
            sagemaker.list_training_jobs()
    sagemaker.list_training_jobs()
    fault = admin(aws, "POST", {"kind": "throttle", "operations": ["logs:*", "s3:*"], "seconds": 30})
    with pytest.raises(sagemaker.exceptions.ClientError, match="ThrottlingException"):
        aws.client("logs", config=NO_RETRY).describe_log_groups()
    with pytest.raises(sagemaker.exceptions.ClientError, match="SlowDown"):
        aws.client("s3", config=NO_RETRY).list_buckets()
    sagemaker.list_training_jobs()
    assert [f["kind"] for f in admin(aws, "GET")["faults"]] == ["throttle"]
    admin(aws, "DELETE", query=f"?id={fault['id']}")
    assert admin(aws, "GET")["faults"] == []
    aws.faults.throttle("*", seconds=1)
    with pytest.raises(sagemaker.exceptions.ClientError, match="ThrottlingException"):
        sagemaker.describe_training_job(TrainingJobName="x")
    time.sleep(1.1)
    sagemaker.list_training_jobs()


def test_delayed_response(aws: Aws) -> None:
    aws.faults.delay_response("ListModels", after=0.5, count=1)
    begun = time.monotonic()
    aws.sagemaker.list_models()
    assert time.monotonic() - begun >= 0.5
    assert aws.faults.active() == []


def test_delayed_dns(aws: Aws) -> None:
    aws.faults.delay_dns("algo-1", after=2.5, job="late-*")
    assert aws.train("late-dns", LOOK, 2)["TrainingJobStatus"] == "Completed"
    logs = {host: json.loads(lines[0]) for host, lines in aws.logs("late-dns").items()}
    assert logs["algo-1"]["first"] == [True, True]
    assert logs["algo-2"]["first"] == [False, True]
    assert 0 < logs["algo-2"]["waited"] < 10


def test_host_never_starts(aws: Aws) -> None:
    aws.faults.host_never_starts("algo-2", job="absent")
    done = aws.train("absent", "print('alone')", 2)
    assert done["TrainingJobStatus"] == "Failed"
    assert done["FailureReason"].startswith("InternalServerError")
    assert list(aws.logs("absent")) == ["algo-1"]


def test_retry_after_an_internal_error(aws: Aws) -> None:
    aws.faults.host_never_starts("algo-1", job="again", count=1)
    done = aws.train("again", "", RetryStrategy={"MaximumRetryAttempts": 1})
    assert done["TrainingJobStatus"] == "Completed"
    assert "Restarting" in [t["Status"] for t in done["SecondaryStatusTransitions"]]


def test_killed_host_fails_the_job(aws: Aws) -> None:
    aws.train("killed", SLEEP, 2, wait=False)
    until(lambda: len(aws.logs("killed")) == 2)
    admin(aws, "POST", {"kind": "kill_host", "job": "killed", "host": "algo-2"})
    done = aws.await_training("killed")
    assert done["FailureReason"] == "AlgorithmError: , exit code: 137"


def test_killed_host_that_the_platform_does_not_notice(aws: Aws) -> None:
    aws.faults.kill_host("unnoticed", "algo-2", after=0.2, noticed=False)
    assert aws.train("unnoticed", SLEEP, 2)["TrainingJobStatus"] == "Completed"


def test_slow_logs(aws: Aws) -> None:
    aws.faults.slow_logs(after=3, job="slow-logs")
    aws.train("slow-logs", "print('late')")
    assert aws.logs("slow-logs") == {}
    assert until(lambda: aws.logs("slow-logs"))["algo-1"] == ["late"]


def test_unknown_fault_is_refused(aws: Aws) -> None:
    with pytest.raises(ValueError, match="no fault of kind"):
        aws.faults.add("earthquake")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        admin(aws, "POST", {"kind": "throttle", "colour": "red"})
