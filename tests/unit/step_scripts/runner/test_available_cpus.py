"""How many CPUs Ray is given: those that the process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from step_scripts.runner.ray_environment import _cpu_quotas, available_cpus


def test_one_cpu_by_affinity_is_one() -> None:
    first = min(os.sched_getaffinity(0))
    script = (
        f"import os; os.sched_setaffinity(0, [{first}])\n"
        "from step_scripts.runner.ray_environment import available_cpus\n"
    )
    done = subprocess.run([sys.executable, "-c", script + "print(available_cpus())"], capture_output=True, check=True)
    assert done.stdout.strip() == b"1"
    assert 1 <= available_cpus() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("cgroup", "files", "quotas"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/", {"cpu.max": "max 100000\n"}, []),
        ("0::/up/own", {"up/cpu.max": "50000 100000", "up/own/cpu.max": "max 1"}, [0.5]),
        ("0::/not/seen/here", {"cpu.max": "200000 100000"}, [2.0]),
        ("2:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "100000", "cpu/job/cpu.cfs_period_us": "50000"}, [2.0]),
        ("2:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "50000"}, []),
        ("3:memory:/job", {"cpu/job/cpu.cfs_quota_us": "1", "cpu/job/cpu.cfs_period_us": "1"}, []),
    ],
)  # fmt: skip
def test_quotas_of_control_groups(tmp_path: Path, cgroup: str, files: dict[str, str], quotas: list[float]) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{cgroup}\n")
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert list(_cpu_quotas(tmp_path)) == quotas


def test_python_without_docstrings_is_refused_with_the_remedy() -> None:
    script = "from step_scripts.runner.ray_session import *; RaySession(RaySettings()).ensure()"
    done = subprocess.run([sys.executable, "-OO", "-c", script], capture_output=True, text=True, check=False)
    assert "unset PYTHONOPTIMIZE=2, or leave out -OO" in done.stderr
