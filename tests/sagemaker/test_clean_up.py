"""`teardown`, `sweep` and the inventories on the emulator: look-alikes of others are neither listed nor touched."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import housing_assets.definitions  # noqa: F401  # the jobs ask for all assets
from housing_assets.deployments import load_resources
from housing_assets.maintenance.sweeper import sweep
from housing_assets.maintenance.teardown import teardown
from housing_assets.reporting.lineage import lineage_of
from resources.aws.ownership import CREATED_BY, CREATED_BY_TAG, RUN_TAG, root_tags
from resources.endpoints.sagemaker import SageMakerEndpointHost
from resources.feature_store.sagemaker import SageMakerFeatureStore
from resources.inventory import NotOwned
from resources.references.types import DatasetRef
from step_scripts.feature_store.offline_store import OfflineStore
from tests.aws_account import act_as, deploy
from tests.feature_rows import TABLE, ingest_rows, row, write_rows
from tests.job_outcome import outcome
from tests.sagemaker_emulator import SageMakerEmulator
from tests.sagemaker_emulator.testing import IMAGE, ROLE, Aws
from tests.serving_models import gate, small_model, smoke_test

LOG = logging.getLogger("test")
SLEEP = "import time\ntime.sleep(600)"
OURS = {CREATED_BY_TAG: CREATED_BY}


def tags(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in values.items()]


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


def resources_of(aws: Aws, folder: Path, environment: str, role: str = ROLE) -> dict[str, Any]:
    file = folder / "sagemaker.yaml"
    fast = {"poll_seconds": 0.1, "smoke_test_on_candidate": False}
    file.write_text(json.dumps({"endpoint_host": fast, "feature_store": {"poll_seconds": 0.1}}))
    return load_resources(
        {
            "HOUSING_DEPLOYMENT": "sagemaker",
            "HOUSING_ROOT": aws.uri("housing"),
            "HOUSING_ROLE_ARN": role,
            "HOUSING_IMAGE": "housing-image",
            "HOUSING_RAW_CSV": aws.uri("housing/sample/house_sales_7.csv"),
            "HOUSING_ENVIRONMENT": environment,
            "HOUSING_SAGEMAKER_CONFIG": str(file),
        }
    )


def start_job(aws: Aws, name: str, job_root: str, run_id: str, *, attended: bool = False) -> None:
    own = tags({**OURS, **root_tags(job_root), RUN_TAG: run_id})
    aws.sagemaker.create_training_job(**aws.training_request(name, SLEEP), Tags=own)
    if attended:
        claim = {"run_id": run_id, "renewed_at": datetime.now(UTC).isoformat()}
        bucket, _, key = f"{job_root}/{name}/lease.json".removeprefix("s3://").partition("/")
        aws.s3.put_object(Bucket=bucket, Key=key, Body=json.dumps(claim).encode())


def launch(
    job: dg.JobDefinition, resources: dict[str, Any], instance: dg.DagsterInstance, **config: Any
) -> tuple[bool, dict[str, Any]]:
    [op] = job.nodes
    run_config = {"ops": {op.name: {"config": config}}}
    done = job.execute_in_process(run_config, instance, resources=resources, raise_on_error=False)
    return outcome(done)


def account(aws: Aws) -> dict[str, list[str]]:
    """Everything in SageMaker that could be removed, and the objects of the bucket."""
    listings = {
        "endpoints": ("list_endpoints", "Endpoints", "EndpointName"),
        "configs": ("list_endpoint_configs", "EndpointConfigs", "EndpointConfigName"),
        "models": ("list_models", "Models", "ModelName"),
        "groups": ("list_model_package_groups", "ModelPackageGroupSummaryList", "ModelPackageGroupName"),
        "features": ("list_feature_groups", "FeatureGroupSummaries", "FeatureGroupName"),
    }
    found = {
        kind: sorted(item[name] for item in getattr(aws.sagemaker, function)(MaxResults=100)[member])
        for kind, (function, member, name) in listings.items()
    }
    jobs = aws.sagemaker.list_training_jobs(MaxResults=100, StatusEquals="InProgress")["TrainingJobSummaries"]
    return {**found, "jobs": sorted(job["TrainingJobName"] for job in jobs), "keys": sorted(aws.keys())}


def foreign_things(aws: Aws, environment: str) -> None:
    """What others have made: similar names, one tag of two, and things of another deployment of this project."""
    name, other = f"housing-{environment}", OURS | root_tags(aws.uri("housing/environments/other/endpoints"))
    part = f"{name}-0123456789ab"
    model = {"PrimaryContainer": {"Image": IMAGE}, "ExecutionRoleArn": ROLE}
    variant = {"VariantName": "All", "ModelName": part, "InitialInstanceCount": 1, "InstanceType": "ml.m5.large"}
    aws.sagemaker.create_model(ModelName=part, **model, Tags=tags(other))
    aws.sagemaker.create_endpoint_config(EndpointConfigName=part, ProductionVariants=[variant], Tags=tags(OURS))
    aws.sagemaker.create_model_package_group(ModelPackageGroupName=f"{name}-similar", Tags=tags(OURS))
    aws.sagemaker.create_model_package_group(ModelPackageGroupName=f"{name}-other", Tags=tags(other))
    aws.sagemaker.create_feature_group(
        FeatureGroupName=f"house_sales-similar-{environment}", RecordIdentifierFeatureName="id",
        EventTimeFeatureName="time", RoleArn=ROLE, Tags=tags(OURS),
        FeatureDefinitions=[{"FeatureName": n, "FeatureType": "String"} for n in ("id", "time")],
        OfflineStoreConfig={
            "S3StorageConfig": {"S3Uri": aws.uri("housing/environments/other/feature_store/x")},
            "DisableGlueTableCreation": True,
        },
    )  # fmt: skip
    start_job(aws, f"{name}-similar", aws.uri("housing/environments/other/jobs"), "run-1")
    for key in (
        "housing/sample/house_sales_7.csv",
        "housing/artifacts/tune_model/0123456789abcdef/manifest.json",
        f"housing/environments/{environment}-similar/references/endpoint.json",
        f"housing/environments/{environment}/references/mine.json",
        f"housing/environments/{environment}/artifacts/notes.txt",
        f"housing/environments/{environment}/jobs/mine/notes.txt",
        f"housing/environments/{environment}/endpoints/captured/notes.txt",
        f"housing/environments/{environment}/model_registry/{name}/notes.txt",
    ):
        aws.put(key, "mine")


def deploy_everything(aws: Aws, folder: Path, resources: dict[str, Any], environment: str) -> None:
    model = small_model(folder / "model")
    version = resources["model_registry"].register(
        f"housing-{environment}", model, metrics={"rmse": 1.0}, gate=gate(), lineage={"run_id": "run-7"},
        status="Approved",
    )  # fmt: skip
    resources["endpoint_host"].deploy(f"housing-{environment}", version, smoke_test(model), LOG)
    store: SageMakerFeatureStore = resources["feature_store"]
    group = f"house_sales-{environment}"
    store.ensure_group(group, TABLE)
    rows = write_rows(folder / "rows", [row(1)])
    ingest_rows(OfflineStore(store.root), rows, group=group, mirror=False)
    store.record_dataset(group, DatasetRef(digest=rows.digest, source="s3://in", run_id="run-d"))
    root = f"housing/environments/{environment}"
    for key in (
        "artifacts/tune_model/0123456789abcdef/manifest.json",
        "artifacts/tune_model/0123456789abcdef/attempt/model/model.ubj",
        "references/endpoint.json",
        "references/raw_csv/2026-11-01.json",
        f"jobs/housing-{environment}-tuned-model-0123456789-0123456789/request.json",
        "jobs/code/0123456789abcdef/source.tar.gz",
        "jobs/checkpoints/0123/trial.json",
        "endpoints/captured/housing/AllTraffic/2026/11/01/00/x.jsonl",
        "sample/house_sales_10.csv",
    ):
        aws.put(f"{root}/{key}", "ours")


def test_everything_goes_but_what_is_not_ours(
    aws: Aws,
    aws_environment: SageMakerEmulator,
    tmp_path: Path,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = aws.bucket[-8:]
    roles = deploy(aws_environment, aws.bucket, Name=aws.bucket, CreateBucket="false", CreateLogGroups="false")
    act_as(roles.dagster_role, aws_environment, monkeypatch)
    resources = resources_of(aws, tmp_path, environment, roles.jobs_role)
    root = aws.uri(f"housing/environments/{environment}")
    foreign_things(aws, environment)
    before = account(aws)
    deploy_everything(aws, tmp_path, resources, environment)
    start_job(aws, f"housing-{environment}-abandoned", f"{root}/jobs", "run-2")
    name = f"housing-{environment}"
    traced = lineage_of(name, resources["endpoint_host"], resources["model_registry"])
    assert [(line["stage"], line["run"]) for line in traced[:2]] == [("endpoint", ""), ("model version", "run-7")]
    store: SageMakerFeatureStore = resources["feature_store"]
    [dataset] = store.snapshot_lineage(store.offline(f"house_sales-{environment}")).datasets
    assert (dataset.commit, dataset.source, dataset.run_id) == (1, "s3://in", "run-d")
    try:
        done, metadata = launch(teardown, resources, instance)
        assert done, metadata
        kinds = [record.data["kind"] for record in metadata["would_remove"].records]
        assert list(dict.fromkeys(kinds)) == [
            *("endpoint", "endpoint_config", "model", "model_package", "model_package_group"),
            *("job", "feature_group", "files"),
        ]
        runs = {r.data["kind"]: r.data["run"] for r in metadata["would_remove"].records if r.data["run"]}
        assert runs == {"model_package": "run-7", "job": "run-2"}

        # What somebody else has registered in the group keeps the group; the rest is removed, and the reason is shown.
        container = {"Image": IMAGE, "ModelDataUrl": aws.put("foreign/model.tar.gz", "x")}
        specification = {
            "Containers": [container],
            "SupportedContentTypes": ["text/csv"],
            "SupportedResponseMIMETypes": ["text/csv"],
        }
        foreign = aws.sagemaker.create_model_package(ModelPackageGroupName=name, InferenceSpecification=specification)[
            "ModelPackageArn"
        ]
        done, metadata = launch(teardown, resources, instance, dry_run=False, confirm=root)
        assert not done
        [left] = [r.data for r in metadata["left"].records]
        assert (left["kind"], left["name"]) == ("model_package_group", name)
        assert f"group {name} has 1 version" in left["why"]
        assert aws.sagemaker.describe_model_package(ModelPackageName=foreign)
        aws.sagemaker.delete_model_package(ModelPackageName=foreign)

        done, metadata = launch(teardown, resources, instance, dry_run=False, confirm=root)
        assert done, metadata
        assert [r.data["name"] for r in metadata["removed"].records] == [left["name"]]
        after = account(aws)
        assert {k: v for k, v in after.items() if k != "keys"} == {k: v for k, v in before.items() if k != "keys"}
        scripts = ("code/", "out/", "foreign/")  # of the test's own jobs and packages
        assert [key for key in after["keys"] if not key.startswith(scripts)] == [
            key for key in before["keys"] if not key.startswith(scripts)
        ]
        done, metadata = launch(teardown, resources, instance, dry_run=False, confirm=root)
        assert done
        assert metadata["items"] == 0
    finally:
        for job in account(aws)["jobs"]:
            if environment in job:
                aws.sagemaker.stop_training_job(TrainingJobName=job)


def test_resources_refuse_what_carries_their_name_only(
    aws: Aws, aws_environment: SageMakerEmulator, tmp_path: Path
) -> None:
    environment = aws.bucket[-8:]
    ours = resources_of(aws, tmp_path, environment)
    name = f"housing-{environment}-0123456789ab"
    model = {"PrimaryContainer": {"Image": IMAGE}, "ExecutionRoleArn": ROLE, "ModelName": name}
    host: SageMakerEndpointHost = ours["endpoint_host"]
    aws.sagemaker.create_model(**model, Tags=tags(OURS | root_tags(host.root)))
    [item] = host.inventory()
    aws.sagemaker.delete_model(ModelName=name)
    host.remove(item)  # it is gone already
    aws.sagemaker.create_model(**model, Tags=tags(OURS))
    with pytest.raises(NotOwned, match=f"model {name} was not created by this deployment"):
        host.remove(item)
    assert name in account(aws)["models"]
    aws.sagemaker.delete_model(ModelName=name)


def test_jobs_whose_run_is_gone_are_reported_and_stopped_if_configured(
    aws: Aws, aws_environment: SageMakerEmulator, tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    environment = aws.bucket[-8:]
    resources = resources_of(aws, tmp_path, environment)
    jobs = f"{aws.uri('housing/environments')}/{environment}/jobs"
    running = instance.create_run_for_job(teardown, status=dg.DagsterRunStatus.STARTED).run_id
    failed = instance.create_run_for_job(teardown, status=dg.DagsterRunStatus.FAILURE).run_id
    names = {what: f"housing-{environment}-{what}" for what in ("running", "failed", "attended", "foreign")}
    try:
        start_job(aws, names["running"], jobs, running)
        start_job(aws, names["failed"], jobs, failed)
        start_job(aws, names["attended"], jobs, failed, attended=True)
        start_job(aws, names["foreign"], f"{jobs}-of-others", failed)
        done, metadata = launch(sweep, resources, instance, minutes=0)
        assert done, metadata
        [found] = [record.data for record in metadata["found"].records]
        assert (found["name"], found["outcome"]) == (names["failed"], "reported")
        assert found["why"] == f"run {failed} is FAILURE"
        assert names["failed"] in account(aws)["jobs"]
        done, metadata = launch(sweep, resources, instance, minutes=0, stop=True)
        assert done, metadata
        assert aws.describe_training(names["failed"])["TrainingJobStatus"] == "Stopped"
        left = [name for name in account(aws)["jobs"] if environment in name]
        assert left == sorted([names["running"], names["attended"], names["foreign"]])
    finally:
        for job in account(aws)["jobs"]:
            if environment in job:
                aws.sagemaker.stop_training_job(TrainingJobName=job)
