"""Fixtures for tests against the SageMaker emulator."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rehearse import PLATFORM_IMAGES
from tests.sagemaker_emulator import Image, SageMakerEmulator
from tests.sagemaker_emulator.testing import Aws

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def emulator() -> Iterator[SageMakerEmulator]:
    """One emulator for the whole test session, with short delays."""
    with SageMakerEmulator(
        images={
            # Images with an entry point of their own, which gets the argument `train` or `serve`.
            "tuning-image": Image(entrypoint=("python3", "/opt/ml/input/data/code/job.py")),
            "serving-image": Image(entrypoint=("python3", "/opt/ml/model/serve.py")),
            # The shipped Dockerfile's entry point, with this environment's interpreter.
            "housing-image": Image(
                entrypoint=("/bin/bash", str(ROOT / "step_scripts" / "bootstrap.sh")),
                workdir=str(ROOT),
                startup_timeout=120,
            ),
            **PLATFORM_IMAGES,
        },
        stop_grace=3,
        serve_stop_grace=2,
        sync_interval=0.2,
        feature_group_delay=0.2,
        offline_store_delay=0.3,
        endpoint_wait_scale=0.01,
        endpoint_startup_timeout=5,
    ) as running:
        yield running


@pytest.fixture
def aws(emulator: SageMakerEmulator) -> Iterator[Aws]:
    """boto3 on the emulator with a fresh bucket; faults are cleared afterwards."""
    yield Aws(emulator.endpoint_url, emulator)
    emulator.faults.clear()


@pytest.fixture
def aws_environment(emulator: SageMakerEmulator, monkeypatch: pytest.MonkeyPatch) -> SageMakerEmulator:
    """The environment variables that point boto3 and the AWS CLI to the emulator."""
    for name, value in emulator.environment().items():
        monkeypatch.setenv(name, value)
    return emulator
