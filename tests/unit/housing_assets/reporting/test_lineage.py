"""Lineage: what is kept with a version leads from the endpoint to the data files; costs add up over a run."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from housing_assets.reporting.lineage import COLUMNS, as_text, lineage_facts, lineage_rows, main, version_of
from housing_assets.reporting.metadata import run_costs, run_metadata
from resources.endpoints.base import EndpointStatus
from resources.feature_store.local import LocalFeatureStore
from resources.model_registry.local import LocalModelRegistry
from resources.references.types import DataFile, DatasetRef, EvaluationRef, ModelRef, SnapshotRef, SourceRef, SplitRef
from step_scripts.feature_store.offline_store import OfflineStore
from step_scripts.runner.contract import Artifact, StepResult
from tests.feature_rows import TABLE, ingest_rows, row, write_rows
from tests.registry_contract import artifact, register

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)


def made(name: str) -> Artifact:
    return Artifact(uri=f"/artifacts/{name}", digest=f"digest-of-{name}", rows=10)


def facts(snapshot: SnapshotRef | None) -> dict[str, Any]:
    train = SplitRef(
        rows=made("train"), fraction=0.6, configured_fraction=0.6, snapshot=snapshot, run_id="run-s", code_version="c-s"
    )
    model = ModelRef(
        model=made("model"), report=made("report"), metrics={}, parameters={"eta": 0.25, "max_depth": 3},
        request_digest="request", run_id="run-m", code_version="c-m", made_at=NOW, validation_digest="validation",
        versions={"xgboost": "3.2.0"},
    )  # fmt: skip
    evaluation = EvaluationRef(
        report=made("evaluation"), model_digest="m", test_digest="test", metrics={}, rmse_threshold=1.0,
        run_id="run-e", code_version="c-e",
    )  # fmt: skip
    return dict(lineage_facts("run-r", train, model, evaluation))


def test_the_lineage_names_the_split_that_the_model_was_fitted_on_whatever_is_the_latest_one() -> None:
    fitted, later = (
        SplitRef(rows=made(name), fraction=0.6, configured_fraction=0.6, run_id=f"run of {name}")
        for name in ("fitted", "later")
    )
    model = ModelRef(
        model=made("model"), report=made("report"), metrics={}, parameters={}, request_digest="request", train=fitted
    )
    evaluation = EvaluationRef(
        report=made("evaluation"), model_digest="m", test_digest="test", metrics={}, rmse_threshold=1.0
    )
    found: Any = lineage_facts("run-r", later, model, evaluation)
    assert found["train_digest"] == "digest-of-fitted"
    assert found["runs"]["splits"] == "run of fitted"


def snapshot() -> SnapshotRef:
    files = (DataFile(uri="s3://in/a.csv", bytes=1234, modified=0.0, rows=7),)
    known = DatasetRef(
        digest="dataset", source="s3://in", files=files, run_id="run-d", code_version="c-d", commit=2, ingested_at=NOW
    )
    datasets = (DatasetRef(digest="older", commit=1), known)
    return SnapshotRef(group="sales", commit=2, digest="group", as_of=NOW, run_id="run-f", datasets=datasets)


def test_the_table_leads_from_the_endpoint_to_the_files(tmp_path: Path) -> None:
    registry = LocalModelRegistry(root=str(tmp_path / "registry"))
    version = register(registry, artifact(tmp_path / "model"), lineage=facts(snapshot()), status="Approved")
    status = EndpointStatus(
        name="housing", state="InService", url="http://here", version=version.reference,
        model_digest=version.artifact.digest, deployed_at=NOW,
    )  # fmt: skip
    rows = {row["stage"]: row for row in lineage_rows(registry.get("housing", 1), status, "run-p")}
    assert all(tuple(row) == COLUMNS for row in rows.values())
    assert {stage: row["run"] for stage, row in rows.items() if row["run"]} == {
        **{"endpoint": "run-p", "model version": "run-r", "evaluation": "run-e", "training": "run-m"},
        **{"train split": "run-s", "validation split": "run-s", "test split": "run-s"},
        **{"feature group": "run-f", "data file": "run-d"},
    }
    assert rows["training"]["what"] == "eta=0.25, max_depth=3"
    assert rows["libraries"]["what"] == "xgboost 3.2.0"
    assert rows["feature group"]["what"] == "sales, commit 2, as of 2026-11-01T12:00:00Z"
    file = rows["data file"]
    assert (file["where"], file["what"]) == ("s3://in/a.csv", "1,234 bytes, 7 rows")
    assert (file["digest"], file["code_version"]) == ("dataset", "c-d")
    assert rows["data"]["what"] == "its files were not recorded"
    text = as_text(list(rows.values()))
    assert "s3://in/a.csv" in text
    assert "run-d" in text


def test_versions_of_earlier_days_have_a_lineage_too(tmp_path: Path) -> None:
    registry = LocalModelRegistry(root=str(tmp_path / "registry"))
    old = {"run_id": "run-1", "train_digest": "t", "parameters": {"eta": 0.1}, "code_version": {"tune_model": "c"}}
    register(registry, artifact(tmp_path / "model"), lineage=old)
    stages = [row["stage"] for row in lineage_rows(version_of("housing/1", registry))]
    assert stages == ["model version", "evaluation", "training", "libraries", "train split"]
    for wrong in ("housing", "housing/x", "housing/2"):
        with pytest.raises(LookupError):
            version_of(wrong, registry)


def test_references_of_earlier_days_still_load() -> None:
    split = {"rows": made("train").model_dump(), "fraction": 0.6, "configured_fraction": 0.6, "statistics": None}
    assert SplitRef.model_validate_json(json.dumps(split)).snapshot is None
    model = {"model": made("m").model_dump(), "report": made("r").model_dump(), "metrics": {}, "parameters": {}}
    assert ModelRef.model_validate(model | {"request_digest": "q"}).versions == {}
    source = {"source": "s", "table": TABLE.model_dump(), "rows": made("r").model_dump(), "rejected": made("x")}
    assert SourceRef.model_validate(source | {"rows_total": 1, "rows_rejected": 0}).files == ()
    result = {"step": "s", "request_digest": "q", "code_version": "c", "created_at": NOW.isoformat(), "params": {}}
    assert StepResult.model_validate(result | {"inputs": {}, "outputs": {}}).cpus is None


def test_a_snapshot_names_the_datasets_that_it_holds(tmp_path: Path) -> None:
    store = LocalFeatureStore(root=str(tmp_path / "store"))
    files = OfflineStore(store.root)
    store.ensure_group("sales", TABLE)
    first, second, third = (
        write_rows(tmp_path / str(price), [row(number, price)]) for number, price in ((1, 1.0), (2, 2.0), (2, 3.0))
    )
    ingest_rows(files, first, mirror=False)
    ingest_rows(files, second, mirror=False)
    file = DataFile(uri="/in/a.csv", bytes=1, modified=0.0)
    store.record_dataset("sales", DatasetRef(digest=first.digest, source="/in", files=(file,), run_id="run-1"))
    store.record_dataset("sales", DatasetRef(digest=first.digest, source="/elsewhere"))
    read = store.snapshot_lineage(store.offline("sales"))
    assert [(d.digest, d.commit, d.source, d.files) for d in read.datasets] == [
        (first.digest, 1, "/in", (file,)),
        (second.digest, 2, "", ()),
    ]
    ingest_rows(files, third, mirror=True)
    assert [d.commit for d in store.snapshot_lineage(store.offline("sales")).datasets] == [3]
    # At an earlier point in time, records of earlier datasets were live.
    assert [d.commit for d in store.snapshot_lineage(store.offline("sales", as_of=NOW)).datasets] == [1, 2, 3]


def test_the_command_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HOUSING_ROOT", str(tmp_path))
    assert main([]) == 1
    assert "there is no endpoint housing; there are: none" in capsys.readouterr().err
    registry = LocalModelRegistry(root=str(tmp_path / "model_registry"))
    register(registry, artifact(tmp_path / "model"), lineage=facts(snapshot()))
    assert main(["--version", "housing/1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["where"] for row in rows if row["stage"] == "data file"] == ["s3://in/a.csv"]


def test_costs_of_a_run_count_each_piece_of_work_once() -> None:
    def result(digest: str, **figures: float | str) -> dict[str, Any]:
        return {"request_digest": digest, **figures}

    @dg.multi_asset(specs=[dg.AssetSpec("a"), dg.AssetSpec("b")])
    def twins() -> Any:
        for key in ("a", "b"):
            yield dg.MaterializeResult(
                key, metadata=result("q1", core_seconds=4.0, sagemaker_job="j", billable_seconds=7)
            )

    totals: dict[str, float] = {}

    @dg.asset(deps=["a", "b"])
    def other(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
        totals.update(run_costs(context.instance, context.run.run_id))
        return dg.MaterializeResult(metadata=result("q2", core_seconds=1.5))

    with dg.DagsterInstance.ephemeral() as instance:
        dg.materialize([twins], instance=instance)
        run = dg.materialize([twins, other], instance=instance)
        assert totals == {"run_core_seconds": 4.0, "run_billable_seconds": 7.0}
        assert run_costs(instance, run.run_id)["run_core_seconds"] == 5.5


@pytest.mark.parametrize(("reused", "expected"), [(False, 10.0), (True, 0.0)])
def test_core_seconds_are_what_a_step_keeps_from_others(reused: bool, expected: float) -> None:
    result = StepResult(
        step="s", request_digest="q", code_version="c", created_at=NOW, params={}, inputs={}, outputs={},
        seconds={"total": 2.5}, cpus=4.0, reused=reused,
    )  # fmt: skip
    assert run_metadata(result)["core_seconds"] == expected
