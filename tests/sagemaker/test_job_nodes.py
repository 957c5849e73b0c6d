"""Training and processing jobs whose steps work on all hosts of the job."""

import json
import threading
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest

from resources.compute.sagemaker import SageMakerCompute, StepJob
from resources.sagemaker.job_requests import InstanceGroup, JobConfig
from tests.cluster_probe_step import ClusterProbeParams
from tests.sagemaker.pipes_jobs import IMAGE, ROLE
from tests.sagemaker.tuning_runs import ENVIRONMENT
from tests.sagemaker_emulator.probe import abilities
from tests.waiting import until

if TYPE_CHECKING:
    from tests.sagemaker_emulator.testing import Aws

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not abilities().namespaces, reason=f"needs hosts of their own: {abilities().reason}"),
]
STEP = "tests.cluster_probe_step"
MIXED = [
    InstanceGroup(name="workers", instance_type="ml.c5.xlarge", instance_count=2),
    InstanceGroup(name="head", instance_type="ml.m5.large"),
]


def test_every_host_of_a_job_with_instance_groups_works(aws: "Aws", aws_environment: object) -> None:
    """One host of a processing job: test_compute_backend.py; two hosts for every step: test_platform.py."""
    hosts = 3
    job = JobConfig(role_arn=ROLE, instance_count=hosts, max_run_seconds=600, environment=ENVIRONMENT)
    compute = SageMakerCompute(
        artifact_root=aws.uri("artifacts"),
        job_root=aws.uri("jobs"),
        image=IMAGE,
        poll_seconds=0.2,
        job=job,
        steps={STEP: StepJob.model_validate({"job_type": "training", "instance_groups": MIXED})},
    )

    def started() -> set[str]:
        return {key.rpartition("/")[2].partition("-")[2] for key in aws.keys("signals/started/")}

    def release() -> None:
        # No task ends before there is one on every host.
        until(lambda: len(started()) == hosts)
        aws.put("signals/release", b"")

    @dg.asset
    def probe(context: dg.AssetExecutionContext, compute: SageMakerCompute) -> dg.MaterializeResult[Any]:
        result = compute.run(context, STEP, ClusterProbeParams(tasks=hosts, signals=aws.uri("signals")))
        return dg.MaterializeResult(metadata={"result": json.loads(result.model_dump_json())})

    threading.Thread(target=release, daemon=True).start()
    with dg.DagsterInstance.ephemeral() as instance:
        run = dg.materialize([probe], resources={"compute": compute}, instance=instance, raise_on_error=False)
    assert run.success
    metadata: Any = run.asset_materializations_for_node("probe")[0].metadata
    result = metadata["result"].value
    assert len(set(result["nodes"])) == hosts
    assert sorted(result["details"]["addresses"]) == result["nodes"]
    assert set(result["details"]["hosts"]) == {f"algo-{number + 1}" for number in range(hosts)}
    assert metadata["instance_count"].value == hosts
    assert metadata["instance_type"].value == "ml.c5.xlarge, ml.m5.large"
