"""Training jobs that really run: files, hosts, statuses, artifacts, logs, stopping, spot."""

import io
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.sagemaker_emulator.testing import Aws, channel
from tests.waiting import until

SHOW = """
import json, os, socket
config = json.load(open("/opt/ml/input/config/resourceconfig.json"))
names = {h: socket.gethostbyname(h) for h in config["hosts"]}
print(json.dumps({"config": config, "names": names, "hostname": socket.gethostname(), "pid": os.getpid(),
                  "environment": dict(os.environ)}))
"""
MEET = (
    SHOW
    + """
import threading, time
server = socket.create_server(("0.0.0.0", 7000))
def greet():
    while True:
        connection, peer = server.accept()
        connection.sendall(socket.gethostname().encode())
        connection.close()
threading.Thread(target=greet, daemon=True).start()
met = {}
deadline = time.time() + 20
while len(met) < len(names) and time.time() < deadline:
    for host, address in names.items():
        try:
            with socket.create_connection((host, 7000), 1) as connection:
                met[host] = connection.recv(100).decode()
        except OSError:
            time.sleep(0.05)
print("met", json.dumps(met, sort_keys=True))
time.sleep(1)
open("/opt/ml/model/" + config["current_host"], "w").write("x")
"""
)


def members(archive: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return sorted(opened.getnames())


def test_one_host_completes_with_every_file_in_place(aws: Aws) -> None:
    script = """
import json, os
base = "/opt/ml/input/config/"
print(json.dumps({f: json.load(open(base + f)) for f in sorted(os.listdir(base))}))
print("data", sorted(os.listdir("/opt/ml/input/data/train")), open("/opt/ml/input/data/train/a/b.csv").read())
print("rmse=3.5;"); print("rmse=2.25;")
os.makedirs("/opt/ml/model/sub")
open("/opt/ml/model/sub/model.json", "w").write("{}")
open("/opt/ml/output/data/plot.txt", "w").write("plot")
open("/tmp/private", "w").write("x"); open("/dev/shm/private", "w").write("x"); open("/etc/private", "w").write("x")
"""
    aws.put("train/a/b.csv", "1,2")
    request = aws.training_request("files", script, HyperParameters={"eta": "0.1"}, Environment={"COLOUR": "red"})
    request["InputDataConfig"].append(
        {
            "ChannelName": "train",
            "ContentType": "text/csv",
            "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": aws.uri("train")}},
        }
    )
    request["AlgorithmSpecification"]["MetricDefinitions"] = [{"Name": "rmse", "Regex": "rmse=(.*?);"}]
    request["Tags"] = [{"Key": "owner", "Value": "tests"}]
    created = aws.sagemaker.create_training_job(**request)
    done = aws.await_training("files")
    assert done["TrainingJobStatus"] == done["SecondaryStatus"] == "Completed"
    transitions = done["SecondaryStatusTransitions"]
    assert [t["Status"] for t in transitions] == ["Starting", "Downloading", "Training", "Uploading", "Completed"]
    assert all(t["StartTime"] <= t["EndTime"] for t in transitions)
    assert done["TrainingStartTime"] <= done["TrainingEndTime"]
    assert done["BillableTimeInSeconds"] == done["TrainingTimeInSeconds"] >= 1
    assert {m["MetricName"]: m["Value"] for m in done["FinalMetricDataList"]} == {"rmse": 2.25}
    files, data, *_ = aws.logs("files")["algo-1"]
    seen = json.loads(files)
    assert seen["hyperparameters.json"] == {"eta": "0.1"}
    assert seen["inputdataconfig.json"]["train"] == {
        "TrainingInputMode": "File",
        "S3DistributionType": "FullyReplicated",
        "RecordWrapperType": "None",
        "ContentType": "text/csv",
    }
    assert seen["resourceconfig.json"]["hosts"] == ["algo-1"]
    assert data == "data ['a'] 1,2"
    assert done["ModelArtifacts"]["S3ModelArtifacts"] == aws.uri("out/files/output/model.tar.gz")
    assert "sub/model.json" in members(aws.get("out/files/output/model.tar.gz"))
    assert members(aws.get("out/files/output/output.tar.gz")) == ["plot.txt"]
    tags = aws.sagemaker.list_tags(ResourceArn=created["TrainingJobArn"])["Tags"]
    assert tags == [{"Key": "owner", "Value": "tests"}]


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_have_own_addresses_and_reach_each_other(aws: Aws, hosts: int) -> None:
    name = f"meet-{hosts}"
    done = aws.train(name, MEET, hosts)
    assert done["TrainingJobStatus"] == "Completed", done.get("FailureReason")
    names = [f"algo-{n + 1}" for n in range(hosts)]
    logs = aws.logs(name)
    assert sorted(logs) == names
    reports = {host: json.loads(lines[0]) for host, lines in logs.items()}
    for host, report in reports.items():
        assert report["hostname"] == report["config"]["current_host"] == host
        assert report["environment"]["TRAINING_JOB_NAME"] == name
        assert json.loads(logs[host][1].removeprefix("met ")) == {n: n for n in names}
    assert len({report["names"][host] for host, report in reports.items()}) == hosts
    assert members(aws.get(f"out/{name}/output/model.tar.gz")) == names


