"""`prune` on the emulator: the contract of all registries and endpoint hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import dagster as dg
import pytest

from resources.endpoints.sagemaker import SageMakerEndpointHost
from resources.model_registry.sagemaker import SageMakerModelRegistry
from tests.pruning_contract import PruningContract
from tests.registry_contract import clear
from tests.sagemaker_emulator import SageMakerEmulator
from tests.sagemaker_emulator.testing import ROLE, Aws

pytestmark = pytest.mark.slow


@pytest.fixture
def group(aws: Aws) -> str:
    return f"prices-{aws.bucket[-6:]}"


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


@pytest.fixture
def registry(aws: Aws, aws_environment: SageMakerEmulator, group: str) -> Iterator[SageMakerModelRegistry]:
    made = SageMakerModelRegistry(root=aws.uri("registry"), image="housing-image")
    yield made
    clear(made)


@pytest.fixture
def host(aws: Aws, aws_environment: SageMakerEmulator, group: str) -> Iterator[SageMakerEndpointHost]:
    made = SageMakerEndpointHost(
        root=aws.uri("endpoints"), role_arn=ROLE, poll_seconds=0.1, smoke_test_on_candidate=False
    )
    yield made
    made.delete(group)


@pytest.fixture
def captures(aws: Aws) -> Callable[[str], str]:
    return lambda endpoint: aws.uri(f"endpoints/captured/{endpoint}")


class TestPruning(PruningContract):
    pass
