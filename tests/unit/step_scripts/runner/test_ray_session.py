"""The private Ray session."""

from __future__ import annotations

import psutil

from step_scripts.runner.ray_session import RaySession


def test_only_processes_that_have_work_are_started(ray_session: RaySession) -> None:
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    for needed in ("gcs_server", "raylet/raylet"):
        assert any(needed in command for command in commands), needed
    for idle in ("log_monitor.py", "/monitor.py", "dashboard/dashboard.py"):
        assert not any(idle in command for command in commands), idle
