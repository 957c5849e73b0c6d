"""The whole graph through `dagster asset materialize`: exit codes, the gate, caching, the endpoint, termination.

The tests of this file share one installation and follow each other, as the life of an installation does.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import psutil
import pytest

from tests.platform_cli import ROOT, Platform
from tests.waiting import until

REAL_DATA = ROOT.parent / "shared" / "data" / "house_pricing.csv"
STEPS = ["raw_csv", "feature_group", "train_split", "tuned_model", "evaluation_report"]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    platform = Platform(tmp_path_factory.mktemp("platform"))
    yield platform
    platform.stop()


@pytest.fixture(scope="module")
def materialized(platform: Platform) -> Platform:
    done = platform.materialize(config={"evaluation_report": {"rmse_threshold": 1e6}})
    assert done.returncode == 0, done.stdout
    return platform


def test_everything_is_materialized_and_every_check_evaluated(materialized: Platform) -> None:
    from housing_assets.definitions import defs

    graph = defs.resolve_asset_graph()
    with materialized.instance() as instance:
        for key in graph.get_all_asset_keys():
            assert instance.get_latest_materialization_event(key) is not None, key
        found = instance.event_log_storage.get_latest_asset_check_execution_by_key(list(graph.asset_check_keys))
    assert set(found) == set(graph.asset_check_keys)
    blocking = [key for key in graph.asset_check_keys if graph.get(key).blocking]
    assert {str(found[key].status.value) for key in blocking} == {"SUCCEEDED"}


def test_the_summary_prints_a_curl_line_that_works(materialized: Platform) -> None:
    printed = materialized.run("-m", "housing_assets.reporting.summary")
    assert printed.returncode == 0, printed.stdout
    assert "RMSE" in printed.stdout
    line = next(line.strip() for line in printed.stdout.splitlines() if line.strip().startswith("curl "))
    answer = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True)
    assert float(answer.stdout) > 0


def test_metadata_shows_plots_tables_and_figures(materialized: Platform) -> None:
    model, evaluation = materialized.metadata("tuned_model"), materialized.metadata("evaluation_report")
    for plot in (model["learning_curve"], model["importance"], evaluation["predicted_against_actual"]):
        assert plot.startswith("![")
        assert "data:image/png;base64," in plot
    assert evaluation["rmse"] > 0
    assert evaluation["baseline_linear_rmse"] > 0
    assert materialized.metadata("raw_csv")["dagster/row_count"] > 1400


def test_an_unchanged_run_trains_nothing_and_starts_no_ray(materialized: Platform) -> None:
    def made() -> tuple[Any, Any]:
        """Model and version; without the look at the feature group, which is another one in every run."""
        model = materialized.reference("tuned_model")
        model["train"].pop("snapshot")
        return model, materialized.reference("registered_model")

    def order(step: str, among: set[str]) -> dict[str, list[str]]:
        """Metadata in the order in which they are shown, tables with their columns."""
        metadata = materialized.metadata(step)
        tables = {n: [c.name for c in v.schema.columns] for n, v in metadata.items() if hasattr(v, "schema")}
        return {name: tables.get(name, []) for name in metadata if name in among}

    before = made()
    names = {step: set(materialized.metadata(step)) for step in STEPS}
    shown = {step: list(order(step, names[step]).items()) for step in STEPS}
    done = materialized.materialize(config={"evaluation_report": {"rmse_threshold": 1e6}})
    assert done.returncode == 0, done.stdout
    for step in STEPS:
        again = list(order(step, names[step]).items())
        assert again == [entry for entry in shown[step] if entry[0] in dict(again)]
        assert len(again) > 8
    assert dict(shown["tuned_model"])["trials"][:3] == ["trial", "max_depth", "eta"]
    assert [materialized.metadata(step)["reused"] for step in STEPS] == [True] * len(STEPS)
    assert made() == before
    assert done.stdout.count("reused the result") == 4
    assert "start Ray" not in done.stdout


def test_a_failed_gate_blocks_its_run_and_all_later_ones(materialized: Platform) -> None:
    registered = materialized.materializations("registered_model")
    done = materialized.materialize(config={"evaluation_report": {"rmse_threshold": 1.0}})
    assert done.returncode != 0
    assert materialized.materializations("registered_model") == registered

    alone = materialized.materialize("registered_model")
    assert alone.returncode != 0
    reason = r"refused by the quality gate: %s does not start: check rmse_threshold of evaluation_report failed for "
    figures = r"model \w+, evaluation \w+, threshold 1: RMSE [\d,.]+, threshold 1 \(run "
    assert re.search(reason % "registered_model" + figures, alone.stdout), alone.stdout
    served = materialized.materialize("endpoint")
    assert served.returncode != 0
    assert re.search(reason % "endpoint" + figures, served.stdout), served.stdout
    job = ("-m", "dagster", "job", "execute", "-m", "housing_assets.definitions", "-j", "deploy_endpoint")
    elsewhere = replace(materialized, environment={"DAGSTER_HOME": ""}).run(*job)
    assert elsewhere.returncode != 0, "an event log that knows nothing opens nothing"
    assert "registered_model has not been materialized below" in elsewhere.stdout, elsewhere.stdout
    assert "because DAGSTER_HOME is not set" in elsewhere.stdout
    assert materialized.materializations("registered_model") == registered

    evaluated = materialized.materialize("evaluation_report", {"evaluation_report": {"rmse_threshold": 1e6}})
    assert evaluated.returncode == 0, evaluated.stdout
    again = materialized.materialize("registered_model endpoint")
    assert again.returncode == 0, again.stdout


def test_a_wrong_value_ends_the_run_before_any_work(materialized: Platform) -> None:
    before = materialized.materializations("raw_csv")
    done = materialized.materialize(config={"tuned_model": {"subsample_max": 1.5}})
    assert done.returncode != 0
    assert "tuned_model.subsample_max = 1.5: Input should be less than or equal to 1" in done.stdout
    assert materialized.materializations("raw_csv") == before


def test_a_model_that_waits_for_approval_is_not_served_until_it_is_approved(materialized: Platform) -> None:
    serving = materialized.reference("endpoint")["model_digest"]
    config = {
        "tuned_model": {"num_trials": 1, "num_boost_round": 20, "eta_min": 0.2, "seed": 7},
        "evaluation_report": {"rmse_threshold": 1e6},
        "registered_model": {"approval": "manual"},
    }
    done = materialized.materialize("tuned_model evaluation_report registered_model endpoint", config)
    assert done.returncode != 0
    version = materialized.reference("registered_model")
    assert version["status"] == "PendingManualApproval"
    assert "approve" in done.stdout
    assert materialized.reference("endpoint")["model_digest"] == serving

    decision = f"{{ops: {{approve: {{config: {{version: {version['version']}, who: ann, why: good}}}}}}}}"
    file = materialized.folder / "approve.yaml"
    file.write_text(decision)
    approved = materialized.run(
        "-m", "dagster", "job", "execute", "-m", "housing_assets.definitions", "-j", "approve_model", "-c", str(file)
    )
    assert approved.returncode == 0, approved.stdout
    deployed = materialized.materialize("endpoint")
    assert deployed.returncode == 0, deployed.stdout
    endpoint = materialized.reference("endpoint")
    assert endpoint["model_digest"] == version["artifact"]["digest"]
    ping = httpx.get(httpx.URL(endpoint["url"]).join("/ping"))
    assert ping.json()["model_digest"] == endpoint["model_digest"]

    job = ("-m", "dagster", "job", "execute", "-m", "housing_assets.definitions", "-j", "rollback_endpoint")
    back = materialized.run(*job)
    assert back.returncode == 0, back.stdout
    assert materialized.reference("endpoint")["model_digest"] == serving
    assert httpx.get(httpx.URL(endpoint["url"]).join("/ping")).json()["model_digest"] == serving


@pytest.mark.parametrize(
    ("when", "signal_number"),
    [("raw_csv - [pipes] external process successfully opened", signal.SIGTERM), ("trial", signal.SIGINT)],
)
def test_a_terminated_run_is_canceled_within_ten_seconds(
    tmp_path: Path, when: str, signal_number: signal.Signals
) -> None:
    platform = Platform(tmp_path)
    endless = {"num_trials": 200, "num_boost_round": 5000, "scheduler": "none", "eta_max": 0.01, "eta_min": 0.01}
    slow = {"tuned_model": endless}
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        run = subprocess.Popen(
            platform.command("*", slow), cwd=ROOT, env=platform.env, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            until(lambda: when in log.read_text(), process=run, log=log)
            family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
            run.send_signal(signal_number)
            run.wait(10)
        finally:
            run.kill()
    _, alive = psutil.wait_procs(family, timeout=1)
    assert alive == []
    assert platform.runs()[0].status == dg.DagsterRunStatus.CANCELED
    artifacts = tmp_path / "data" / "artifacts"
    # Of the attempt nothing is left, of the search its finished trials, which the next attempt goes on with.
    assert {p.name for p in artifacts.glob("tune_model/*/*") if p.is_dir()} <= {"unfinished"}

    again = platform.materialize("raw_csv feature_group")
    assert again.returncode == 0, again.stdout


def test_the_terminal_of_a_run_whose_step_fails_ends_with_the_reason(tmp_path: Path) -> None:
    """Of `make run`, read from top to bottom: progress, the reason, and last of all what was made and the reason."""
    file = tmp_path / "sales.csv"
    header = "PRICE,YEAR_BUILT,SQUARE_FEET,NUM_BEDROOMS,NUM_BATHROOMS,LOT_ACRES,GARAGE_SPACES,FRONT_PORCH,DECK"
    rows = [f"{300_000 + i},{'?' if i % 5 < 3 else 1990},1500.5,3,2.0,0.5,1,0,1" for i in range(100)]
    file.write_text("\n".join([header, *rows, ""]))
    places = {"DAGSTER_HOME": str(tmp_path / "dagster"), "HOUSING_ROOT": str(tmp_path / "data")}
    done = subprocess.run(
        ["make", f"BIN={Path(sys.executable).parent}", "run"],
        cwd=ROOT,
        env=os.environ | places | {"HOUSING_RAW_CSV": str(file)},
        text=True,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert done.returncode == 2
    printed = re.sub(r"^\d\d:\d\d:\d\d  ", "", done.stdout, flags=re.MULTILINE)
    printed = re.sub(r"^.*pip install .*\n", "", printed, flags=re.MULTILINE)  # where requirements have changed
    printed = re.sub(r"^removed .* which a run that was killed had left behind\n", "", printed, flags=re.MULTILINE)
    [rejected] = (tmp_path / "data").rglob("rejected_rows.csv")
    reason = (
        "raw_csv failed: validate_source: 60 of 100 rows are rejected (60%); at most 0.5% may be "
        "(max_rejected_fraction). Reasons: YEAR_BUILT is not a whole number (60 times, first '?' in line 2 of "
        f"{file}). Remedy: correct the rows. {rejected} lists them, up to "
        "100,000"
    )
    assert re.fullmatch(
        r"raw_csv: validate_source: 1 of 1 fragment, [\d.]+ s\nraw_csv: 100 rows validated\n"
        rf"error: {re.escape(reason)}\n"
        r"Error: Materialization failed\.\n\nRun \w{8} is FAILURE\.\nMade:   nothing\n"
        rf"Error:  {re.escape(reason)}\nmake: \*\*\* \[Makefile:\d+: run\] Error 1\n",
        printed,
    ), printed


def test_a_run_keeps_its_model_although_others_go_through_while_it_halts(tmp_path: Path) -> None:
    platform = Platform(tmp_path, {"HOUSING_NUM_CPUS": "1", "HOUSING_SAMPLE_ROWS": "600"})

    def command(seed: int) -> list[str]:
        search = {"num_trials": 1, "num_boost_round": 20, "eta_min": 0.2, "search_algorithm": "random", "seed": seed}
        return platform.command("*", {"tuned_model": search, "evaluation_report": {"rmse_threshold": 1e6}})[3:]

    def go_on() -> bool:
        """Until the first run halts (true) or ends."""
        first.send_signal(signal.SIGCONT)
        _, status = os.waitpid(first.pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return True
        first.returncode = os.waitstatus_to_exitcode(status)
        return False

    log = tmp_path / "log.txt"
    halting = [sys.executable, "-m", "tests.halting_run", "tuned_model,evaluation_report"]
    with log.open("w") as output:
        first = subprocess.Popen(
            [*halting, *command(42)], cwd=ROOT, env=platform.env, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        for seed in (7, 11):
            assert go_on(), log.read_text()
            other = platform.run("-m", "dagster", *command(seed))
            assert other.returncode == 0, other.stdout
        assert not go_on()
        assert first.returncode == 0, log.read_text()
    finally:
        platform.stop()
        first.kill()

    with platform.instance() as instance:
        made: dict[str, dict[str, Any]] = {}
        for asset in ("tuned_model", "evaluation_report", "registered_model", "endpoint"):
            for record in instance.fetch_materializations(dg.AssetKey(asset), limit=10).records:
                assert record.asset_materialization is not None
                metadata = record.asset_materialization.metadata
                made.setdefault(record.run_id, {})[asset] = {name: value.value for name, value in metadata.items()}
        *others, halted = sorted(made, key=lambda run_id: instance.get_run_stats(run_id).end_time or 0.0)
    digests = {run_id: assets["tuned_model"]["digest"] for run_id, assets in made.items()}
    assert len(set(digests.values())) == 3, "three seeds, three models"
    for run_id, assets in made.items():
        assert assets["endpoint"]["model_digest"] == digests[run_id]
        assert assets["registered_model"]["rmse"] == assets["evaluation_report"]["rmse"]
        assert assets["registered_model"]["lineage"]["run_id"] == run_id
    # Each run deploys the version that it has registered: what is served is that of the last deployment.
    assert platform.reference("endpoint")["model_digest"] == digests[halted]
    assert len(others) == 2


@pytest.mark.skipif(not REAL_DATA.exists(), reason=f"{REAL_DATA.name} is not beside the project")
def test_the_article_s_data_reaches_the_promised_error(tmp_path: Path) -> None:
    platform = Platform(tmp_path, {"HOUSING_RAW_CSV": os.fspath(REAL_DATA)})
    command = platform.command("*", {"tuned_model": {}})
    done = platform.run(*command[1:])
    platform.stop()
    assert done.returncode == 0, done.stdout
    assert platform.metadata("raw_csv")["rejected_rows"] == 1
    assert platform.metadata("evaluation_report")["rmse"] <= 6000
