"""What is said of days of ingestion before any work is done."""

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.errors import DagsterResourceFunctionError

from housing_assets.deployments import load_resources
from tests import ROOT


def days(landing: Path, start: str = "2026-11-01") -> subprocess.CompletedProcess[str]:
    variables = {"HOUSING_LANDING": str(landing), "HOUSING_LANDING_START": start}
    return subprocess.run(
        [sys.executable, "-m", "housing_assets.automation.days"],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_range_of_make_run_is_that_of_the_files_that_can_be_ingested(tmp_path: Path) -> None:
    for day in ("2026-11-20", "2026-11-23", "2025-01-01", "2999-01-01"):
        (tmp_path / day).mkdir()
        (tmp_path / day / "sales.csv").write_text("PRICE\n1\n")
    assert days(tmp_path).stdout == "2026-11-20...2026-11-23\n"
    refused = days(tmp_path / "empty")
    assert refused.returncode == 1
    assert f"{tmp_path / 'empty'} has no CSV file of a day from HOUSING_LANDING_START=2026-11-01" in refused.stderr


@pytest.mark.parametrize(("first", "last", "runs"), [("2026-11-20", "2026-11-23", 1), ("2026-11-23", "2026-11-20", 0)])
def test_a_reversed_range_is_refused_before_any_work(tmp_path: Path, first: str, last: str, runs: int) -> None:
    work: list[str] = []

    @dg.asset
    def something() -> None:
        work.append("done")

    tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
    resources = load_resources({"HOUSING_ROOT": str(tmp_path)})

    def materialize() -> None:
        dg.materialize([something], resources={"io_manager": resources["io_manager"]}, tags=tags)

    if runs:
        materialize()
    else:
        with pytest.raises(DagsterResourceFunctionError) as caught:
            materialize()
        assert f"{first}...{last} is reversed. Give the earlier day first: {last}" in str(caught.value.__cause__)
    assert len(work) == runs
