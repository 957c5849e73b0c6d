"""`PipesSageMakerClient` against jobs that really run."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest

from resources.aws.request_validation import InvalidJobRequest
from resources.sagemaker.pipes_client import PipesSageMakerClient
from tests.sagemaker.pipes_child import asset_on
from tests.sagemaker.pipes_jobs import FAST, processing_request, training_request
from tests.waiting import until

if TYPE_CHECKING:
    from tests.sagemaker_emulator.testing import Aws

ROOT = Path(__file__).parents[2]
REPORT = """
print("hello from", host, flush=True)
if host == "algo-1":
    with pipes() as context:
        context.log.info("a message of run " + context.run_id)
        context.report_asset_materialization(metadata={"rows": 3}, data_version="v7")
print("bye from", host)
"""
WAIT = """
with pipes() as context:
    context.log.info("waiting for the word")
    print("waits", flush=True)
    bucket = os.environ["WORD_BUCKET"]
    while "Contents" not in boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix="go"):
        time.sleep(0.1)
"""
Make = Callable[..., dict[str, Any]]
KINDS = {"training": training_request, "processing": processing_request}


class Materialized:
    """A finished run: success, log lines, metadata, error."""

    def __init__(self, asset: dg.AssetsDefinition, **options: Any) -> None:
        with dg.DagsterInstance.ephemeral() as instance:
            self.result = dg.materialize([asset], instance=instance, raise_on_error=False, **options)
            self.success = self.result.success
            records = instance.all_logs(self.result.run_id)
            self.log = [r.user_message for r in records if not r.is_dagster_event]
        self.run_id = self.result.run_id
        self.text = "\n".join(self.log)
        self.error = ""
        for event in self.result.all_events:
            if event.is_step_failure:
                self.failure = event.step_failure_data
                error = self.failure.error
                self.error = error.to_string() if error else ""

    def metadata(self, step: str) -> dict[str, Any]:
        values = self.result.asset_materializations_for_node(step)[0].metadata
        return {
            name: value.records if isinstance(value, dg.TableMetadataValue) else value.value
            for name, value in values.items()
        }


@pytest.fixture
def client(aws: "Aws", aws_environment: Any) -> PipesSageMakerClient:
    return PipesSageMakerClient(aws.uri("jobs"), polling=FAST, price_per_hour=0.25)


def jobs(aws: "Aws", kind: str, name: str = "dagster-tuned") -> list[tuple[str, str]]:
    """Names and statuses of the jobs whose name contains `name`, oldest first, of this test's bucket."""
    noun = {"training": "Training", "processing": "Processing"}[kind]
    listing = getattr(aws.sagemaker, f"list_{kind}_jobs")(NameContains=name, SortOrder="Ascending", MaxResults=100)
    found = []
    for summary in listing[f"{noun}JobSummaries"]:
        job = getattr(aws.sagemaker, f"describe_{kind}_job")(**{f"{noun}JobName": summary[f"{noun}JobName"]})
        if aws.bucket in json.dumps(job, default=str):
            found.append((summary[f"{noun}JobName"], summary[f"{noun}JobStatus"]))
    return found


