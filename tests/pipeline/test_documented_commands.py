"""The commands of README and `docs/`, run as they stand there, page after page, in one copy of the project.

Every command that a page tells people to run is run here (those of `docs/sagemaker.md` in
`tests/sagemaker/test_sagemaker_documentation.py`), or stands in `NOT_RUN` with the reason and what covers it instead.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from housing_assets.checks.alerts import finished_checks
from housing_assets.sample_data import write_sample
from resources.model_registry.base import ModelVersion
from resources.model_registry.local import LocalModelRegistry
from tests.documented import ROOT, Reader, commands, copy_of_the_project, mentions, pages, programs
from tests.ports import free_port

DAYS = ("2026-11-20", "2026-11-23")
PAGES = ("README.md", "docs/tutorial.md", "docs/operations.md")
ELSEWHERE = ("docs/sagemaker.md",)

INSTALLS = "would change the environment that runs the tests; test_documentation.py looks the extras up, CI installs"
NEEDS_POSTGRES = "needs a PostgreSQL server; test_postgres.py runs on one, test_deployment_files.py loads the files"
NEEDS_CLUSTER = "needs a Ray cluster; test_clusters.py joins one"
NOT_RUN = {
    "make test": "runs all tests, this one among them",
    "make rehearse IMAGE=aws": "fetches a gigabyte; test_code_package.py and test_inference.py look at what jobs and "
    "endpoints without an image of the project get",
    "make rehearse": "minutes; tests/sagemaker/test_platform.py runs the same graph on the same emulator",
    ".venv/bin/python -m pip install -c constraints.txt -e '.[mlflow]'": INSTALLS,
    ".venv/bin/python -m pip install -c constraints.txt -e '.[sagemaker]'": INSTALLS,
    ".venv/bin/dagster asset materialize -m housing_assets.definitions --select '*'": (
        "five jobs on SageMaker; tests/sagemaker/test_platform.py materializes everything there"
    ),
    "aws cloudformation deploy --template-file deploy/sagemaker.cfn.yaml --stack-name housing --capabilities "
    "CAPABILITY_NAMED_IAM --parameter-overrides BucketName=my-bucket": (
        "needs AWS's command line; tests/sagemaker/test_account.py deploys the template with boto3"
    ),
    "export RAY_ADDRESS=10.0.0.5:6379": NEEDS_CLUSTER,
    "export RAY_AUTH_TOKEN_PATH=$HOME/.ray/cluster_token": NEEDS_CLUSTER,
    "pip install -c constraints.txt '.[sagemaker,postgres]'": INSTALLS,
    "export DAGSTER_HOME=/srv/dagster": NEEDS_POSTGRES,
    "export DAGSTER_PG_HOST=... DAGSTER_PG_PORT=5432 DAGSTER_PG_DB=dagster DAGSTER_PG_USER=... "
    "DAGSTER_PG_PASSWORD=...": NEEDS_POSTGRES,
    "cp deploy/dagster.postgres.yaml $DAGSTER_HOME/dagster.yaml": NEEDS_POSTGRES,
    "dagster instance concurrency set ray 1": NEEDS_POSTGRES,
    "dagster-webserver --workspace workspace.yaml --host 0.0.0.0": NEEDS_POSTGRES,
    "dagster-daemon run --workspace workspace.yaml": NEEDS_POSTGRES,
    "python -m tests.sagemaker_emulator --port 5112": "run from docs/sagemaker.md",
    """curl -d '{"kind": "kill_host", "job": "train-*", "host": "algo-2", "after": 5}' """
    "$AWS_ENDPOINT_URL/_emulator/faults": "needs a job to kill; tests/sagemaker/test_emulator_faults.py sends such",
}
# Commands in running text that no block has, and what runs them.
_TAKEOVER = "tests/unit/step_scripts/feature_store/test_iceberg_table.py"
MENTIONED = {
    "python -m step_scripts.feature_store replay <root> <group>": _TAKEOVER,
    "python -m step_scripts.feature_store import <root> <group>": _TAKEOVER,
    "python -m step_scripts.runner request.json": "tests/unit/step_scripts/runner/test_runner.py",
    "export HOUSING_CONFIG=my_config.yaml": "tests/unit/housing_assets/test_launch_defaults.py",
    "export HOUSING_RAW_CSV=/path/to/sales.csv": "HOUSING_RAW_CSV=/path/to/sales.csv make run",
    "python -m housing_assets.reporting.summary": "make run",
    "python -m tests.unit.project.configuration_page": "tests/unit/project/test_documentation.py calls it",
    "dagster dev": "make ui",
    "make run CONFIG=file.yaml": "make run CONFIG=my_config.yaml",
    "dagster asset materialize ... --config file.yaml": "make run CONFIG=my_config.yaml",
    "dagster asset materialize --select '*'": "make run",
    "dagster instance concurrency set ray 4": "in NOT_RUN with another number",
    "export AWS_ENDPOINT_URL=…": "tests/sagemaker/test_sagemaker_documentation.py: what the emulator prints",
}
# By the end of a command, what it prints when it has done its work.
SAID = {
    "make help": "make rehearse",
    "make run CONFIG=my_config.yaml": "Endpoint housing serves version housing/",
    "approve_model -c decision.yaml": "is Approved: better on every slice (ann)",
    "-j deploy_endpoint -c deploy.yaml": "Endpoint housing serves housing/",
    "-j rollback_endpoint": "Endpoint housing serves housing/",
    "reject_model -c second_thoughts.yaml": "is Rejected: complaints from the north (ann)",
    "housing_assets.reporting.lineage": "data file",
    "-j teardown": "would remove endpoint housing",
    "-c teardown.yaml": "removed endpoint housing",
}
# These end what others need: the reader types them when all pages are read.
LAST = ("make stop", "make clean-data")


def test_every_documented_command_is_run_or_excepted() -> None:
    """Somebody who adds a command to a page sees it fail here, unless a test runs it."""
    walked = {command for page in (*PAGES, *ELSEWHERE) for command in commands(ROOT / page)}
    known = walked | NOT_RUN.keys()
    for page in pages():
        assert [c for c in commands(page) if c not in known] == [], page
        runs = [c.replace(".venv/bin/", "") for c in known]
        new = [m for m in mentions(page) if m not in MENTIONED and not any(f"{c} ".startswith(f"{m} ") for c in runs)]
        # Measurements are made by hand; their module stands there for those who want to repeat them.
        assert [m for m in new if not m.startswith("python -m benchmarks.")] == [], page
    every = {command for page in pages() for command in commands(page)}
    assert NOT_RUN.keys() <= every, "an exception that no page has"
    assert MENTIONED.keys() <= {m for page in pages() for m in mentions(page)}, "an exception that no page has"


def test_every_job_has_a_command() -> None:
    from housing_assets.definitions import defs

    told = " ".join(command for page in PAGES for command in commands(ROOT / page))
    jobs = {job.name for job in defs.resolve_all_job_defs() if not job.name.startswith("__")}
    # These are `make run` and `dagster asset materialize` under a name; lineage is its command's table.
    for job in jobs - {"refresh", "ingest", "lineage"}:
        assert f"-j {job}" in told, job


def endpoint_url(project: Path) -> str:
    """Where the endpoint is: another port, if somebody else has the usual one."""
    files = (project / "data" / "references" / "endpoint").glob("*.json")
    latest = max(files, key=lambda file: file.stat().st_mtime_ns)
    return str(json.loads(latest.read_text())["value"]["url"]).partition("/endpoints/")[0]


def waiting(project: Path) -> ModelVersion:
    """The version that waits for a decision."""
    registry = LocalModelRegistry(root=str(project / "data" / "model_registry"))
    version = registry.latest("housing", "PendingManualApproval")
    assert version is not None, "no version waits"
    return version


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("documentation")
    project = copy_of_the_project(folder / "housing-assets")
    environment = {"HOUSING_SAMPLE_ROWS": "1000", "UI_PORT": str(free_port()), "PYTHONWARNINGS": "ignore"}
    # The same sales as the generated ones, also in the landing place: what was trained on is not trained on again.
    header, *lines = write_sample(folder / "sales.csv", rows=1000).read_text().splitlines(keepends=True)
    for day, part in zip(DAYS, (lines[300:], lines[:300]), strict=True):
        file = folder / "landing" / day / "sales.csv"
        file.parent.mkdir(parents=True)
        file.write_text(header + "".join(part))
        os.utime(file, (1.7e9, 1.7e9))
    reader = Reader(
        project,
        environment,
        own_values={
            "/path/to/sales.csv": str(folder / "sales.csv"),
            "/data/landing": str(folder / "landing"),
            "s3://my-bucket/housing": str(project / "data"),
            "http://127.0.0.1:8080": lambda: endpoint_url(project),
            "{version: 2": lambda: f"{{version: {waiting(project).version}",
            "num_trials: 20": "num_trials: 8",
            "num_trials: 16": "num_trials: 2",
        },
        servers={"make ui": f"http://127.0.0.1:{environment['UI_PORT']}/server_info"},
    )
    try:
        yield reader
    finally:
        reader.new_shell()
        for command in LAST:
            reader.type(command)
        assert not (project / "data").exists()
        for command, seconds in sorted(reader.seconds.items(), key=lambda item: -item[1]):
            print(f"{seconds:6.1f} s  {command}")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_work(reader: Reader, page: str) -> None:
    """In order. A line that another page has had is not typed again."""
    reader.open(ROOT / page)
    for command in commands(ROOT / page):
        if command not in NOT_RUN and command not in LAST and (
            command not in reader.outputs or command.startswith("export ")
        ):  # fmt: skip
            output = reader.type(command)
            for line in re.findall(r"^ +(curl .*)$", output, re.MULTILINE):
                answer = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True, timeout=60)
                assert float(answer.stdout) > 0, line
    for program in programs(ROOT / page):
        if "invoke_endpoint" in program:
            (reader.project / "request.py").write_text(reader.as_own(program))
            assert re.search(r"^[\[\s]*[1-9]\d+\.\d+", reader.type(".venv/bin/python request.py"), re.MULTILINE)


@pytest.mark.slow
def test_what_they_did(reader: Reader) -> None:
    """A look at what was printed: each of them did its work, and did not only end well."""
    wrong = {
        command: output
        for ending, expected in SAID.items()
        for command, output in reader.outputs.items()
        if command.endswith(ending) and expected not in output
    }
    assert wrong == {}
    assert all(any(command.endswith(ending) for command in reader.outputs) for ending in SAID)
    instance = dg.DagsterInstance.from_config(str(reader.project / ".dagster"))
    with instance:
        found = instance.fetch_materializations(dg.AssetKey("feature_group"), limit=1).records[0].asset_materialization
        assert found is not None
        assert found.metadata["rows_live"].value == 999, "one of the generated rows is invalid"
        assert set(DAYS) <= instance.get_materialized_partitions(dg.AssetKey("feature_group"))
        started = {state.instigator_name for state in instance.all_instigator_state() if state.is_running}
        assert started == {"failed_runs", "weekly_retraining"}
        # A watch that finds nothing wrong prints nothing.
        assert any(command.endswith("-j watch_endpoint") for command in reader.outputs)
        [(health, _)] = finished_checks(instance, dg.AssetCheckKey(dg.AssetKey("endpoint"), "endpoint_health"), limit=1)
        assert health.passed
        failed = [run.job_name for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE]))]
        assert failed == []


@pytest.mark.slow
def test_a_day_without_files_says_so(reader: Reader) -> None:
    reader.new_shell()
    for command in commands(ROOT / "docs" / "operations.md"):
        if command.startswith(("export DAGSTER_HOME", "export HOUSING_LANDING")):
            reader.type(command)
        elif command.endswith("--partition 2026-11-23"):
            with pytest.raises(AssertionError, match="no file of 2026-11-22 is ready in"):
                reader.type(command.replace("2026-11-23", "2026-11-22"))
            return
    raise AssertionError("the page ingests no day")
