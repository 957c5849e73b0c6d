"""The code location: what it holds, how lightly it loads."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

import housing_assets
from housing_assets import code_location
from housing_assets.deployments import load_resources
from tests import ROOT

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
    """After an intended change: `python -m tests.unit.housing_assets.test_code_location >
    tests/unit/housing_assets/definitions.json`."""
    found, kept = snapshot(), json.loads(SNAPSHOT.read_text())
    differing = {
        name: (found.get(name), kept.get(name)) for name in {*found, *kept} if found.get(name) != kept.get(name)
    }
    assert differing == {}


def test_every_job_schedule_and_sensor_of_a_module_is_in_the_definitions() -> None:
    """One that was forgotten there would be no error, and would never run."""
    from housing_assets.definitions import defs

    repository = defs.get_repository_def()
    known = {job.name for job in repository.get_all_jobs()}
    known |= {one.name for one in (*repository.schedule_defs, *repository.sensor_defs)}
    kinds = (dg.JobDefinition, dg.ScheduleDefinition, dg.SensorDefinition, type(dg.define_asset_job("any")))
    for info in pkgutil.walk_packages(housing_assets.__path__, "housing_assets."):
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, kinds):
                assert value.name in known, f"{value.name} of {info.name}"


def test_parts_ask_for_the_whole_only_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from housing_assets.definitions import defs

    assert code_location.definitions() is defs
    monkeypatch.setattr(code_location, "_registered", [])
    with pytest.raises(RuntimeError, match=r"import housing_assets\.definitions first"):
        code_location.asset_keys()


def test_every_asset_is_described_and_versioned() -> None:
    from housing_assets.definitions import defs

    graph = defs.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert len(node.description or "") > 60, key
        assert node.code_version, key
    for key in graph.asset_check_keys:
        assert len(graph.get(key).description or "") > 20, key


# Neither credentials nor a region; a proxy and a DNS suffix that nothing answers at.
NO_AWS = {
    "HOUSING_DEPLOYMENT": "sagemaker",
    "HOUSING_ROOT": "s3://bucket/housing",
    "HOUSING_ROLE_ARN": "arn:aws:iam::123456789012:role/housing",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
}
DEPLOYMENTS = pytest.mark.parametrize("variables", [{}, NO_AWS], ids=["local", "sagemaker"])


@DEPLOYMENTS
def test_loading_imports_nothing_heavy(variables: dict[str, str]) -> None:
    program = f"import sys, housing_assets.definitions; print([m for m in {HEAVY!r} if m in sys.modules])"
    environment = os.environ | variables
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


@DEPLOYMENTS
@pytest.mark.parametrize("arguments", [["-m", "housing_assets.definitions"], ["-w", "workspace.yaml"]])
def test_dagster_validates_the_code_location(arguments: list[str], variables: dict[str, str]) -> None:
    command = [sys.executable, "-m", "dagster", "definitions", "validate", *arguments]
    environment = os.environ | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"HOUSING_DEPLOYMENT": "azure"}, "HOUSING_DEPLOYMENT='azure': choose one of local, sagemaker"),
        ({"HOUSING_DEPLOYMENT": "sagemaker"}, "HOUSING_ROOT is not set: the s3:// prefix"),
        (NO_AWS | {"HOUSING_ROOT": "data"}, "HOUSING_ROOT='data': with HOUSING_DEPLOYMENT=sagemaker it must be"),
        (NO_AWS | {"HOUSING_ROLE_ARN": ""}, "HOUSING_ROLE_ARN is not set"),
        (NO_AWS | {"HOUSING_INSTANCE_COUNT": "two"}, "HOUSING_INSTANCE_COUNT='two' is not an integer"),
        (NO_AWS | {"HOUSING_SAGEMAKER_CONFIG": "/nowhere.yaml"}, "HOUSING_SAGEMAKER_CONFIG='/nowhere.yaml' cannot be"),
    ],
)
def test_wrong_settings_name_the_variable(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_resources(variables)


def test_a_file_configures_the_resources_of_sagemaker(tmp_path: Path) -> None:
    file = tmp_path / "sagemaker.yaml"
    file.write_text(
        """
        compute: {job: {use_spot: true, instance_count: 4}, steps: {evaluate_model: {instance_count: 1}}}
        feature_store: {online_store: true}
        """
    )
    resources = load_resources(
        NO_AWS | {"HOUSING_SAGEMAKER_CONFIG": str(file), "HOUSING_INSTANCE_TYPE": "ml.c5.xlarge"}
    )
    job = resources["compute"].job
    assert (job.use_spot, job.instance_count, job.instance_type) == (True, 4, "ml.c5.xlarge")
    assert job.role_arn == NO_AWS["HOUSING_ROLE_ARN"]
    assert resources["compute"].config_of("evaluate_model").instance_count == 1
    assert resources["feature_store"].online_store
    file.write_text("computer: {}")
    with pytest.raises(ValueError, match="computer is unknown; did you mean compute"):
        load_resources(NO_AWS | {"HOUSING_SAGEMAKER_CONFIG": str(file)})


def test_definitions_load() -> None:
    from housing_assets.definitions import defs

    dg.Definitions.validate_loadable(defs)


if __name__ == "__main__":
    print(json.dumps(snapshot(), indent=2))
