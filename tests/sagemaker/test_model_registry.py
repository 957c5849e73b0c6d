"""The model registry of SageMaker, on the emulator: the contract of all registries, and what is SageMaker's own."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from resources.aws.ownership import CREATED_BY, CREATED_BY_TAG
from resources.aws.request_validation import InvalidJobRequest
from resources.model_registry.base import ModelVersionNotFound, RegistryDamaged
from resources.model_registry.sagemaker import SageMakerModelRegistry
from step_scripts.runner import storage
from tests.registry_contract import RegistryContract, artifact, clear, register
from tests.sagemaker_emulator import SageMakerEmulator
from tests.sagemaker_emulator.testing import Aws
from tests.serving_models import gate


@pytest.fixture
def registry(aws: Aws, aws_environment: SageMakerEmulator) -> Iterator[SageMakerModelRegistry]:
    made = SageMakerModelRegistry(root=aws.uri("registry"), image="housing-image")
    yield made
    clear(made)


def packages(aws: Aws) -> list[str]:
    found = aws.sagemaker.list_model_packages(ModelPackageGroupName="housing")["ModelPackageSummaryList"]
    return [package["ModelPackageArn"] for package in found]


class TestContract(RegistryContract):
    pass


def test_what_sagemaker_shows(registry: SageMakerModelRegistry, aws: Aws, tmp_path: Path) -> None:
    lineage = {"train_digest": "abc", "parameters": {"eta": 0.1}, "note": "a, (b) \u00e9\U0001f600"}
    version = register(registry, artifact(tmp_path / "model"), lineage=lineage)
    described = aws.sagemaker.describe_model_package(ModelPackageName=packages(aws)[0])
    properties = described["CustomerMetadataProperties"]
    assert properties["model_digest"] == version.artifact.digest
    assert properties["gate"] == "passed rmse=5000 threshold=15000"
    assert properties["lineage:train_digest"] == "abc"
    assert json.loads(storage.read_bytes(properties["facts_uri"]))["lineage"] == lineage
    assert registry.get("housing", 1).lineage == lineage
    quality = described["ModelMetrics"]["ModelQuality"]["Statistics"]["S3Uri"]
    assert json.loads(storage.read_bytes(quality))["regression_metrics"] == {"rmse": {"value": 5000.0}}
    container = described["InferenceSpecification"]["Containers"][0]
    assert (container["Image"], container["Environment"]) == (
        "housing-image",
        {"HOUSING_MODEL_DIGEST": version.artifact.digest},
    )
    with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(container["ModelDataUrl"]))) as opened:
        assert opened.getnames() == ["model.ubj", "sub/scaler.json"]
    group = aws.sagemaker.describe_model_package_group(ModelPackageGroupName="housing")["ModelPackageGroupArn"]
    assert {"Key": CREATED_BY_TAG, "Value": CREATED_BY} in aws.sagemaker.list_tags(ResourceArn=group)["Tags"]


def test_a_decision_in_the_console_is_a_change_like_any_other(
    registry: SageMakerModelRegistry, aws: Aws, tmp_path: Path
) -> None:
    register(registry, artifact(tmp_path / "model"))
    arn = packages(aws)[0]
    aws.sagemaker.update_model_package(ModelPackageArn=arn, ModelApprovalStatus="Approved")
    found = registry.get("housing", 1)
    assert found.status == "Approved"
    change = found.status_history[-1]
    assert (change.who, change.why) == ("arn:aws:iam::123456789012:user/testing", "no reason given")
    latest = registry.latest("housing", "Approved")
    assert latest == found

    registry.set_status("housing", 1, "Rejected", who="ann", why="too\nold")
    aws.sagemaker.update_model_package(
        ModelPackageArn=arn, ModelApprovalStatus="Approved", ApprovalDescription="looked at it again"
    )
    history = [(c.status, c.why) for c in registry.get("housing", 1).status_history]
    assert history == [
        ("PendingManualApproval", "registered; rmse 5000, threshold 15000"),
        ("Approved", "no reason given"),
        ("Rejected", "too\nold"),
        ("Approved", "looked at it again"),
    ]


def test_registering_at_once_makes_one_version(aws: Aws, registry: SageMakerModelRegistry, tmp_path: Path) -> None:
    model = artifact(tmp_path / "model")
    register(registry, artifact(tmp_path / "first", "other"))
    with ThreadPoolExecutor(4) as threads:
        registries = [SageMakerModelRegistry(root=registry.root, image="housing-image") for _ in range(4)]
        runs = [threads.submit(register, one, model, lineage={"run": n}) for n, one in enumerate(registries)]
        versions = [run.result(timeout=120) for run in runs]
    assert {v.version for v in versions} == {2}
    assert versions == [registry.get("housing", 2)] * 4
    facts = [key for key in aws.keys("registry/housing/") if "/facts-" in key]
    assert len(facts) == 2  # those of the calls that came second are removed


def test_packages_of_others_in_the_group_are_left_alone(
    registry: SageMakerModelRegistry, aws: Aws, tmp_path: Path
) -> None:
    aws.sagemaker.create_model_package_group(ModelPackageGroupName="housing")
    specification = {
        "Containers": [{"Image": "x"}],
        "SupportedContentTypes": ["a"],
        "SupportedResponseMIMETypes": ["a/b"],
    }
    foreign = aws.sagemaker.create_model_package(
        ModelPackageGroupName="housing", InferenceSpecification=specification, ModelApprovalStatus="Approved"
    )["ModelPackageArn"]
    assert register(registry, artifact(tmp_path / "model")).version == 2
    assert [v.version for v in registry.list("housing")] == [2]
    assert registry.latest("housing", "Approved") is None
    with pytest.raises(ModelVersionNotFound, match=r"version 1 \(that one was not registered by this project\)"):
        registry.delete("housing", 1)
    clear(registry)
    assert packages(aws) == [foreign]
    assert aws.keys("registry/housing/") == []
    aws.sagemaker.delete_model_package(ModelPackageName=foreign)
    clear(registry)
    assert aws.sagemaker.describe_model_package_group(ModelPackageGroupName="housing")  # others made it
    aws.sagemaker.delete_model_package_group(ModelPackageGroupName="housing")


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_damaged_facts_are_named(registry: SageMakerModelRegistry, aws: Aws, tmp_path: Path, damage: str) -> None:
    register(registry, artifact(tmp_path / "model"))
    key = next(key for key in aws.keys("registry/housing/") if "/facts-" in key)
    storage.delete_file(aws.uri(key)) if damage == "missing" else aws.put(key, "{}")
    for read in (lambda: registry.get("housing", 1), lambda: registry.list("housing")):
        with pytest.raises(RegistryDamaged, match=key):
            read()
    registry.delete("housing", 1)  # the remedy that the message names
    assert registry.list("housing") == []
    assert aws.keys("registry/housing/") == []


def test_throttling_is_waited_out(registry: SageMakerModelRegistry, aws: Aws, tmp_path: Path) -> None:
    aws.faults.throttle("*ModelPackage*", count=3)
    assert register(registry, artifact(tmp_path / "model")).version == 1


def test_wrong_configuration_is_refused_before_anything_is_created(
    aws: Aws, aws_environment: SageMakerEmulator, tmp_path: Path
) -> None:
    for root in ("/data/registry", "s3://bucket/a b", "s3://bucket/" + "x" * 130):
        with pytest.raises(ValueError, match="root must be an s3:// prefix"):
            SageMakerModelRegistry(root=root)
    wrong = SageMakerModelRegistry(root=aws.uri("registry"), image="housing-image", instance_types=["ml.m5.tiny"])
    with pytest.raises(InvalidJobRequest, match=r"ml\.m5\.tiny"):
        register(wrong, artifact(tmp_path / "model"), gate=gate(evaluation="e9"))
    assert wrong.list("housing") == []
