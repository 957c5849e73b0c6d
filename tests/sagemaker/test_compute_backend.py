"""`SageMakerCompute` on the emulator: the shipped scripts, a real Ray cluster on the job's hosts."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest
from pydantic import ValidationError

from resources.aws.code_package import job_image, requirements
from resources.aws.request_validation import InvalidJobRequest
from resources.compute.sagemaker import SageMakerCompute, StepJob
from resources.sagemaker.job_requests import JobConfig
from tests.probe_step import ProbeParams
from tests.sagemaker.pipes_jobs import IMAGE, ROLE, SMALL_HOSTS
from tests.waiting import until

if TYPE_CHECKING:
    from tests.sagemaker_emulator.testing import Aws

ROOT = Path(__file__).parents[2]
BOOTSTRAP = ROOT / "step_scripts" / "bootstrap.sh"


def backend(uri: str, hosts: int = 1, **changes: Any) -> SageMakerCompute:
    """A backend whose artifacts and jobs are below `uri`."""
    job = JobConfig(
        role_arn=ROLE, instance_count=hosts, max_run_seconds=300, price_per_hour=0.2, environment=SMALL_HOSTS
    )
    options: dict[str, Any] = {"image": IMAGE, "poll_seconds": 0.2, "job": job, **changes}
    return SageMakerCompute(artifact_root=f"{uri}artifacts", job_root=f"{uri}jobs", **options)


def materialize(compute: SageMakerCompute, *parameters: ProbeParams) -> tuple[dg.ExecuteInProcessResult, str]:
    """Run the probe step with each of the parameters in one asset; the run, and its log."""

    @dg.asset
    def probe(context: dg.AssetExecutionContext, compute: SageMakerCompute) -> dg.MaterializeResult[Any]:
        results = [compute.run(context, "tests.probe_step", params) for params in parameters]
        return dg.MaterializeResult(metadata={"results": [json.loads(r.model_dump_json()) for r in results]})

    with dg.DagsterInstance.ephemeral() as instance:
        run = dg.materialize([probe], resources={"compute": compute}, instance=instance, raise_on_error=False)
        log = "\n".join(r.user_message for r in instance.all_logs(run.run_id) if not r.is_dagster_event)
    return run, log


def failure_of(run: dg.ExecuteInProcessResult) -> Any:
    """What the failed step raised, as Dagster keeps it."""
    [event] = [e for e in run.all_events if e.is_step_failure]
    assert event.step_failure_data.user_failure_data is not None, event.step_failure_data.error
    return event.step_failure_data.user_failure_data


def test_a_step_runs_on_ray_over_all_hosts_of_the_job(aws: "Aws", aws_environment: Any) -> None:
    compute = backend(aws.uri(), hosts=2)
    run, log = materialize(compute, ProbeParams(value=5))
    assert run.success, log
    metadata: Any = run.asset_materializations_for_node("probe")[0].metadata
    [result] = metadata["results"].value
    assert result["outputs"]["value"]["uri"].startswith(aws.uri("artifacts/tests.probe_step/"))
    assert result["metrics"] == {"value": 5}
    assert len(result["nodes"]) == 2
    assert aws.get(result["outputs"]["value"]["uri"].removeprefix(aws.uri()) + "/value.txt") == b"5"
    assert "probing write" in log
    assert "[algo-2] " in log
    assert metadata["instance_count"].value == 2
    assert metadata["estimated_cost"].value >= 0
    name = metadata["sagemaker_job"].value
    assert isinstance(name, str)
    assert name.startswith("housing-probe-")
    job = aws.sagemaker.describe_processing_job(ProcessingJobName=name)
    assert job["Environment"]["HOUSING_JOB_URI"] == aws.uri(f"jobs/{name}/")
    left = {key.removeprefix(f"jobs/{name}/") for key in aws.keys(f"jobs/{name}/")}
    assert {"request.json", "pipes.json", "context.json"} <= left
    assert not {"ray_token", "lease.json"} & left
    assert len([key for key in aws.keys("jobs/code/") if key.endswith("source.tar.gz")]) == 1


def test_bad_input_found_in_a_training_job_is_the_same_failure_as_on_local_ray(
    aws: "Aws", aws_environment: Any
) -> None:
    compute = backend(aws.uri(), steps={"tests.probe_step": StepJob(job_type="training")})
    run, log = materialize(compute, ProbeParams(action="reject"))
    assert not run.success
    failure = failure_of(run)
    assert failure.description == "tests.probe_step: file x.csv is bad: mend it", log
    assert failure.metadata["bad_rows"].records[0].data == {"row": 1}
    kept = failure.metadata["bad.txt"].value
    assert aws.get(kept.removeprefix(aws.uri())) == b"0"
    assert failure.metadata["job_status"].value == "Failed"
    job = aws.sagemaker.describe_training_job(TrainingJobName=failure.metadata["sagemaker_job"].value)
    assert job["TrainingJobStatus"] == "Failed"


def test_a_fault_of_the_program_shows_its_error_and_the_log(aws: "Aws", aws_environment: Any) -> None:
    run, _ = materialize(backend(aws.uri()), ProbeParams(action="raise"))
    text = failure_of(run).description
    assert "RuntimeError: a fault of the program" in text
    assert "log lines of algo-1" in text


def test_wrong_configuration_fails_before_the_first_step(aws: "Aws", aws_environment: Any) -> None:
    job = JobConfig(role_arn=ROLE, environment={"LONG": "x" * 300})
    run, _ = materialize(backend(aws.uri(), job=job), ProbeParams())
    assert not run.success
    text = str(run.all_events)
    assert InvalidJobRequest.__name__ in text
    assert "has 300 characters; CreateProcessingJob allows at most 256" in text
    assert aws.keys() == []


def test_places_and_isolation_that_jobs_cannot_work_with_are_refused() -> None:
    job = JobConfig(role_arn=ROLE)
    with pytest.raises(ValidationError, match="artifact_root must be an s3://"):
        SageMakerCompute(artifact_root="data", job_root="s3://bucket/jobs", job=job)
    with pytest.raises(ValidationError, match="gateway endpoint"):
        backend("s3://bucket/", job=JobConfig(role_arn=ROLE, network_isolation=True))


def test_the_configuration_of_a_step_differs_where_it_says_so() -> None:
    own_job = {"instance_count": 4, "price_per_hour": 1.5, "environment": {"A": "1"}}
    compute = backend("s3://bucket/", steps={"tune_model": StepJob.model_validate(own_job)})
    own = compute.config_of("tune_model")
    assert (own.instance_count, own.price_per_hour, own.instance_type) == (4, 1.5, "ml.m5.xlarge")
    assert own.environment["A"] == "1"
    assert own.environment["HOUSING_NODE_CPUS"] == "1"
    assert compute.config_of("prepare_splits") == compute.job


def test_without_an_image_and_without_the_sagemaker_package_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sagemaker", None)
    monkeypatch.setitem(sys.modules, "sagemaker.core", None)
    with pytest.raises(dg.Failure, match=r"housing-assets\[sagemaker\]"):
        job_image.__wrapped__(None, "eu-central-1")
    assert job_image(IMAGE, "eu-central-1") == IMAGE


def test_definitions_load_without_credentials_region_and_boto3() -> None:
    program = """
