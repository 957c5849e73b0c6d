"""The code location: what it holds, how lightly it loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).parent / "definitions.json"
HEAVY = ["ray", "xgboost", "xgboost_ray", "sagemaker", "boto3", "pandera", "polars", "pyarrow", "pandas", "numpy",
         "matplotlib", "optuna", "mlflow"]  # fmt: skip


def snapshot() -> dict[str, object]:
    from housing_assets.definitions import defs

    graph = defs.resolve_asset_graph()
    assets = {}
    for key in sorted(graph.get_all_asset_keys(), key=str):
        node = graph.get(key)
        assets[key.to_user_string()] = {
            "group": node.group_name,
            "kinds": sorted(node.kinds),
            "owners": sorted(node.owners),
            "upstream": sorted(k.to_user_string() for k in node.parent_keys),
        }
    checks = {
        f"{key.asset_key.to_user_string()}:{key.name}": "blocking" if graph.get(key).blocking else "warning"
        for key in sorted(graph.asset_check_keys, key=str)
    }
    repository = defs.get_repository_def()
    return {
        "assets": assets,
        "checks": checks,
        "jobs": sorted(j.name for j in repository.get_all_jobs() if not j.name.startswith("__")),
        "schedules": sorted(s.name for s in repository.schedule_defs),
        "sensors": sorted(s.name for s in repository.sensor_defs),
        "resources": sorted(r for r in defs.resources or {}),
    }


def test_the_definitions_are_those_of_the_snapshot() -> None:
    """After an intended change: `python -m tests.unit.test_code_location > tests/unit/definitions.json`."""
    assert snapshot() == json.loads(SNAPSHOT.read_text())


def test_every_asset_is_described_and_versioned() -> None:
    from housing_assets.definitions import defs

    graph = defs.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert len(node.description or "") > 60, key
        assert node.code_version, key
    for key in graph.asset_check_keys:
        assert len(graph.get(key).description or "") > 20, key


def test_loading_imports_nothing_heavy() -> None:
    program = f"import sys, housing_assets.definitions; print([m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["-m", "housing_assets.definitions"], ["-w", "workspace.yaml"]])
def test_dagster_validates_the_code_location(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "dagster", "definitions", "validate", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_definitions_load() -> None:
    from housing_assets.definitions import defs

    dg.Definitions.validate_loadable(defs)


if __name__ == "__main__":
    print(json.dumps(snapshot(), indent=2))
