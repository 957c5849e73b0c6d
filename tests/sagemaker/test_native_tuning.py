"""Trials as training jobs of a SageMaker tuning job, with a custom image."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest
from pydantic import ValidationError

from resources.aws.request_validation import InvalidJobRequest
from resources.compute.sagemaker import SageMakerCompute, StepJob
from resources.sagemaker.job_requests import InstanceGroup, JobConfig
from resources.sagemaker.tuning_jobs import NativeTuningConfig
from step_scripts.model import load_model
from step_scripts.runner.contract import Artifact
from tests.aws_account import act_as, deploy
from tests.sagemaker.pipes_jobs import ROLE
from tests.sagemaker.tuning_runs import NATIVE, TuningRun, inputs_on_s3, kept_trials
from tests.sagemaker_emulator.probe import abilities
from tests.waiting import until

if TYPE_CHECKING:
    from tests.sagemaker_emulator import SageMakerEmulator
    from tests.sagemaker_emulator.testing import Aws

needs_hosts = pytest.mark.skipif(not abilities().namespaces, reason=f"needs hosts of their own: {abilities().reason}")
ROOT = Path(__file__).parents[2]
PARAMS = {"num_boost_round": 60, "early_stopping_rounds": 20, "num_trials": 3, "eta_min": 0.1, "eta_max": 0.3}


def tuning_jobs(aws: "Aws") -> list[dict[str, Any]]:
    """Descriptions of this test's tuning jobs."""
    listed = aws.sagemaker.list_hyper_parameter_tuning_jobs(NameContains="tune-", MaxResults=100)
    names = [job["HyperParameterTuningJobName"] for job in listed["HyperParameterTuningJobSummaries"]]
    found = [aws.sagemaker.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=name) for name in names]
    return [job for job in found if aws.bucket in json.dumps(job, default=str)]


@needs_hosts
@pytest.mark.slow
def test_trials_of_a_tuning_job_end_in_the_same_artifact(
    aws: "Aws", aws_environment: "SageMakerEmulator", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"Name": aws.bucket, "SourcePrefix": "splits", "CreateBucket": "false", "CreateLogGroups": "false"}
    roles = deploy(aws_environment, aws.bucket, **own)
    inputs = inputs_on_s3(aws, tmp_path)
    act_as(roles.dagster_role, aws_environment, monkeypatch)
    run = TuningRun(aws.uri("housing/"), inputs, PARAMS, native_tuning=NATIVE, job={"role_arn": roles.jobs_role})
    assert run.success, run.error
    [job] = tuning_jobs(aws)
    name = job["HyperParameterTuningJobName"]
    assert len(name) <= 32
    assert job["HyperParameterTuningJobStatus"] == "Completed"
    assert run.metadata["tuning_job"] == name
    assert run.metadata["tuning_trials"] == 3
    assert run.metadata["tuning_billable_seconds"] > 0
    assert "tuning_console" not in run.metadata, "an emulated job has no page in the console"
    assert run.metadata["sagemaker_job"].startswith("housing-tuned-"), "that of the final fit"
    assert "3 of 3 trials finished, best so far validation:rmse" in run.log
    assert "not run again, finished before: 3 of 3 trials" in run.log
    jobs = aws.sagemaker.list_training_jobs_for_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)
    values = {
        summary["TunedHyperParameters"]["eta"]: summary["FinalHyperParameterTuningJobObjectiveMetric"]["Value"]
        for summary in jobs["TrainingJobSummaries"]
    }
    assert {str(t["parameters"]["eta"]): t["rmse"] for t in run.trials} == pytest.approx(values)
    assert {t["trial"] for t in run.trials} == {1, 2, 3}
    assert all(0 < t["best_rounds"] <= t["rounds"] <= 60 for t in run.trials)
    best = run.result.metrics["validation_rmse"]
    assert best == pytest.approx(min(t["rmse"] for t in run.trials), rel=1e-3), "the same fit, by the same code"
    assert load_model(run.result.outputs["model"].uri).booster.num_boosted_rounds() == run.result.metrics["best_rounds"]
    assert kept_trials(aws, "housing/") == []
    written = aws.keys(f"housing/jobs/{name}/")
    assert written
    assert not [key for key in written if key.endswith("lease.json")]


