"""The deployment files are what Dagster, dg, Docker and CI understand."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.instance.config import dagster_instance_config
from dagster._core.op_concurrency_limits_counter import GlobalOpConcurrencyLimitsCounter
from dagster._core.workspace.load import location_origins_from_yaml_paths

from housing_assets.definitions import defs
from tests import ROOT
from tests.ports import free_port
from tests.waiting import until

POSTGRES_FILE = ROOT / "deploy" / "dagster.postgres.yaml"
PG = {"HOST": "127.0.0.1", "PORT": "5432", "DB": "dagster", "USER": "dagster", "PASSWORD": "x"}


@pytest.fixture(autouse=True)
def postgres_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PG.items():
        monkeypatch.setenv(f"DAGSTER_PG_{name}", value)


def instance_config(file: Path, home: Path) -> dict[str, Any]:
    """What Dagster makes of the file. Raises `DagsterInvalidConfigError`."""
    (home / "dagster.yaml").write_bytes(file.read_bytes())
    return dict(dagster_instance_config(str(home))[0])


@pytest.mark.parametrize("file", [ROOT / "deploy" / "dagster.yaml", POSTGRES_FILE], ids=["one person", "team"])
def test_an_instance_file_is_valid(file: Path, tmp_path: Path) -> None:
    config = instance_config(file, tmp_path)
    assert config["run_monitoring"]["enabled"]
    # Anything else keeps a termination from reaching the steps.
    assert config["run_monitoring"]["max_resume_run_attempts"] == 0
    assert not config["telemetry"]["enabled"]


def test_a_wrong_instance_file_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(POSTGRES_FILE.read_text().replace("purge_after_days: 90", "purge_after_days: ninety"))
    with pytest.raises(dg.DagsterInvalidConfigError):
        instance_config(wrong, tmp_path)


def test_the_teams_file_has_storage_queue_pools_and_retention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = instance_config(POSTGRES_FILE, tmp_path)
    assert set(config["storage"]) == {"postgres"}
    assert config["concurrency"]["pools"] == {"default_limit": 1, "granularity": "run"}
    assert config["concurrency"]["runs"]["max_concurrent_runs"] > 1
    assert set(config["retention"]) == {"schedule", "sensor", "auto_materialize"}
    monkeypatch.delenv("DAGSTER_PG_PASSWORD")
    with pytest.raises(dg.DagsterInvalidConfigError, match="DAGSTER_PG_PASSWORD"):
        dg.DagsterInstance.from_config(str(tmp_path))


def test_what_runs_on_ray_shares_one_pool() -> None:
    graph = defs.resolve_asset_graph()
    pools = {key.to_user_string(): graph.get(key).pools for key in graph.get_all_asset_keys()}
    on_ray = {key.to_user_string() for key in graph.get_all_asset_keys() if "ray" in graph.get(key).kinds}
    assert {name for name, pool in pools.items() if pool} == on_ray
    assert {pool for of_asset in pools.values() for pool in of_asset or ()} == {"ray"}


def test_a_second_run_on_ray_waits_while_the_watch_of_the_endpoint_passes(tmp_path: Path) -> None:
    """By the daemon's own arithmetic, with the team's file (on SQLite)."""
    content = yaml.safe_load(POSTGRES_FILE.read_text())
    del content["storage"]
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(content))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:

        def run_of(job: str, status: dg.DagsterRunStatus) -> dg.DagsterRun:
            return instance.create_run_for_job(defs.resolve_job_def(job), status=status)

        training = run_of("retrain", dg.DagsterRunStatus.STARTED)
        waiting = [
            run_of(job, dg.DagsterRunStatus.NOT_STARTED) for job in ("retrain", "watch_endpoint", "deploy_endpoint")
        ]

        def blocked() -> list[bool]:
            storage = instance.event_log_storage
            counter = GlobalOpConcurrencyLimitsCounter(
                instance,
                waiting,
                instance.get_run_records(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])),
                storage.get_concurrency_keys(),
                storage.get_pool_limits(),
                pool_granularity=instance.get_concurrency_config().pool_config.pool_granularity,
            )
            return [counter.is_blocked(run) for run in waiting]

        blocked()  # the daemon's first look makes the pool
        assert blocked() == [True, False, False]
        instance.report_run_canceled(training)
        assert blocked() == [False, False, False]


def test_the_workspace_file_names_the_code_location() -> None:
    [origin] = location_origins_from_yaml_paths([str(ROOT / "workspace.yaml")]) or []
    assert origin.location_name == "housing_assets"


def test_dagster_plus_finds_the_definitions() -> None:
    """`dagster_cloud.yaml`, and what replaces it for `dg`."""
    [location] = yaml.safe_load((ROOT / "dagster_cloud.yaml").read_text())["locations"]
    module = location["code_source"]["module_name"]
    assert set(location) <= {"location_name", "code_source", "build", "working_directory", "executable_path", "image"}
    assert (ROOT / location["build"]["directory"]).is_dir()
    build = yaml.safe_load((ROOT / "build.yaml").read_text())
    assert set(build) <= {"directory", "registry"}
    assert (ROOT / build["directory"]).resolve() == ROOT

    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tool["dg"]["directory_type"] == "project"
    project = tool["dg"]["project"]
    assert project["code_location_name"] == location["location_name"]
    assert project["code_location_target_module"] == tool["dagster"]["module_name"] == module
    assert (ROOT / project["root_module"] / "__init__.py").is_file()


def test_dg_recognizes_the_project() -> None:
    from dagster_shared.utils.config import discover_config_file

    found = discover_config_file(ROOT / "housing_assets", lambda config: config["directory_type"] == "project")
    assert found == ROOT / "pyproject.toml"


INSTRUCTIONS = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of each, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", dockerfile.read_text()))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", ["Dockerfile", "deploy/Dockerfile.code-location"])
def test_a_dockerfile_copies_what_exists_and_installs_extras_that_exist(name: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = instructions(ROOT / name)
    assert {instruction for instruction, _ in found} <= INSTRUCTIONS
    for _, arguments in [entry for entry in found if entry[0] == "COPY"]:
        *sources, _ = shlex.split(arguments)
        for source in sources:
            assert (ROOT / source).exists(), source
    asked = re.findall(r"\.\[([a-z,]+)\]", " ".join(arguments for _, arguments in found))
    assert {extra for group in asked for extra in group.split(",")} <= set(extras)


def test_the_code_location_of_the_image_answers() -> None:
    """Its command, as it stands, and its health check."""
    found = instructions(ROOT / "deploy" / "Dockerfile.code-location")
    command = json.loads(next(arguments for instruction, arguments in found if instruction == "CMD"))
    check = json.loads(
        next(arguments for instruction, arguments in found if instruction == "HEALTHCHECK").partition("CMD ")[2]
    )
    port = str(free_port())
    command = [word.replace("4000", port).replace("0.0.0.0", "127.0.0.1") for word in command]
    check = [word.replace("4000", port) for word in check]
    assert command[0] == check[0] == "dagster"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DAGSTER_")}
    server = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        asked = [sys.executable, "-m", *check]
        until(lambda: subprocess.run(asked, cwd=ROOT, env=environment, check=False).returncode == 0, process=server)
    finally:
        server.terminate()
        server.wait(60)
    assert server.returncode == 0


def test_the_ci_workflow_runs_commands_that_exist() -> None:
    workflow = yaml.safe_load((ROOT / "deploy" / "github-workflow.yml").read_text())
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    lines = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    commands = [shlex.split(part) for line in lines for part in line.split("&&")]
    for command in commands:
        if command[0] == "make":
            assert set(command[1:]) <= targets, command
        else:
            assert command[0] in ("mkdir", "cp", ".venv/bin/dagster", ".venv/bin/python"), command
    [materialize] = [c for c in commands if c[1:3] == ["asset", "materialize"]]
    assert materialize[1:] == ["asset", "materialize", "--select", "*", "-m", "housing_assets.definitions"]
    assert ["make", "test"] in commands
    assert workflow["permissions"] == {"contents": "read"}
    assert "continue-on-error" not in str(workflow), "the exit status counts"
    for program, *words in commands:
        if program == ".venv/bin/python":
            assert (ROOT / (words[1].replace(".", "/") + ".py")).is_file()
        elif program == ".venv/bin/dagster":
            help_of = [sys.executable, "-m", "dagster", *words[:2], "--help"]
            assert subprocess.run(help_of, cwd=ROOT, capture_output=True, check=False).returncode == 0, words


def test_every_file_is_in_the_table_of_the_readme() -> None:
    text = (ROOT / "deploy" / "README.md").read_text()
    for file in (ROOT / "deploy").iterdir():
        if file.name != "README.md":
            assert f"]({file.name})" in text, file.name
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / "deploy" / link).exists(), link