@contextmanager
def dagster_process(aws: "Aws", params: dict[str, Any], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that materializes `tuned`. It is killed at the end of the block if it is still there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.sagemaker.pipes_child"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"job_root": aws.uri("jobs"), "params": params, **options}).encode())
        process.stdin.close()
        yield process
    finally:
        process.kill()
        process.wait()


def until_the_job_speaks(aws: "Aws") -> None:
    """Wait for the first message of a job."""
    until(lambda: any("messages/1.json" in key for key in aws.keys("jobs/")))


@pytest.mark.parametrize("kind", KINDS)
def test_success_with_logs_of_both_hosts_metadata_and_tags(aws: "Aws", client: PipesSageMakerClient, kind: str) -> None:
    params = KINDS[kind](aws, REPORT, 2, Environment={"COLOUR": "red"}, Tags=[{"Key": "cost", "Value": "x;y"}])
    before = copy.deepcopy(params)
    run = Materialized(asset_on(client, params))
    assert run.success, run.error
    assert params == before
    for host in ("algo-1", "algo-2"):
        assert f"[{host}] hello from {host}" in run.text
        assert f"[{host}] bye from {host}" in run.text
    assert run.log.count(f"a message of run {run.run_id}") == 1
    assert "SageMaker: " in run.text
    metadata = run.metadata("tuned")
    [(name, status)] = jobs(aws, kind)
    assert status == "Completed"
    assert metadata["rows"] == 3
    assert metadata["sagemaker_job"] == name
    assert name in metadata["sagemaker_job_arn"]
    assert metadata.keys().isdisjoint({"console", "logs"}), "an emulated job has no pages in the console"
    assert (metadata["instance_type"], metadata["instance_count"]) == ("ml.m5.xlarge", 2)
    assert metadata["billable_seconds"] > 0
    cost = 0.25 * 2 * metadata["billable_seconds"] / 3600
    assert metadata["estimated_cost"] == pytest.approx(cost, abs=1e-3)
    assert [row.data["status"] for row in metadata["status_history"]][-1] == "Completed"
    tags = aws.sagemaker.list_tags(ResourceArn=metadata["sagemaker_job_arn"])["Tags"]
    found = {tag["Key"]: tag["Value"] for tag in tags}
    assert found["dagster/run_id"] == run.run_id
    assert found["dagster/asset"] == "tuned"
    assert found["dagster/owner"] == "team:ml"
    assert found["cost"] == "x_y"
    assert not [key for key in aws.keys("jobs/") if key.endswith("lease.json")]


def test_a_failing_script_fails_with_reason_host_and_log_tail(aws: "Aws", client: PipesSageMakerClient) -> None:
    script = """
print("starts on", host, flush=True)
if host == "algo-2":
    print("reads rows", flush=True)
    open("/opt/ml/output/failure", "w").write("column PRICE is empty")
    raise ValueError("no price in any row")
time.sleep(30)
"""
    params = training_request(aws, script, 2)
    raised: list[dg.Failure] = []

    @dg.asset
    def tuned(context: dg.AssetExecutionContext) -> None:
        try:
            client.run(context=context, params=params)
        except dg.Failure as failure:
            raised.append(failure)
            raise

    assert not Materialized(tuned).success
    text = raised[0].description or ""
    [(name, status)] = jobs(aws, "training")
    assert status == "Failed"
    for part in (name, "column PRICE is empty", "log lines of algo-2", "ValueError: no price in any row",
                 "What to do"):  # fmt: skip
        assert part in text, text
    assert "#/jobs/" not in text, "the console knows nothing of a job that did not run on AWS"
    assert not raised[0].allow_retries
    assert raised[0].metadata["failing_host"].value == "algo-2"


def test_a_failed_job_is_followed_by_an_attempt_of_its_own(aws: "Aws", client: PipesSageMakerClient) -> None:
    params = training_request(aws, _FAIL_ONCE, 1, Environment=_word(aws))

    @dg.asset
    def tuned(context: dg.AssetExecutionContext) -> Any:
        with pytest.raises(dg.Failure):
            client.run(context=context, params=params)
        aws.put("go", "")
        client.run(context=context, params=params)
        # The third call finds the work done.
        return client.run(context=context, params=params).get_materialize_result()

    run = Materialized(tuned)
    assert run.success, run.error
    (first, status), (second, status_of_second) = jobs(aws, "training")
    assert (second, status, status_of_second) == (f"{first}-2", "Failed", "Completed")
    assert f"Attached to training job {second}, which is Completed" in run.text


_FAIL_ONCE = """
if "Contents" not in boto3.client("s3").list_objects_v2(Bucket=os.environ["WORD_BUCKET"], Prefix="go"):
    sys.exit(3)
with pipes() as context:
    pass
"""


def _word(aws: "Aws") -> dict[str, str]:
    return {"WORD_BUCKET": aws.bucket}


@pytest.mark.parametrize("kind", KINDS)
def test_termination_stops_the_job_within_seconds(aws: "Aws", aws_environment: Any, kind: str) -> None:
    params = KINDS[kind](aws, WAIT, 1, Environment=_word(aws))
    with dagster_process(aws, params) as process:
        until_the_job_speaks(aws)
        process.send_signal(signal.SIGTERM)
        until(lambda: [s for _, s in jobs(aws, kind)] == ["Stopped"])
        assert process.wait(30) != 0


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_killed_dagster_process_the_next_run_attaches_to_the_job(
    aws: "Aws", client: PipesSageMakerClient, kind: str
) -> None:
    params = KINDS[kind](aws, WAIT, 1, Environment=_word(aws))
    with dagster_process(aws, params) as process:
        until_the_job_speaks(aws)
        process.kill()
        process.wait()
    [(name, status)] = jobs(aws, kind)
    assert status == "InProgress"
    threading.Timer(2.0, aws.put, ("go", "")).start()
    run = Materialized(asset_on(client, params))
    assert run.success, run.error
    assert jobs(aws, kind) == [(name, "Completed")]
    assert f"Attached to {kind} job {name}" in run.text
    assert run.log.count("waiting for the word") == 1
    assert "[algo-1] waits" in run.text


def test_work_that_a_living_run_attends_to_is_not_taken_over(aws: "Aws", client: PipesSageMakerClient) -> None:
    params = training_request(aws, WAIT, 1, Environment=_word(aws))
    with dagster_process(aws, params) as process:
        until_the_job_speaks(aws)
        threading.Timer(4.0, aws.put, ("go", "")).start()
        run = Materialized(asset_on(client, params))
        assert process.wait(90) == 0
    assert run.success, run.error
    assert [status for _, status in jobs(aws, "training")] == ["Completed", "Completed"]


def test_a_detached_job_runs_on(aws: "Aws", client: PipesSageMakerClient) -> None:
    params = processing_request(aws, WAIT, 1, Environment=_word(aws))
    with dagster_process(aws, params, detach=True) as process:
        until_the_job_speaks(aws)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert [status for _, status in jobs(aws, "processing")] == ["InProgress"]
    aws.put("go", "")
    assert Materialized(asset_on(client, params)).success
    assert [status for _, status in jobs(aws, "processing")] == ["Completed"]


def test_two_jobs_at_once_do_not_mix_their_messages(aws: "Aws", client: PipesSageMakerClient) -> None:
    script = """
with pipes() as context:
    for number in range(5):
        context.log.info(f"{os.environ['COLOUR']} {number}")
        time.sleep(0.2)
    context.report_asset_materialization(metadata={"colour": os.environ["COLOUR"]})
"""
    runs: dict[str, Materialized] = {}

    def materialize(colour: str) -> None:
        params = training_request(aws, script, 1, Environment={"COLOUR": colour})
        runs[colour] = Materialized(asset_on(client, params))

    threads = [threading.Thread(target=materialize, args=(colour,)) for colour in ("red", "blue")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for colour, run in runs.items():
        assert run.success, run.error
        assert run.metadata("tuned")["colour"] == colour
        assert [line for line in run.log if line[:-2] in ("red", "blue")] == [f"{colour} {n}" for n in range(5)]


def test_a_job_that_ends_without_closing_its_session_fails(aws: "Aws", client: PipesSageMakerClient) -> None:
    script = """
context = pipes()
context.log.info("here")
time.sleep(2)
os._exit(0)
"""
    run = Materialized(asset_on(client, processing_request(aws, script)))
    assert not run.success
    assert "never closed its Pipes session" in run.error
    assert run.log.count("here") == 1
    assert [status for _, status in jobs(aws, "processing")] == ["Completed"]


def test_a_message_that_arrives_after_the_end_is_not_lost(aws: "Aws", aws_environment: Any) -> None:
    client = PipesSageMakerClient(aws.uri("jobs"), polling=replace(FAST, drain=25.0))
    script = """
context = pipes()
context.log.info("early")
time.sleep(1.5)
os._exit(0)
"""
    params = training_request(aws, script)

    def deliver_late() -> None:
        until(lambda: [status for _, status in jobs(aws, "training")] == ["Completed"])
        time.sleep(1.0)
        messages = [
            {"method": "log", "params": {"message": "late", "level": "INFO"}},
            {"method": "closed", "params": {}},
        ]
        lines = [json.dumps({"__dagster_pipes_version": "0.1", **message}) for message in messages]
        [last] = [key for key in aws.keys("jobs/") if key.endswith("messages/1.json")]
        aws.put(last.replace("/1.json", "/2.json"), "\n".join(lines))

    courier = threading.Thread(target=deliver_late)
    courier.start()
    run = Materialized(asset_on(client, params))
    courier.join()
    assert run.success, run.error
    assert [line for line in run.log if line in ("early", "late")] == ["early", "late"]


def test_a_message_that_cannot_be_handled_stops_the_job(aws: "Aws", client: PipesSageMakerClient) -> None:
    script = """
context = pipes()
context._write_message("no_such_method", {})
time.sleep(60)
"""
    run = Materialized(asset_on(client, training_request(aws, script)))
    assert not run.success
    assert "Unknown message method" in run.error
    until(lambda: [status for _, status in jobs(aws, "training")] == ["Stopped"])


@pytest.mark.slow
def test_throttling_on_every_call_is_survived(aws: "Aws", client: PipesSageMakerClient) -> None:
    params = processing_request(aws, "with pipes() as context:\n    print('line', flush=True)\n    time.sleep(3)\n")
    aws.faults.throttle("*", "*:*", seconds=20)

    def throttle_again() -> None:
        until_the_job_speaks(aws)
        aws.faults.throttle("*", "*:*", seconds=4)

    threading.Timer(21.0, throttle_again).start()
    run = Materialized(asset_on(client, params))
    assert run.success, run.error
    assert "throttles" in run.text
    assert "[algo-1] line" in run.text


def test_wrong_requests_are_errors_before_anything_is_sent(aws: "Aws", client: PipesSageMakerClient) -> None:
    params = processing_request(aws, REPORT, Environment={"DATA_URI": "x" * 257})
    params["ProcessingResources"]["ClusterConfig"]["InstanceType"] = "ml.m5.tiny"
    run = Materialized(asset_on(client, params))
    assert not run.success
    assert InvalidJobRequest.__name__ in run.error
    assert "Environment['DATA_URI'] has 257 characters; CreateProcessingJob allows at most 256" in run.error
    assert "'ml.m5.tiny'; it must be one of ml.m5" in run.error
    assert jobs(aws, "processing") == []
    assert aws.keys("jobs/") == []
