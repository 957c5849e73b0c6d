"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from step_scripts.runner.ray_session import RaySession, RaySettings

# Tests, and the processes that they start, see the defaults and no account, whatever is set where they run. What make
# leaves for a make below it goes, too: it would say so in its output.
_OF_OTHERS = ("HOUSING_", "DAGSTER_", "AWS_", "MAKE", "MFLAGS", "RAY_ADDRESS")
for _name in [n for n in os.environ if n.startswith(_OF_OTHERS)]:
    del os.environ[_name]
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

# Nothing is timed: to make its tables of characters takes Hypothesis over a second in a clean clone.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


_UNIT = Path(__file__).parent / "unit"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: what is left at the end is short, so that all processes of pytest end together."""
    items.sort(key=lambda item: item.path.is_relative_to(_UNIT))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[RaySession]:
    """One private Ray session for all tests that run steps in this process."""
    session = RaySession(RaySettings(num_cpus=2, object_store_memory=512 << 20))
    session.ensure()
    yield session
    session.stop()
