"""The program that runs on every host of a job, on emulated hosts: real Ray, real processes, real network."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any

import pytest

from step_scripts.cluster.job import failure_from
from tests.sagemaker.ray_job import RayJob
from tests.sagemaker_emulator.probe import abilities

if TYPE_CHECKING:
    from tests.sagemaker_emulator.testing import Aws

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not abilities().namespaces, reason=f"needs hosts of their own: {abilities().reason}"),
]


def test_hosts_share_the_work_although_names_come_late(aws: Aws) -> None:
    with RayJob(aws, 2, tasks=2, signals="?") as job:
        names = {name: host.address for name, host in job.hosts.items()}
        for host in job.hosts.values():
            host.set_names({})
        job.start("algo-2")
        job.await_output("algo-2", "joins algo-1")
        job.start("algo-1")
        job.await_output("algo-1", "2 hosts, head")
        for host in job.hosts.values():
            host.set_names(names)
        assert sorted(job.await_tasks(2)) == job.names, "every host works"
        for name in job.names:
            assert job.processes(name, "raylet/raylet")
            for idle in ("log_monitor.py", "/monitor.py", "dashboard/dashboard.py", "ray.util.client"):
                assert not job.processes(name, idle), f"{idle} has nothing to do"
        job.release()
        assert job.statuses() == {"algo-1": 0, "algo-2": 0}
        result = job.result()
        assert result is not None
        assert result.nodes == sorted(names.values())
        assert set(result.details["addresses"]) == set(names.values())
        assert [job.failure(name) for name in job.names] == [None, None]
        pointer = json.loads((job.hosts["algo-1"].ml / "model" / "manifest.json").read_text())
        assert pointer["manifest_uri"] == job.request.manifest_uri


def test_one_host_of_a_processing_job_reports_to_dagster(aws: Aws) -> None:
    with RayJob(aws, 1, kind="processing", action="reject") as job:
        _open_pipes(job)
        job.start()
        assert job.statuses() == {"algo-1": 1}
        told = failure_from(job.failure("algo-1", "message") or "")
        assert told == {
            "kind": "input",
            "message": "file x.csv is bad: mend it",
            "details": {"bad_rows": [{"row": 1}]},
        }
        messages = _messages(job)
        assert messages[0]["method"] == "opened"
        assert messages[-1]["method"] == "closed"
        [custom] = [m["params"]["payload"] for m in messages if m["method"] == "report_custom_message"]
        assert custom["step_error"] == told
        logged = [m["params"]["message"] for m in messages if m["method"] == "log"]
        assert "probing reject" in logged
        assert any("Ray cluster of 1 hosts" in line for line in logged)
        assert job.outputs() == []


def test_fault_of_the_step_on_two_hosts(aws: Aws) -> None:
    with RayJob(aws, 2, action="raise") as job:
        # As after an interrupted attempt: the reader has seen these, and waits for the next number.
        earlier = [{"method": "opened"}, {"method": "log", "params": {"message": "earlier"}}]
        for number, message in enumerate(earlier, 1):
            job.put(f"messages/{number}.json", json.dumps(message))
        _open_pipes(job)
        job.start()
        assert job.statuses() == {"algo-1": 1, "algo-2": 1}
        for name in job.names:
            text = job.failure(name) or ""
            assert text.startswith("RuntimeError: a fault of the program\n")
            assert "cluster_probe_step.py" in text, "the end of the traceback"
            assert len(text) <= 1024
        messages = _messages(job)
        assert messages[:2] == earlier
        assert messages[2]["method"] == "opened"
        assert messages[-1]["method"] == "closed"
        [custom] = [m["params"]["payload"] for m in messages if m["method"] == "report_custom_message"]
        assert custom["step_error"]["kind"] == "crash"
        assert "RuntimeError" in custom["step_error"]["traceback"]
        assert job.outputs() == []


def test_killed_driver(aws: Aws) -> None:
    with RayJob(aws, 1, action="kill_driver") as job:
        job.start()
        assert job.statuses() == {"algo-1": 1}
        assert (job.failure("algo-1") or "").startswith("before the step had ended, its process was ended by SIGKILL")
        assert job.outputs() == []


def test_lost_worker_host_is_survived(aws: Aws) -> None:
    with RayJob(aws, 3, tasks=3, signals="?") as job:
        job.start()
        assert sorted(job.await_tasks(3)) == job.names, "every host works"
        job.hosts["algo-2"].kill()
        job.await_output("algo-1", "host algo-2")
        job.release()
        assert job.statuses() == {"algo-1": 0, "algo-2": 137, "algo-3": 0}
        result = job.result()
        assert result is not None
        assert len(result.details["hosts"]) == 3
        assert "algo-2" not in result.details["hosts"]
        assert result.nodes == sorted(job.hosts[name].address for name in ("algo-1", "algo-3"))


def test_step_that_cannot_survive_a_lost_host_says_so(aws: Aws) -> None:
    with RayJob(aws, 2, tasks=2, retries=0, signals="?") as job:
        job.start()
        assert sorted(job.await_tasks(2)) == job.names
        job.hosts["algo-2"].kill()
        assert job.statuses() == {"algo-1": 1, "algo-2": 137}
        assert (job.failure("algo-1") or "").startswith(
            f"host algo-2 ({job.hosts['algo-2'].address}) was lost during the run; then: "
        )
        assert job.result() is None


def test_step_that_does_not_end_after_a_lost_host_fails(aws: Aws) -> None:
    with RayJob(aws, 2, tasks=2, signals="?", limits={"lost_host_seconds": 1}) as job:
        job.start()
        job.await_tasks(2)
        job.hosts["algo-2"].kill()
        assert job.statuses() == {"algo-1": 1, "algo-2": 137}
        assert "was lost during the run, and the step has not ended within 1 s" in (job.failure("algo-1") or "")
        assert job.outputs() == []


def test_lost_head(aws: Aws) -> None:
    with RayJob(aws, 2, tasks=2, signals="?", limits={"unreachable_seconds": 2, "head_unresponsive_timeout": 2}) as job:
        job.start()
        job.await_tasks(2)
        job.await_output("algo-2", "joined as")
        job.hosts["algo-1"].kill()
        assert job.statuses() == {"algo-1": 137, "algo-2": 1}
        assert (job.failure("algo-2") or "").startswith("algo-2: lost the head algo-1: ")


def test_unresponsive_head(aws: Aws) -> None:
    limits = {
        "unreachable_seconds": 60,
        "head_unresponsive_timeout": 3,
        "shutdown_ack_timeout": 3,
        "stop_seconds": 2,
    }
    with RayJob(aws, 2, tasks=2, signals="?", limits=limits) as job:
        job.start()
        job.await_tasks(2)
        job.await_output("algo-2", "joined as")
        [store] = job.processes("algo-1", "gcs/gcs_server")
        store.suspend()
        assert job.statuses() == {"algo-1": 1, "algo-2": 1}
        assert (job.failure("algo-1") or "").startswith("Ray on the head does not answer: ")
        assert (job.failure("algo-2") or "").startswith("algo-2: lost the head algo-1: ")


def test_host_that_never_comes(aws: Aws) -> None:
    with RayJob(aws, 3, limits={"join_seconds": 45}) as job:
        job.hosts["algo-1"].set_names({name: job.hosts[name].address for name in ("algo-1", "algo-2")})
        job.start("algo-2")
        job.start("algo-1", HOUSING_CLUSTER_JOIN_SECONDS="8")
        assert job.statuses() == {"algo-1": 1, "algo-2": 1}
        reason = job.failure("algo-1") or ""
        assert "hosts did not join within 8 s" in reason
        assert reason.endswith("algo-3; names that do not resolve: algo-3")
        assert job.failure("algo-2") is not None


def test_wrong_token_and_a_head_that_is_stopped_then(aws: Aws) -> None:
    with RayJob(aws, 2) as job:
        job.put("other/ray_token", secrets.token_hex(32))
        job.start("algo-1")
        job.start("algo-2", HOUSING_JOB_URI=job.uri + "/other")
        assert job.hosts["algo-2"].wait(150)
        job.hosts["algo-1"].terminate()  # as the platform does when a host has failed
        assert job.statuses() == {"algo-1": 143, "algo-2": 1}
        assert job.failure("algo-2") == "algo-2: the head algo-1 refuses the Ray token of host algo-2"
        assert job.failure("algo-1") is None


def test_stopped_step_saves_its_work(aws: Aws) -> None:
    with RayJob(aws, 2, tasks=2, signals="?") as job:
        job.start()
        job.await_tasks(2)
        for host in job.hosts.values():
            host.terminate()
        assert job.statuses() == {"algo-1": 143, "algo-2": 143}
        assert job.keys("signals/checkpoint") == [""]
        assert job.outputs() == []
        assert [job.failure(name) for name in job.names] == [None, None]


def _open_pipes(job: RayJob) -> None:
    from dagster_pipes import encode_param

    job.put("context.json", json.dumps(_CONTEXT))
    context = {"bucket": job.aws.bucket, "key": job.key("context.json")}
    messages = {"bucket": job.aws.bucket, "key_prefix": job.key("messages")}
    bootstrap = {"DAGSTER_PIPES_CONTEXT": encode_param(context), "DAGSTER_PIPES_MESSAGES": encode_param(messages)}
    job.put("pipes.json", json.dumps(bootstrap))


def _messages(job: RayJob) -> list[dict[str, Any]]:
    chunks = sorted(job.keys("messages/"), key=lambda name: int(name.removesuffix(".json")))
    assert [int(name.removesuffix(".json")) for name in chunks] == list(range(1, len(chunks) + 1))
    lines = [line for name in chunks for line in job.get(f"messages/{name}").decode().splitlines()]
    return [json.loads(line) for line in lines]


_CONTEXT = {
    "asset_keys": ["tuned_model"],
    "code_version_by_asset_key": {},
    "provenance_by_asset_key": {},
    "partition_key": None,
    "partition_key_range": None,
    "partition_time_window": None,
    "run_id": "00000000-0000-0000-0000-000000000000",
    "job_name": "materialize",
    "retry_number": 0,
    "extras": {},
}
