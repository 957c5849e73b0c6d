"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from step_scripts.ray_session import RaySession, RaySettings


@pytest.fixture(scope="session")
def ray_session() -> Iterator[RaySession]:
    """One private Ray session for all tests that run steps in this process."""
    session = RaySession(RaySettings(num_cpus=2, object_store_memory=512 << 20))
    session.ensure()
    yield session
    session.stop()