@contextmanager
def dagster_process(aws: "Aws", inputs: dict[str, Artifact]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that materializes `tuned`, once its tuning job is there. It is killed if it is left over."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.sagemaker.tuning_runs"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdin is not None
        told = {name: json.loads(artifact.model_dump_json()) for name, artifact in inputs.items()}
        process.stdin.write(json.dumps({"root": aws.uri(), "inputs": told, "params": PARAMS}).encode())
        process.stdin.close()
        until(lambda: tuning_jobs(aws))
        yield process
    finally:
        process.kill()
        process.wait()


@needs_hosts
@pytest.mark.slow
def test_termination_of_the_run_stops_its_tuning_job(aws: "Aws", aws_environment: object, tmp_path: Path) -> None:
    with dagster_process(aws, inputs_on_s3(aws, tmp_path)) as process:
        process.send_signal(signal.SIGTERM)
        until(lambda: [job["HyperParameterTuningJobStatus"] for job in tuning_jobs(aws)] == ["Stopped"])
        assert process.wait(60) != 0
    assert aws.keys("jobs/housing-tuned-") == [], "the final fit was not started"


@needs_hosts
@pytest.mark.slow
def test_after_a_killed_dagster_process_the_next_run_attaches_to_the_tuning_job(
    aws: "Aws", aws_environment: object, tmp_path: Path
) -> None:
    inputs = inputs_on_s3(aws, tmp_path)
    with dagster_process(aws, inputs) as process:
        process.kill()
    run = TuningRun(aws.uri(), inputs, PARAMS, native_tuning=NATIVE)
    assert run.success, run.error
    [job] = tuning_jobs(aws)
    assert f"Attached to tuning job {job['HyperParameterTuningJobName']}" in run.log
    assert run.metadata["tuning_trials"] == 3


@needs_hosts
@pytest.mark.slow
def test_trials_that_all_fail_are_a_failure_with_their_reason(
    aws: "Aws", aws_environment: object, tmp_path: Path
) -> None:
    inputs = inputs_on_s3(aws, tmp_path)
    for key in aws.keys("splits/train/"):
        aws.s3.delete_object(Bucket=aws.bucket, Key=key)
    run = TuningRun(aws.uri(), inputs, {**PARAMS, "num_trials": 2}, native_tuning=NATIVE)
    assert not run.success
    assert "All training jobs failed" in run.error
    assert "FileNotFoundError" in run.error, run.error
    assert kept_trials(aws) == []


def compute(**options: Any) -> SageMakerCompute:
    given: dict[str, Any] = {"image": "housing-image", "job": JobConfig(role_arn=ROLE), **options}
    return SageMakerCompute(artifact_root="s3://bucket/a", job_root="s3://bucket/j", **given)


def test_native_tuning_without_a_custom_image_is_refused() -> None:
    with pytest.raises(ValidationError, match="native_tuning needs a custom image"):
        compute(image=None, native_tuning=NATIVE)


def test_wrong_tuning_requests_and_instance_groups_are_errors_before_the_first_step() -> None:
    context = dg.build_init_resource_context()
    tuning = NativeTuningConfig(instance_type="ml.m5.tiny")
    with pytest.raises(InvalidJobRequest, match="CreateHyperParameterTuningJob"):
        compute(native_tuning=tuning).setup_for_execution(context)
    compute(native_tuning=NATIVE).setup_for_execution(context)
    groups = [InstanceGroup(name="head", instance_type="ml.m5.large"),
              InstanceGroup(name="workers", instance_type="ml.c5.xlarge", instance_count=3)]  # fmt: skip
    with pytest.raises(ValueError, match="instance_groups exist for training jobs only"):
        compute(job=JobConfig(role_arn=ROLE, instance_groups=groups)).setup_for_execution(context)
    mixed = compute(steps={"tune_model": StepJob.model_validate({"instance_groups": groups})})
    mixed.setup_for_execution(context)
    assert mixed.config_of("tune_model").environment == {"HOUSING_CLUSTER_HEAD_GROUP": "head"}
    with pytest.raises(ValidationError, match="two groups have the same name"):
        JobConfig(role_arn=ROLE, instance_groups=[groups[0], groups[0]])