def test_eleven_hosts_are_listed_in_text_order(aws: Aws) -> None:
    assert aws.train("eleven", SHOW, 11)["TrainingJobStatus"] == "Completed"
    logs = aws.logs("eleven")
    report = json.loads(logs["algo-11"][0])
    order = ["algo-1", "algo-10", "algo-11", *(f"algo-{n}" for n in range(2, 10))]
    assert report["config"]["hosts"] == order
    assert len(set(report["names"].values())) == len(logs) == 11


def test_heterogeneous_groups(aws: Aws) -> None:
    request = aws.training_request("mixed", SHOW)
    group = {"VolumeSizeInGB": 10, "InstanceGroups": [
        {"InstanceGroupName": "head", "InstanceType": "ml.m5.xlarge", "InstanceCount": 1},
        {"InstanceGroupName": "workers", "InstanceType": "ml.c5.xlarge", "InstanceCount": 2},
    ]}  # fmt: skip
    aws.sagemaker.create_training_job(**{**request, "ResourceConfig": group})
    assert aws.await_training("mixed")["TrainingJobStatus"] == "Completed"
    config = json.loads(aws.logs("mixed")["algo-3"][0])["config"]
    assert config["current_group_name"] == "workers"
    assert config["current_instance_type"] == "ml.c5.xlarge"
    assert config["instance_groups"][1] == {
        "instance_group_name": "workers", "instance_type": "ml.c5.xlarge", "hosts": ["algo-2", "algo-3"],
    }  # fmt: skip


def test_failure_file_becomes_the_reason(aws: Aws) -> None:
    script = "import sys; open('/opt/ml/output/failure', 'w').write('boom ' * 500); sys.exit(3)"
    done = aws.train("fails", script, 2)
    assert done["TrainingJobStatus"] == done["SecondaryStatus"] == "Failed"
    assert done["FailureReason"].startswith("AlgorithmError: boom boom")
    assert len(done["FailureReason"]) == 1024
    assert aws.keys("out/fails/") == []


def test_one_failing_host_ends_the_others(aws: Aws) -> None:
    script = SHOW + "import time\nif config['current_host'] == 'algo-2': raise SystemExit(7)\ntime.sleep(60)"
    begun = time.monotonic()
    done = aws.train("one-fails", script, 2)
    assert done["FailureReason"] == "AlgorithmError: , exit code: 7"
    assert time.monotonic() - begun < 15