import sys
import dagster as dg
from resources.compute.base import ComputeBackend
from resources.compute.sagemaker import SageMakerCompute
from resources.sagemaker.job_requests import JobConfig
from resources.sagemaker.pipes_client import PipesSageMakerClient

@dg.asset
def probe(context: dg.AssetExecutionContext, compute: ComputeBackend, pipes: PipesSageMakerClient) -> None: ...

compute = SageMakerCompute(artifact_root="s3://b/a", job_root="s3://b/j", job=JobConfig(role_arn="r"))
definitions = dg.Definitions([probe], resources={"compute": compute, "pipes": PipesSageMakerClient("s3://b/j")})
dg.Definitions.validate_loadable(definitions)
print([name for name in ("boto3", "botocore", "sagemaker", "ray", "pyarrow", "numpy") if name in sys.modules])
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | {"HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def container(folder: Path, module: str, **environment: str) -> subprocess.Popen[str]:
    """`bootstrap.sh` as a container's first process, with `/opt/ml` in `folder`."""
    variables = os.environ | {"SAGEMAKER_BASE_DIR": str(folder), "PYTHONPATH": str(folder), **environment}
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    return subprocess.Popen(["/bin/bash", str(folder / "code" / "bootstrap.sh"), module], env=variables, text=True)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "bootstrap.sh").write_text(BOOTSTRAP.read_text())
    (folder / "requirements.txt").write_text(requirements())
    return folder


def test_the_start_script_ends_with_the_status_of_the_program(code: Path) -> None:
    (code.parent / "program.py").write_text("import sys; sys.exit(7)")
    assert container(code.parent, "program").wait(60) == 7


def test_the_start_script_passes_sigterm_on_and_waits(code: Path) -> None:
    program = """
import pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
def end(*_):
    time.sleep(0.5)
    (here / "ended").touch()
    sys.exit(4)
signal.signal(signal.SIGTERM, end)
(here / "ready").touch()
time.sleep(60)
"""
    (code.parent / "program.py").write_text(program)
    process = container(code.parent, "program")
    until((code.parent / "ready").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 4
    assert (code.parent / "ended").exists()


def test_a_package_that_cannot_be_installed_is_the_failure_reason(code: Path) -> None:
    (code / "requirements.txt").write_text("no-such-package-of-housing==1.0\n")
    (code.parent / "wheels").mkdir()
    assert container(code.parent, "program").wait(120) == 1
    for place in ("failure", "message"):
        reason = (code.parent / "output" / place).read_text()
        assert "no-such-package-of-housing==1.0" in reason
        assert "Use an image that holds them" in reason
