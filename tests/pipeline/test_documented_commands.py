"""The commands of docs/operations.md, run as they stand there: days of ingestion, one by one and many at once."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import dagster as dg
import pytest

from housing_assets.sample_data import write_sample
from tests.platform_cli import ROOT, Platform

pytestmark = pytest.mark.slow
DAYS = ("2026-11-20", "2026-11-23")


def documented(page: str) -> list[list[str]]:
    """The `dagster asset materialize` commands of a page, as words."""
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if "dagster asset materialize" in line]


def run(platform: Platform, command: list[str]) -> subprocess.CompletedProcess[str]:
    assert command[0] == ".venv/bin/dagster"
    return platform.run("-m", "dagster", *command[1:])


@pytest.fixture
def platform(tmp_path: Path) -> Platform:
    landing = tmp_path / "landing"
    for number, day in enumerate(DAYS):
        file = write_sample(landing / day / "sales.csv", rows=400, seed=number, invalid_fraction=0)
        os.utime(file, (1.7e9, 1.7e9))
    return Platform(tmp_path, {"HOUSING_LANDING": str(landing), "HOUSING_LANDING_START": "2026-11-01"})


def test_a_day_and_then_many_days_in_one_run(platform: Platform) -> None:
    one, many = documented("operations.md")
    done = run(platform, one)
    assert done.returncode == 0, done.stdout
    assert platform.metadata("feature_group")["rows_live"] == 400
    done = run(platform, many)
    assert done.returncode == 0, done.stdout
    group = platform.metadata("feature_group")
    assert (group["rows_in"], group["rows_live"], group["added"], group["unchanged"]) == (800, 800, 400, 400)
    with platform.instance() as instance:
        days = instance.get_materialized_partitions(dg.AssetKey("feature_group"))
    assert set(DAYS) <= days

    # Training reads all days, whatever day was ingested last.
    done = platform.materialize("train_split validation_split test_split")
    assert done.returncode == 0, done.stdout
    rows = sum(platform.metadata(f"{split}_split")["dagster/row_count"] for split in ("train", "validation", "test"))
    assert rows == 800


def test_a_day_without_files_says_so(platform: Platform) -> None:
    one, _ = documented("operations.md")
    done = run(platform, [word.replace("2026-11-23", "2026-11-22") for word in one])
    assert done.returncode != 0
    assert "no file of 2026-11-22 is ready in" in done.stdout