def test_missing_input_and_missing_command_fail_with_a_reason(aws: Aws) -> None:

    request = aws.training_request("no-data", "")
    request["InputDataConfig"].append(channel("train", aws.uri("nothing-here")))
    aws.sagemaker.create_training_job(**request)
    assert "No S3 objects found under S3 URL" in aws.await_training("no-data")["FailureReason"]
    request = aws.training_request("no-command", "")
    del request["AlgorithmSpecification"]["ContainerEntrypoint"]
    aws.sagemaker.create_training_job(**request)
    assert aws.await_training("no-command")["FailureReason"] == "AlgorithmError: , exit code: 127"
    assert aws.logs("no-command")["algo-1"] == ["exec train: No such file or directory"]


def test_logs_arrive_while_the_job_runs_and_sharded_input(aws: Aws) -> None:

    script = SHOW + (
        "import time\nprint('files', sorted(os.listdir('/opt/ml/input/data/train')), flush=True)\n"
        "while not os.path.exists('/opt/ml/stop'): time.sleep(0.1)"
    )
    for part in range(4):
        aws.put(f"parts/{part}.csv", "x")
    request = aws.training_request("live", script, 2)
    request["InputDataConfig"].append(channel("train", aws.uri("parts/"), S3DataDistributionType="ShardedByS3Key"))
    aws.sagemaker.create_training_job(**request)
    lines = until(lambda: len(found := aws.logs("live")) == 2 and all(len(v) == 2 for v in found.values()) and found)
    assert aws.describe_training("live")["SecondaryStatus"] == "Training"
    assert {host: seen[1] for host, seen in lines.items()} == {
        "algo-1": "files ['0.csv', '2.csv']", "algo-2": "files ['1.csv', '3.csv']",
    }  # fmt: skip
    aws.sagemaker.stop_training_job(TrainingJobName="live")
    assert aws.await_training("live")["TrainingJobStatus"] == "Stopped"


STUBBORN = """
import signal, sys, time
def leave(number, frame):
    print("got SIGTERM", flush=True)
    open("/opt/ml/model/checkpoint", "w").write("x")
    if {obey}: sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
while True: time.sleep(0.05)
"""


@pytest.mark.parametrize("obey", [True, False])
def test_stop_is_sigterm_then_sigkill(aws: Aws, obey: bool) -> None:
    name = f"stop-{'obey' if obey else 'kill'}"
    aws.train(name, STUBBORN.format(obey=obey), wait=False)
    until(lambda: aws.logs(name).get("algo-1") == ["ready"])
    begun = time.monotonic()
    aws.sagemaker.stop_training_job(TrainingJobName=name)
    assert aws.describe_training(name)["TrainingJobStatus"] in ("Stopping", "Stopped")
    done = aws.await_training(name)
    assert done["TrainingJobStatus"] == done["SecondaryStatus"] == "Stopped"
    assert "Stopping" in [t["Status"] for t in done["SecondaryStatusTransitions"]]
    assert aws.logs(name)["algo-1"] == ["ready", "got SIGTERM"]
    assert members(aws.get(f"out/{name}/output/model.tar.gz")) == ["checkpoint"]
    assert (time.monotonic() - begun < 2.9) == obey
    with pytest.raises(aws.sagemaker.exceptions.ClientError, match="is in status Stopped"):
        aws.sagemaker.stop_training_job(TrainingJobName=name)


def test_maximum_run_time(aws: Aws) -> None:
    done = aws.train("too-long", STUBBORN.format(obey=True), StoppingCondition={"MaxRuntimeInSeconds": 1})
    assert (done["TrainingJobStatus"], done["SecondaryStatus"]) == ("Stopped", "MaxRuntimeExceeded")


SPOT = """
import glob, signal, sys, time
def leave(number, frame):
    open("/opt/ml/checkpoints/last", "w").write("written at SIGTERM")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
found = sorted(open(f).read() for f in glob.glob("/opt/ml/checkpoints/*"))
print("found", found, flush=True)
if found: sys.exit(0)
open("/opt/ml/checkpoints/first", "w").write("written early")
print("ready", flush=True)
while True: time.sleep(0.05)
"""


