"""Sensors, the schedule and the conditions of automation with `HOUSING_DEPLOYMENT=sagemaker`, evaluated as the daemon
does it: the code location with its own resources, a Dagster instance on disk, the emulated SageMaker and S3.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationTargetMaterializationData

from resources.model_registry.base import ModelVersion
from resources.references.types import SplitRef
from tests.sagemaker_emulator.testing import ROLE, Aws
from tests.serving_models import gate, house_rows, small_model
from tests.split_files import write_split
from tests.stored_references import leave
from tests.vouching import LINEAGE, vouch_for

if TYPE_CHECKING:
    from tests.sagemaker_emulator import SageMakerEmulator

SETTLE_SECONDS = 2.0
YESTERDAY = str(datetime.now(UTC).date() - timedelta(1))
SPLITS = ("train_split", "validation_split", "test_split")


@dataclass
class CodeLocation:
    """What the daemon loads on SageMaker, and the account that it works in."""

    aws: Aws
    definitions: dg.Definitions
    resources: dict[str, Any]
    group: str

    def register(self, folder: Path, factor: float) -> ModelVersion:
        """A version that waits for a decision."""
        return self.resources["model_registry"].register(
            self.group, small_model(folder, factor=factor), metrics={"rmse": 1.0}, gate=gate(), lineage=LINEAGE
        )

    def decide_in_the_console(self, version: int, status: str) -> None:
        """What SageMaker Studio does when somebody presses a button there."""
        packages = self.aws.sagemaker.list_model_packages(ModelPackageGroupName=self.group)["ModelPackageSummaryList"]
        [arn] = [p["ModelPackageArn"] for p in packages if p["ModelPackageVersion"] == version]
        self.aws.sagemaker.update_model_package(
            ModelPackageArn=arn, ModelApprovalStatus=status, ApprovalDescription="looked at in the console"
        )

    def endpoint_serves(self) -> str | None:
        """The version that the endpoint serves."""
        status = self.resources["endpoint_host"].describe(self.group)
        return status.version if status and status.state == "InService" else None

    def look(self, sensor: str, instance: dg.DagsterInstance, cursor: str | None) -> Any:
        """One look of a sensor: run requests, cursor, and why it did nothing."""
        definition = self.definitions.get_repository_def().get_sensor_def(sensor)
        context = dg.build_sensor_context(
            instance, cursor, sensor_name=sensor, definitions=self.definitions,
            resources={key: self.resources[key] for key in definition.required_resource_keys},
        )  # fmt: skip
        return definition.evaluate_tick(context)


@pytest.fixture(scope="module")
def location(emulator: SageMakerEmulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CodeLocation]:
    """`housing_assets.definitions`, loaded again with the variables of a SageMaker deployment."""
    aws = Aws(emulator.endpoint_url, emulator)
    fast = {"poll_seconds": 0.1, "smoke_test_on_candidate": False}
    file = tmp_path_factory.mktemp("automation") / "sagemaker.yaml"
    file.write_text(json.dumps({"endpoint_host": fast}))
    environment = {
        **emulator.environment(),
        "HOUSING_DEPLOYMENT": "sagemaker",
        "HOUSING_ROOT": aws.uri("housing"),
        "HOUSING_ROLE_ARN": ROLE,
        "HOUSING_IMAGE": "housing-image",
        "HOUSING_ENVIRONMENT": aws.bucket[-8:],
        "HOUSING_SAGEMAKER_CONFIG": str(file),
        "HOUSING_LANDING": aws.uri("landing"),
        "HOUSING_LANDING_START": str(datetime.now(UTC).date() - timedelta(7)),
        "HOUSING_SETTLE_SECONDS": str(SETTLE_SECONDS),
        "HOUSING_TIMEZONE": "Europe/Berlin",
    }

    def loaded() -> dict[str, Any]:
        return {name: sys.modules[name] for name in list(sys.modules) if name.partition(".")[0] == "housing_assets"}

    before = loaded()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        for name in before:
            del sys.modules[name]
        try:
            from housing_assets.definitions import defs
            from housing_assets.deployments import load_resources

            yield CodeLocation(aws, defs, load_resources(), f"housing-{environment['HOUSING_ENVIRONMENT']}")
        finally:
            for name in loaded():
                del sys.modules[name]
            sys.modules.update(before)


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    folder = tmp_path / "dagster"
    folder.mkdir()
    (folder / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    with dg.DagsterInstance.from_config(str(folder)) as persistent:
        yield persistent


def test_a_version_approved_in_the_console_is_deployed_once(
    location: CodeLocation, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    look = location.look("approved_models", instance, None)
    assert (look.run_requests, look.skip_message) == ([], f"model group {location.group} has no approved version")
    versions = [location.register(tmp_path / f"model-{factor}", factor) for factor in (100.0, 200.0)]
    assert [version.status for version in versions] == ["PendingManualApproval"] * 2
    assert location.look("approved_models", instance, None).run_requests == []

    location.decide_in_the_console(1, "Approved")
    look = location.look("approved_models", instance, None)
    [request] = look.run_requests
    assert request.run_config == {"ops": {"endpoint": {"config": {"version": 1}}}}
    again = location.look("approved_models", instance, look.cursor)
    assert (again.run_requests, again.skip_message) == ([], f"{location.group}/1 has been handed on before")
    [repeated] = location.look("approved_models", instance, None).run_requests
    assert repeated.run_key == request.run_key, "a daemon that lost its cursor starts no second run"

    # The run that was asked for, with what the assets before it would have left.
    split = write_split(tmp_path / "test", house_rows(20, seed=3))
    left = {
        "registered_model": versions[1],
        "test_split": SplitRef(rows=split, fraction=0.2, configured_fraction=0.2),
    }
    for asset, reference in left.items():
        leave(instance, location.resources["io_manager"].root, asset, reference)
    job = location.definitions.get_job_def("deploy_endpoint")
    refused = job.execute_in_process(request.run_config, instance, tags=request.tags, raise_on_error=False)
    assert not refused.success, "no check vouches for it"
    assert location.endpoint_serves() is None
    vouch_for(location.resources["evidence"], versions[0])
    assert job.execute_in_process(request.run_config, instance, tags=request.tags).success
    assert location.endpoint_serves() == f"{location.group}/1"
    served = location.look("approved_models", instance, None)
    assert (served.run_requests, served.skip_message) == ([], f"{location.group}/1 is served already")

    location.decide_in_the_console(2, "Approved")
    look = location.look("approved_models", instance, served.cursor)
    assert [each.run_config for each in look.run_requests] == [{"ops": {"endpoint": {"config": {"version": 2}}}}]
    location.decide_in_the_console(2, "Rejected")
    assert location.look("approved_models", instance, look.cursor).run_requests == []
    assert location.endpoint_serves() == f"{location.group}/1"


def test_files_on_s3_are_ingested_once_they_no_longer_change(
    location: CodeLocation, instance: dg.DagsterInstance
) -> None:
    cursor: str | None = None

    def look() -> list[dg.RunRequest]:
        nonlocal cursor
        found = location.look("landing_files", instance, cursor)
        cursor = found.cursor
        return found.run_requests

    def settle() -> None:
        time.sleep(SETTLE_SECONDS + 1.1)  # S3 knows the time of modification in seconds

    assert look() == []
    key = f"landing/{YESTERDAY}/sales.csv"
    location.aws.put(key, "PRICE\n1\n")
    location.aws.put("landing/notes.txt", "not a table")
    for day in ("2001-01-01", "2999-01-01"):  # no days of ingestion, for which Dagster would refuse all runs
        location.aws.put(f"landing/{day}/sales.csv", "PRICE\n1\n")
    assert look() == [], "seen once"
    location.aws.put(key, "PRICE\n1\n2\n")
    assert look() == [], "it has grown"
    settle()
    [request] = look()
    assert (request.partition_key, request.tags["housing/files"]) == (YESTERDAY, "1")
    assert look() == []

    location.aws.put(key, "PRICE\n3\n2\n")
    assert look() == [], "replaced just now"
    settle()
    [replaced] = look()
    assert replaced.partition_key == YESTERDAY
    assert replaced.run_key != request.run_key
    assert look() == []
    # The daemon makes the run from this: the partition exists, and the configuration is complete.
    job = location.definitions.get_job_def("ingest")
    assert job.partitions_def is not None
    assert YESTERDAY in job.partitions_def.get_partition_keys()
    assert dg.validate_run_config(job, replaced.run_config)


def test_the_schedule_retrains_on_mondays_at_three_in_its_time_zone(
    location: CodeLocation, instance: dg.DagsterInstance
) -> None:
    repository = location.definitions.get_repository_def()
    schedule = repository.get_schedule_def("weekly_retraining")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("0 3 * * 1", "Europe/Berlin")
    tick = datetime(2026, 11, 2, 2, tzinfo=UTC)
    context = dg.build_schedule_context(instance, scheduled_execution_time=tick, repository_def=repository)
    [request] = schedule.evaluate_tick(context).run_requests or []
    job = location.definitions.get_job_def(schedule.job_name)
    assert job.name == "retrain"
    assert dg.validate_run_config(job, request.run_config)
    assert "tuned_model" in {node.name for node in job.nodes}
    for name in ("endpoint_watch", "hourly_sweep"):
        context = dg.build_schedule_context(instance, scheduled_execution_time=tick, repository_def=repository)
        assert len(repository.get_schedule_def(name).evaluate_tick(context).run_requests or []) == 1, name


def test_splits_follow_ingested_days_and_drift_retrains(location: CodeLocation, instance: dg.DagsterInstance) -> None:
    definitions = location.definitions
    graph = definitions.resolve_asset_graph()
    cursor: Any = None

    def tick() -> set[str]:
        nonlocal cursor
        result = dg.evaluate_automation_conditions(definitions, instance, cursor=cursor)
        cursor = result.cursor
        return {key.to_user_string() for key in graph.get_all_asset_keys() if result.get_num_requested(key)}

    def materialized(*assets: str, partition: str | None = None) -> None:
        for asset in assets:
            instance.report_runless_asset_event(dg.AssetMaterialization(asset, partition=partition))

    def target(asset: str) -> AssetCheckEvaluationTargetMaterializationData:
        record = instance.fetch_materializations(dg.AssetKey(asset), limit=1).records[0]
        return AssetCheckEvaluationTargetMaterializationData(
            storage_id=record.storage_id, run_id=record.run_id, timestamp=record.timestamp
        )

    def checked(asset: str, partition: str | None = None, **failed: bool) -> None:
        for check in graph.asset_check_keys:
            if check.asset_key.to_user_string() == asset:
                blocking = graph.get(check).blocking
                evaluation = dg.AssetCheckEvaluation(
                    asset_key=check.asset_key, check_name=check.name, passed=not failed.get(check.name, False),
                    metadata={}, blocking=blocking, partition=partition,
                    target_materialization_data=target(asset),
                )  # fmt: skip
                instance.report_runless_asset_event(evaluation)

    assert tick() == set()
    materialized("raw_csv", "feature_group", partition=YESTERDAY)
    checked("raw_csv", YESTERDAY)
    checked("feature_group", YESTERDAY)
    assert tick() == set(SPLITS), "one day is there, the others have no files"
    materialized(*SPLITS)
    checked("train_split")
    checked("validation_split")
    checked("test_split")
    assert tick() == set(), "new data alone does not retrain"
    checked("train_split", feature_drift=True)
    assert tick() == {"tuned_model", "evaluation_report"}
    materialized("tuned_model", "evaluation_report")
    checked("tuned_model")
    checked("evaluation_report", rmse_threshold=True)
    assert tick() == set(), "once a finding; and nothing is registered behind a gate that failed"
    materialized("evaluation_report")
    checked("evaluation_report")
    assert tick() == {"registered_model"}
