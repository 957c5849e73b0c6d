"""The endpoint host of SageMaker, on the emulator, with the real serving process in the containers."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from housing_assets.schema import HOUSING_TABLE
from resources.aws.ownership import CREATED_BY, CREATED_BY_TAG
from resources.aws.request_validation import InvalidJobRequest
from resources.endpoints.base import (
    EndpointDeploymentFailed,
    EndpointNotFound,
    InvocationFailed,
    VersionNotApproved,
)
from resources.endpoints.captured_files import CapturedRows
from resources.endpoints.endpoint_requests import (
    CANDIDATE,
    SERVING,
    DataCapture,
    Serverless,
    TrafficShift,
    name_prefix,
    part_name,
)
from resources.endpoints.sagemaker import SageMakerEndpointHost
from resources.model_registry.base import ModelVersion
from resources.model_registry.sagemaker import SageMakerModelRegistry
from step_scripts.model import load_model
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact
from tests.registry_contract import clear
from tests.sagemaker_emulator import SageMakerEmulator
from tests.sagemaker_emulator.testing import ROLE, Aws
from tests.serving_models import gate, house_rows, small_model, smoke_test
from tests.waiting import until

LOG = logging.getLogger("test")
GROUP = "prices"


@pytest.fixture
def registry(aws: Aws, aws_environment: SageMakerEmulator) -> Iterator[SageMakerModelRegistry]:
    made = SageMakerModelRegistry(root=aws.uri("registry"), image="housing-image")
    yield made
    clear(made)


@pytest.fixture
def host(aws: Aws, aws_environment: SageMakerEmulator) -> Iterator[SageMakerEndpointHost]:
    made = configured(aws)
    yield made
    for status in made.list():
        made.delete(status.name)


def configured(aws: Aws, **changes: Any) -> SageMakerEndpointHost:
    return SageMakerEndpointHost(root=aws.uri("endpoints"), role_arn=ROLE, poll_seconds=0.1, **changes)


def approved(registry: SageMakerModelRegistry, folder: Path, factor: float) -> tuple[Artifact, ModelVersion]:
    artifact = small_model(folder, factor=factor)
    evidence = gate(evaluation=artifact.digest)
    version = registry.register(GROUP, artifact, metrics={"rmse": 5000.0}, gate=evidence, lineage={}, status="Approved")
    return artifact, version


def present(aws: Aws) -> dict[str, list[str]]:
    """Names of all endpoints, configurations and models."""
    found = {}
    for kind in ("Endpoint", "EndpointConfig", "Model"):
        operation = {"Endpoint": "endpoints", "EndpointConfig": "endpoint_configs", "Model": "models"}[kind]
        page = getattr(aws.sagemaker, f"list_{operation}")(MaxResults=100)
        found[kind] = sorted(item[f"{kind}Name"] for item in page[f"{kind}s"])
    return found


def new_since(aws: Aws, before: dict[str, list[str]]) -> dict[str, list[str]]:
    return {kind: [n for n in names if n not in before[kind]] for kind, names in present(aws).items()}


def foreign_parts(aws: Aws, name: str, package: str) -> None:
    """A model and a configuration that somebody else named like those of endpoint `houses`."""
    aws.sagemaker.create_model(
        ModelName=name, PrimaryContainer={"ModelPackageName": package}, ExecutionRoleArn=ROLE,
        Tags=[{"Key": "housing-assets:endpoint", "Value": "houses"}],
    )  # fmt: skip
    variant = {"VariantName": "All", "ModelName": name, "InitialInstanceCount": 1, "InstanceType": "ml.m5.large"}
    aws.sagemaker.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])


class Load:
    """Requests all the time, as long as the block runs."""

    def __init__(self, host: SageMakerEndpointHost, name: str, models: list[Artifact]) -> None:
        self.rows = house_rows(2, seed=3)
        self.host, self.name = host, name
        self.expected = [load_model(model.uri).predict(self.rows).tolist() for model in models]
        self.answers: list[int] = []
        self.errors: list[Exception] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        body = self.rows.write_csv().encode()
        while not self._stop.is_set():
            try:
                answer = json.loads(self.host.invoke(self.name, body, "text/csv", "application/json"))
                self.answers.append(self.expected.index(answer["predictions"]))
            except Exception as error:  # noqa: BLE001  # reported by the test
                self.errors.append(error)
            self._stop.wait(0.02)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)


@pytest.mark.slow
def test_the_life_of_an_endpoint(
    host: SageMakerEndpointHost, registry: SageMakerModelRegistry, aws: Aws, tmp_path: Path
) -> None:
    before = present(aws)
    artifact = small_model(tmp_path / "1", factor=100)
    pending = registry.register(GROUP, artifact, metrics={}, gate=gate(), lineage={})
    with pytest.raises(VersionNotApproved, match="prices/1 is PendingManualApproval"):
        host.deploy("houses", pending, smoke_test(artifact), LOG)
    assert new_since(aws, before) == {"Endpoint": [], "EndpointConfig": [], "Model": []}
    assert host.describe("houses") is None
    with pytest.raises(EndpointNotFound, match="houses is not served; served are: none"):
        host.invoke("houses", b"1", "text/csv")

    package = aws.sagemaker.list_model_packages(ModelPackageGroupName=GROUP)["ModelPackageSummaryList"][0]
    arn = package["ModelPackageArn"]
    aws.sagemaker.update_model_package(ModelPackageArn=arn, ModelApprovalStatus="Approved")  # as the console does
    foreign_parts(aws, "houses-others", arn)
    status = host.deploy("houses", registry.get(GROUP, 1), smoke_test(artifact), LOG)
    assert (status.state, status.version, status.previous_version) == ("InService", "prices/1", None)
    assert status.model_digest == artifact.digest
    assert status.smoke_test is not None
    assert status.smoke_test.largest_difference == 0
    assert host.list() == [host.describe("houses")]
    created = new_since(aws, before)
    model = next(name for name in created["Model"] if name != "houses-others")
    model_arn = aws.sagemaker.describe_model(ModelName=model)["ModelArn"]
    tags = aws.sagemaker.list_tags(ResourceArn=model_arn)["Tags"]
    assert {"Key": CREATED_BY_TAG, "Value": CREATED_BY} in tags

    rows = house_rows(3)
    answer = host.invoke("houses", rows.write_csv().encode(), "text/csv", "application/json")
    assert json.loads(answer) == {"predictions": load_model(artifact.uri).predict(rows).tolist()}
    with pytest.raises(InvocationFailed, match="YEAR_BUILT") as caught:
        host.invoke("houses", b"old,2500,3,2.0,0.5,2,1,0", "text/csv")
    assert caught.value.status == 400
    assert json.loads(caught.value.body)["rows"][0]["column"] == "YEAR_BUILT"
    with pytest.raises(InvocationFailed, match="at most 6291456"):
        host.invoke("houses", b"1" * 6_291_457, "text/csv")
    again = host.deploy("houses", registry.get(GROUP, 1), smoke_test(artifact), LOG)
    assert again.started_at == status.started_at
    assert new_since(aws, before) == created

    second, version = approved(registry, tmp_path / "2", 200)
    with Load(host, "houses", [artifact, second]) as load:
        aws.faults.throttle("*Endpoint*", count=5)
        status = host.deploy("houses", version, smoke_test(second), LOG)
        until(lambda: 1 in load.answers or load.errors)
    assert load.errors == []
    assert load.answers == sorted(load.answers)  # never back to the old version
    assert load.answers[0] == 0
    assert (status.version, status.previous_version) == ("prices/2", "prices/1")
    created = new_since(aws, before)
    assert created["Endpoint"] == ["houses"]  # the candidate is gone
    assert len(created["EndpointConfig"]) == len(created["Model"]) == 3  # of both versions, and the foreign ones

    status = host.deploy("houses", registry.get(GROUP, 1), smoke_test(artifact), LOG)  # going back
    assert (status.version, status.previous_version) == ("prices/1", "prices/2")
    assert new_since(aws, before) == created

    host.delete("houses")
    host.delete("houses")
    left = new_since(aws, before)
    assert left == {"Endpoint": [], "EndpointConfig": ["houses-others"], "Model": ["houses-others"]}


@pytest.mark.slow
def test_versions_that_fail_do_not_replace_the_one_that_serves(
    host: SageMakerEndpointHost, registry: SageMakerModelRegistry, aws: Aws, tmp_path: Path
) -> None:
    first, version = approved(registry, tmp_path / "1", 100)
    before = present(aws)
    with pytest.raises(EndpointDeploymentFailed, match=r"nothing is served\. smoke test: 12 of 12"):
        host.deploy("fails", version, smoke_test(first, offset=5.0), LOG)
    assert present(aws) == before
    host.deploy("fails", version, smoke_test(first), LOG)
    before = present(aws)
    second, wrong = approved(registry, tmp_path / "2", 200)

    # on the candidate
    with pytest.raises(EndpointDeploymentFailed, match=r"prices/1 keeps serving\. smoke test: 12 of 12"):
        host.deploy("fails", wrong, smoke_test(second, offset=5.0), LOG)
    assert present(aws) == before

    # after the change, which is undone
    careless = configured(aws, smoke_test_on_candidate=False)
    with Load(host, "fails", [first, second]) as load, pytest.raises(
        EndpointDeploymentFailed, match=r"prices/1 keeps serving\. smoke test: 12 of 12"
    ):  # fmt: skip
        careless.deploy("fails", wrong, smoke_test(second, offset=5.0), LOG)
    assert load.errors == []
    assert present(aws) == before
    status = host.describe("fails")
    assert status is not None
    assert (status.version, status.previous_version) == ("prices/1", None)

    # a container that refuses to start: its model is another than the one registered
    archives = [storage.join(v.artifact.uri.rpartition("/")[0], "model.tar.gz") for v in (version, wrong)]
    storage.write_bytes(archives[1], storage.read_bytes(archives[0]))
    with pytest.raises(EndpointDeploymentFailed, match=r"was rolled back to .*(?s:.)*holds model .* not the deployed"):
        careless.deploy("fails", wrong, smoke_test(second), LOG)
    assert present(aws) == before
    host.invoke("fails", house_rows(1).write_csv().encode(), "text/csv")


def test_endpoints_of_others_are_left_alone(
    host: SageMakerEndpointHost, registry: SageMakerModelRegistry, aws: Aws, tmp_path: Path
) -> None:
    artifact, version = approved(registry, tmp_path / "1", 100)
    package = aws.sagemaker.list_model_packages(ModelPackageGroupName=GROUP)["ModelPackageSummaryList"][0]
    foreign_parts(aws, "theirs", package["ModelPackageArn"])
    aws.faults.fail_endpoint("theirs", mode="exit", count=1)
    aws.sagemaker.create_endpoint(EndpointName="theirs", EndpointConfigName="theirs")
    before = present(aws)
    assert host.describe("theirs") is None
    assert "theirs" not in [status.name for status in host.list()]
    for act in (
        lambda: host.deploy("theirs", version, smoke_test(artifact), LOG),
        lambda: host.delete("theirs"),
    ):
        with pytest.raises((EndpointDeploymentFailed, EndpointNotFound), match="not created by this project; it is"):
            act()
    with pytest.raises(EndpointNotFound, match="theirs is not served"):
        host.invoke("theirs", b"1", "text/csv")
    assert present(aws) == before
    until(lambda: aws.sagemaker.describe_endpoint(EndpointName="theirs")["EndpointStatus"] == "Failed")
    aws.sagemaker.delete_endpoint(EndpointName="theirs")
    aws.sagemaker.delete_endpoint_config(EndpointConfigName="theirs")
    aws.sagemaker.delete_model(ModelName="theirs")


def watched_requests_are_those_of_others(host: SageMakerEndpointHost, aws: Aws, model: Artifact) -> None:
    """What SageMaker captured is read back as rows, without the requests of smoke tests."""
    since, rows = datetime.now(UTC) - timedelta(hours=1), house_rows(3, seed=9)
    host.invoke("full", rows.write_csv().encode(), "text/csv", "application/json")

    def captured() -> CapturedRows | None:
        found = host.captured("full", HOUSING_TABLE, since, 100)
        return found if found and found.predictions.size else None

    found = until(captured)
    assert (len(found.predictions), found.requests, found.unreadable) == (3, 1, 0)
    assert found.predictions.tolist() == load_model(model.uri).predict(rows).tolist()
    assert found.features.tolist() == [[float(value) for value in row] for row in rows.rows()]
    assert host.captured("nobody", HOUSING_TABLE, since, 100) is None


@pytest.mark.slow
def test_what_the_configuration_becomes(registry: SageMakerModelRegistry, aws: Aws, tmp_path: Path) -> None:
    artifact, version = approved(registry, tmp_path / "1", 100)
    traffic = TrafficShift(
        mode="canary", percent=50, wait_seconds=60, keep_old_seconds=60, rollback_alarms=["too many errors"]
    )
    host = configured(
        aws, image="housing-image", smoke_test_on_candidate=False, traffic=traffic, kms_key="key-1",
        data_capture=DataCapture(sampling_percentage=100), tags={"team": "prices"},
    )  # fmt: skip
    host.deploy("full", version, smoke_test(artifact), LOG)
    described = aws.sagemaker.describe_endpoint(EndpointName="full")
    config = aws.sagemaker.describe_endpoint_config(EndpointConfigName=described["EndpointConfigName"])
    variant = config["ProductionVariants"][0]
    assert (variant["InstanceType"], variant["InitialInstanceCount"]) == ("ml.m5.large", 1)
    assert config["KmsKeyId"] == "key-1"
    model = aws.sagemaker.describe_model(ModelName=variant["ModelName"])
    assert model["PrimaryContainer"]["Image"] == "housing-image"
    assert {"Key": "team", "Value": "prices"} in aws.sagemaker.list_tags(ResourceArn=model["ModelArn"])["Tags"]
    key = until(lambda: aws.keys("endpoints/captured/full/"))[0]
    line = json.loads(aws.get(key).decode().splitlines()[0])
    assert line["captureData"]["endpointInput"]["encoding"] == "CSV"
    watched_requests_are_those_of_others(host, aws, artifact)

    alarm = {"Namespace": "x", "MetricName": "x", "Period": 60, "EvaluationPeriods": 1, "Threshold": 1.0,
             "ComparisonOperator": "GreaterThanThreshold", "Statistic": "Sum"}  # fmt: skip
    watch = aws.client("cloudwatch")
    watch.put_metric_alarm(AlarmName="too many errors", **alarm)
    watch.set_alarm_state(AlarmName="too many errors", StateValue="ALARM", StateReason="test")
    second, better = approved(registry, tmp_path / "2", 200)
    try:
        with pytest.raises(
            EndpointDeploymentFailed, match=r"prices/1 keeps serving.* too many errors were in state ALARM"
        ):
            host.deploy("full", better, smoke_test(second), LOG)
    finally:
        watch.delete_alarms(AlarmNames=["too many errors"])
    host.deploy("full", better, smoke_test(second), LOG)
    deployed = aws.sagemaker.describe_endpoint(EndpointName="full")["LastDeploymentConfig"]
    assert deployed["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"]["CanarySize"]["Value"] == 50

    less = configured(aws, serverless=Serverless(memory_mb=2048, max_concurrency=3), smoke_test_on_candidate=False)
    status = less.deploy("full", better, smoke_test(second), LOG)
    assert (status.version, status.previous_version) == ("prices/2", "prices/1")
    config = aws.sagemaker.describe_endpoint(EndpointName="full")["EndpointConfigName"]
    variant = aws.sagemaker.describe_endpoint_config(EndpointConfigName=config)["ProductionVariants"][0]
    assert variant["ServerlessConfig"] == {"MemorySizeInMB": 2048, "MaxConcurrency": 3}
    less.delete("full")


class Interrupting(logging.Logger):
    """Interrupts the deployment when it logs a message that ends with `words`."""

    def __init__(self, words: str) -> None:
        super().__init__("interrupting")
        self.words = words

    def info(self, msg: object, *args: object, **_: object) -> None:
        if re.search(self.words, str(msg)):
            raise KeyboardInterrupt


@pytest.mark.slow
def test_interrupted_deployments_are_taken_up_by_the_next_one(
    host: SageMakerEndpointHost, registry: SageMakerModelRegistry, aws: Aws, tmp_path: Path
) -> None:
    first, version = approved(registry, tmp_path / "1", 100)
    host.deploy("stopped", version, smoke_test(first), LOG)
    second, better = approved(registry, tmp_path / "2", 200)
    before = present(aws)["Endpoint"]
    with pytest.raises(KeyboardInterrupt):
        host.deploy("stopped", better, smoke_test(second), Interrupting("-candidate-.* is Creating"))
    assert len(present(aws)["Endpoint"]) == len(before) + 1  # SageMaker does not let go of it while it starts
    assert [status.name for status in host.list()] == ["stopped"]

    with pytest.raises(KeyboardInterrupt):
        host.deploy("stopped", better, smoke_test(second), Interrupting("stopped is Updating"))
    assert present(aws)["Endpoint"] == before
    status = host.deploy("stopped", better, smoke_test(second), LOG)  # which SageMaker has finished alone
    assert (status.version, status.previous_version) == ("prices/2", "prices/1")


def test_a_candidate_has_one_instance_and_captures_nothing(registry: SageMakerModelRegistry, tmp_path: Path) -> None:
    _, version = approved(registry, tmp_path / "1", 100)
    capture = DataCapture(sampling_percentage=5)
    host = SageMakerEndpointHost(root="s3://bucket/root", role_arn=ROLE, instance_count=4, data_capture=capture)
    serving, candidate = (host.config_request("e", version, "model", role) for role in (SERVING, CANDIDATE))
    assert serving["DataCaptureConfig"]["DestinationS3Uri"] == "s3://bucket/root/captured"
    assert "DataCaptureConfig" not in candidate
    counts = [request["ProductionVariants"][0]["InitialInstanceCount"] for request in (serving, candidate)]
    assert counts == [4, 1]
    assert serving["EndpointConfigName"] != candidate["EndpointConfigName"]


def test_wrong_configuration_is_refused() -> None:
    def build(**changes: Any) -> SageMakerEndpointHost:
        return SageMakerEndpointHost(root="s3://bucket/endpoints", **{"role_arn": ROLE, **changes})

    for wrong in ({"instance_type": "ml.m5.tiny"}, {"role_arn": "me"}, {"environment": {"a b": "c"}}):
        with pytest.raises(InvalidJobRequest, match=f"{next(iter(wrong.values()))}|a b"):
            build(**wrong).setup_for_execution(dg.build_init_resource_context())
    build(data_capture=DataCapture(), kms_key="key").setup_for_execution(dg.build_init_resource_context())
    with pytest.raises(ValueError, match="serverless endpoints have no data_capture, traffic"):
        build(serverless=Serverless(), data_capture=DataCapture(), traffic=TrafficShift(mode="linear"))
    with pytest.raises(ValueError, match="belong together"):
        build(subnets=["subnet-1"])
    with pytest.raises(ValueError, match="choose 1024"):
        Serverless(memory_mb=1500)
    with pytest.raises(ValueError, match="rollback_alarms"):
        TrafficShift(rollback_alarms=["alarm"] * 11)


@settings(deadline=None, max_examples=50)
@given(
    endpoint=st.from_regex(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", fullmatch=True),
    middle=st.sampled_from(["", "-candidate"]),
    content=st.dictionaries(st.text(), st.integers()),
)
def test_names_of_parts_are_valid_and_those_of_their_content(
    endpoint: str, middle: str, content: dict[str, int]
) -> None:
    name = part_name(endpoint, content, middle)
    assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", name)
    assert name.startswith(name_prefix(endpoint))
    assert part_name(endpoint, dict(reversed(content.items())), middle) == name
    assert part_name(endpoint, {**content, "more": 1.5}, middle) != name