def spot_request(aws: Aws, name: str) -> dict[str, Any]:
    return aws.training_request(
        name,
        SPOT,
        EnableManagedSpotTraining=True,
        CheckpointConfig={"S3Uri": aws.uri(f"checkpoints/{name}")},
        StoppingCondition={"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 120},
    )


def test_spot_interruption_restores_the_checkpoint(aws: Aws) -> None:
    aws.sagemaker.create_training_job(**spot_request(aws, "spot"))
    until(lambda: "checkpoints/spot/first" in aws.keys("checkpoints/"))
    assert aws.describe_training("spot")["TrainingJobStatus"] == "InProgress"
    aws.faults.interrupt_spot("spot")
    done = aws.await_training("spot")
    assert done["TrainingJobStatus"] == "Completed"
    assert [t["Status"] for t in done["SecondaryStatusTransitions"]] == [
        "Starting", "Downloading", "Training", "Interrupted", "Starting", "Downloading", "Training", "Uploading",
        "Completed",
    ]  # fmt: skip
    assert aws.logs("spot")["algo-1"] == ["found []", "ready", "found ['written at SIGTERM', 'written early']"]
    assert done["BillableTimeInSeconds"] < done["TrainingTimeInSeconds"] or done["TrainingTimeInSeconds"] == 1


def test_maximum_wait_time(aws: Aws) -> None:
    limits = {"MaxRuntimeInSeconds": 1, "MaxWaitTimeInSeconds": 1}
    aws.faults.interrupt_spot("waited", after=0.7)
    aws.sagemaker.create_training_job(**{**spot_request(aws, "waited"), "StoppingCondition": limits})
    done = aws.await_training("waited")
    assert (done["TrainingJobStatus"], done["SecondaryStatus"]) == ("Stopped", "MaxWaitTimeExceeded")


def test_uncompressed_model_and_own_checkpoint_path(aws: Aws) -> None:
    script = """
print(open("/var/checkpoints/old").read())
open("/var/checkpoints/new", "w").write("new"); open("/opt/ml/model/m.txt", "w").write("m")
"""
    aws.put("own/old", "old")
    done = aws.train(
        "plain",
        script,
        OutputDataConfig={"CompressionType": "NONE"},
        CheckpointConfig={"S3Uri": aws.uri("own"), "LocalPath": "/var/checkpoints"},
    )
    assert done["ModelArtifacts"]["S3ModelArtifacts"] == aws.uri("out/plain/output/model/")
    assert aws.get("out/plain/output/model/m.txt") == b"m"
    assert aws.get("own/new") == b"new"
    assert aws.logs("plain")["algo-1"] == ["old"]
    assert not Path("/var/checkpoints").exists()


def test_warm_pool_and_listing(aws: Aws) -> None:
    aws.train("list-a", "", ResourceConfig={"KeepAlivePeriodInSeconds": 600})
    aws.train("list-b", "raise SystemExit(1)")
    assert aws.describe_training("list-a")["WarmPoolStatus"]["Status"] == "Available"
    listed = aws.sagemaker.list_training_jobs
    names = [j["TrainingJobName"] for j in listed(NameContains="list-", SortBy="Name", SortOrder="Ascending")[
        "TrainingJobSummaries"]]  # fmt: skip
    assert names == ["list-a", "list-b"]
    assert [j["TrainingJobName"] for j in listed(NameContains="list-", StatusEquals="Failed")[
        "TrainingJobSummaries"]] == ["list-b"]  # fmt: skip
    pages = aws.sagemaker.get_paginator("list_training_jobs").paginate(
        NameContains="list-", PaginationConfig={"PageSize": 1}
    )
    assert sorted(j["TrainingJobName"] for page in pages for j in page["TrainingJobSummaries"]) == names
