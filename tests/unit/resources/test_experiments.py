"""Tuning runs in MLflow: the real client, a SQLite database, artifacts in a folder."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

from housing_assets.deployments import load_resources
from resources.services.experiments import MlflowTracking, NoTracking
from step_scripts.runner.contract import Artifact, StepResult, file_info

TRIALS = [
    {
        **{"trial": n, "parameters": {"max_depth": 3 + n, "eta": 0.1}, "rmse": rmse, "rounds": 20, "best_rounds": 18},
        **{"seconds": 1.5, "status": "completed" if rmse else "failed", "stopped_by": "all_rounds"},
    }
    for n, rmse in enumerate([5000.0, None, 4000.0])
]
CURVE = {"round": [1, 10, 20], "train": [9.0, 5.0, 3.0], "validation": [9.5, 6.0, 4.0], "best_rounds": 20}


def search(folder: Path) -> StepResult:
    for name, content in (("report/trials.json", TRIALS), ("report/learning_curve.json", CURVE), ("model/m.json", {})):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))

    def artifact(name: str) -> Artifact:
        root = folder / name
        return Artifact.of(str(root), [file_info(str(p), str(root)) for p in sorted(root.iterdir())])

    return StepResult(
        step="tune_model",
        request_digest="d" * 32,
        code_version="c",
        created_at=datetime(2026, 11, 23, tzinfo=UTC),
        params={"num_trials": 3, "table": {}},
        inputs={},
        outputs={name: artifact(name) for name in ("model", "report")},
        metrics={"validation_rmse": 4000.0},
        details={"best_parameters": {"max_depth": 5}},
    )


def test_a_search_is_recorded_once_with_trials_curve_and_artifacts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = MlflowTracking(tracking_uri=uri, experiment="e", artifact_location=f"file://{tmp_path}/artifacts")
    found = tracking.record(search(tmp_path), "run-1")
    assert tracking.record(search(tmp_path), "run-1")["mlflow_run_id"] == found["mlflow_run_id"]

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 4
    parent = client.get_run(found["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"num_trials": "3", "max_depth": "5"}
    assert parent.data.metrics["validation_rmse"] == 4000.0
    assert parent.data.tags["dagster.run_id"] == "run-1"
    curve = client.get_metric_history(parent.info.run_id, "validation_rmse_by_round")
    assert [(point.step, point.value) for point in curve] == [(1, 9.5), (10, 6.0), (20, 4.0)]
    trials = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(trials) == {"trial 0", "trial 1", "trial 2"}
    assert trials["trial 1"].info.status == "FAILED"
    assert trials["trial 2"].data.metrics["rmse"] == 4000.0
    assert (tmp_path / "artifacts" / parent.info.run_id / "artifacts" / "model" / "m.json").exists()
    assert (tmp_path / "artifacts" / parent.info.run_id / "artifacts" / "report" / "trials.json").exists()

    monkeypatch.setattr(MlflowTracking, "_client", lambda _: client)
    served = MlflowTracking(tracking_uri="http://127.0.0.1:5000", experiment="e").record(search(tmp_path), "run-1")
    assert served["mlflow_run"].url.endswith(f"/#/experiments/{experiment.experiment_id}/runs/{parent.info.run_id}")


def test_without_configuration_nothing_is_imported_or_written(tmp_path: Path) -> None:
    assert isinstance(load_resources({})["experiments"], NoTracking)
    program = "import sys; from housing_assets.definitions import defs; print('mlflow' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
    assert NoTracking().record(search(tmp_path), "run-1") == {}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "report"]


class Log:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def test_a_server_that_is_down_costs_a_warning(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        log, begun = Log(), time.monotonic()
        found = MlflowTracking(tracking_uri=uri).try_to_record(search(tmp_path), "run-1", log)
    assert time.monotonic() - begun < 70  # a minute; MLflow alone takes four
    assert set(found) == {"not_recorded"}
    assert log.warnings == [
        f"search dddddddd is not recorded in the experiment tracker, and the run goes on: {found['not_recorded']}"
    ]
    assert "refused" in found["not_recorded"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HOUSING_MLFLOW_URI", "https://ann:s3cret@mlflow.example.com"),
        ("HOUSING_MLFLOW_URI", "https://s3cret@mlflow.example.com/x"),
        ("HOUSING_MLFLOW_URI", "postgresql://ann:s3cr/et@db/mlflow"),
        ("HOUSING_MLFLOW_URI", "postgresql://db/mlflow?user=ann&password=s3cret"),
        ("HOUSING_MLFLOW_ARTIFACTS", "ftp://ann:s3cret@host/x"),
        ("HOUSING_RAW_CSV", "s3://key:s3cret@bucket/sales.csv"),
        ("HOUSING_LANDING", "s3://key:s3cret@bucket/landing"),
        ("RAY_ADDRESS", "ray://ann:s3cret@head:10001"),
        ("AWS_ENDPOINT_URL_S3", "https://ann:s3cret@minio:9000"),
    ],
)
def test_a_password_in_a_url_is_refused_without_being_shown(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has a user name or a password in its URL") as caught:
        load_resources({name: value})
    assert "s3cr" not in str(caught.value)
    assert ("MLFLOW_TRACKING_PASSWORD" in str(caught.value)) == (name == "HOUSING_MLFLOW_URI")


@pytest.mark.parametrize(
    "uri", ["sqlite:////tmp/a:b@c.db", "http://host:5000/x@y", "postgresql://ann@db/mlflow", "arn:aws:x:y:1:z/n"]
)
def test_other_urls_are_none_of_its_business(uri: str) -> None:
    assert load_resources({"HOUSING_MLFLOW_URI": uri, "HOUSING_RAW_CSV": "/data/a:b@c/*.csv"})
