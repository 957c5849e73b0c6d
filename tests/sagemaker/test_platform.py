"""The whole graph with `HOUSING_DEPLOYMENT=sagemaker`, through the command line, beside the same graph on local Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import boto3
import numpy as np
import polars as pl
import pytest

from housing_assets.sample_data import write_sample
from step_scripts.model import load_model
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact
from tests.aws_account import deploy
from tests.platform_cli import Platform
from tests.rehearse import platform_environment

if TYPE_CHECKING:
    from tests.sagemaker_emulator import SageMakerEmulator

pytestmark = pytest.mark.slow
BUCKET = "platform"
# Deterministic: what a trial is asked to do depends neither on the others nor on who ends first.
CONFIG: dict[str, dict[str, Any]] = {
    "tuned_model": {
        **{"num_trials": 3, "num_boost_round": 60, "eta_min": 0.1, "search_algorithm": "random", "scheduler": "none"},
        # Every tree sees all rows: which rows one would draw depends on how they are spread over workers.
        **{"early_stopping_rounds": 60, "subsample_min": 1.0, "subsample_max": 1.0},
    },
    "evaluation_report": {"rmse_threshold": 1e6},
}
STEPS = ("raw_csv", "feature_group", "train_split", "tuned_model", "evaluation_report")


@dataclass
class Both:
    """The same platform in both deployments, on the same input, after one run of everything in each."""

    local: Platform
    remote: Platform
    s3: Any
    sagemaker: Any
    others: frozenset[str]

    def reference(self, where: str, asset: str) -> dict[str, Any]:
        if where == "local":
            return self.local.reference(asset)
        key = self.remote.metadata(asset)["reference"].removeprefix(f"s3://{BUCKET}/")
        return json.loads(self.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())["value"]

    def artifact(self, where: str, asset: str, member: str) -> Artifact:
        return Artifact.model_validate(self.reference(where, asset)[member])

    def rows(self, where: str, split: str) -> pl.DataFrame:
        frames = []
        for uri in self.artifact(where, f"{split}_split", "rows").file_uris(".parquet"):
            with storage.open_input(uri) as file:
                frames.append(pl.read_parquet(file))
        return pl.concat(frames).sort("record_id")

    def jobs(self) -> list[str]:
        """The platform's jobs; other tests have jobs of their own on this emulator."""
        return sorted(all_jobs(self.sagemaker) - self.others)


def all_jobs(sagemaker: Any) -> set[str]:
    names: set[str] = set()
    for kind in ("Training", "Processing"):
        pages = sagemaker.get_paginator(f"list_{kind.lower()}_jobs").paginate(NameContains="housing-")
        names.update(job[f"{kind}JobName"] for page in pages for job in page[f"{kind}JobSummaries"])
    return names


@pytest.fixture(scope="module")
def both(emulator: SageMakerEmulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("both")
    clients = {
        service: boto3.client(
            service, endpoint_url=emulator.endpoint_url, region_name="us-east-1",
            aws_access_key_id="testing", aws_secret_access_key="testing",
        )
        for service in ("s3", "sagemaker")
    }  # fmt: skip
    account = deploy(emulator, BUCKET, Name="platform", CreateLogGroups="false")
    source = write_sample(folder / "sales.csv", rows=1500)
    # The record's event time is the file's: the same content then has the same events in both.
    clients["s3"].upload_file(str(source), BUCKET, "sales/sales.csv")
    for name in ("local", "remote"):
        (folder / name).mkdir()
    local = Platform(folder / "local", {"HOUSING_RAW_CSV": str(source), "HOUSING_NUM_CPUS": "2"})
    variables = platform_environment(folder, emulator, BUCKET, hosts=2, account=account)
    remote = Platform(folder / "remote", variables | {"HOUSING_RAW_CSV": f"s3://{BUCKET}/sales/sales.csv"})
    others = frozenset(all_jobs(clients["sagemaker"]))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in emulator.environment().items():
            patch.setenv(name, value)
        try:
            with ThreadPoolExecutor() as pool:
                for done in pool.map(lambda p: p.materialize(config=CONFIG, timeout=900), (local, remote)):
                    assert done.returncode == 0, done.stdout
            yield Both(local, remote, clients["s3"], clients["sagemaker"], others)
        finally:
            local.stop()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_splits_hold_the_same_records(both: Both, split: str) -> None:
    local, remote = both.rows("local", split), both.rows("remote", split)
    assert local["record_id"].to_list() == remote["record_id"].to_list()
    assert local.equals(remote.select(local.columns))


def test_the_models_and_their_evaluations_agree(both: Both) -> None:
    local, remote = (both.reference(where, "tuned_model") for where in ("local", "remote"))
    assert local["parameters"] == pytest.approx(remote["parameters"])
    assert remote["metrics"]["validation_rmse"] == pytest.approx(local["metrics"]["validation_rmse"], rel=0.02)
    rows = both.rows("local", "test")
    predictions = []
    for where in ("local", "remote"):
        model = load_model(both.artifact(where, "tuned_model", "model").uri, threads=1)
        predictions.append(model.predict(rows.select(model.table.features)))
    assert np.corrcoef(*predictions)[0, 1] > 0.999
    metrics = [both.reference(where, "evaluation_report")["metrics"] for where in ("local", "remote")]
    assert metrics[0].keys() == metrics[1].keys()
    for name, value in metrics[0].items():
        assert metrics[1][name] == pytest.approx(value, rel=0.05), name
    for name in ("baseline_linear_rmse", "baseline_mean_rmse"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-6), name


def test_every_step_ran_on_the_hosts_of_a_job(both: Both) -> None:
    for step in STEPS:
        metadata = both.remote.metadata(step)
        assert metadata["instance_count"] == 2, step
        assert len(set(metadata["ray_nodes"])) == 2, step
        assert metadata["sagemaker_job"] in both.jobs()
        assert metadata["billable_seconds"] > 0
        assert metadata["estimated_cost"] > 0
    assert len(both.jobs()) == len(STEPS)


def test_the_endpoint_predicts_what_the_model_predicts_offline(both: Both) -> None:
    rows = both.rows("remote", "test").head(5)
    model = load_model(both.artifact("remote", "tuned_model", "model").uri, threads=1)
    features = rows.select(model.table.features)
    runtime = boto3.client(
        "sagemaker-runtime", endpoint_url=both.sagemaker.meta.endpoint_url, region_name="us-east-1",
        aws_access_key_id="testing", aws_secret_access_key="testing",
    )  # fmt: skip
    answer = runtime.invoke_endpoint(
        EndpointName="housing", Body=features.write_csv(include_header=False), ContentType="text/csv", Accept="text/csv"
    )
    served = [float(line) for line in answer["Body"].read().decode().split()]
    assert served == pytest.approx(model.predict(features).tolist(), rel=1e-5)


def test_an_unchanged_run_starts_no_job(both: Both) -> None:
    before = both.jobs()
    done = both.remote.materialize(config=CONFIG, timeout=900)
    assert done.returncode == 0, done.stdout
    assert both.jobs() == before
    assert [both.remote.metadata(step)["reused"] for step in STEPS] == [True] * len(STEPS)
