"""What is pruned, and what stays."""

from __future__ import annotations

import json
import os
from pathlib import Path

import dagster as dg
import pytest

from housing_assets.deployments import load_resources
from housing_assets.retention import prune, stored_results

OLD = 1e9


def result(root: Path, step: str, digest: str, *, modified: float = OLD) -> Path:
    folder = root / "artifacts" / step / digest
    (folder / "attempt").mkdir(parents=True)
    for file in (folder / "manifest.json", folder / "attempt" / "part.parquet"):
        file.write_text("x")
        os.utime(file, (modified, modified))
    return folder


@pytest.mark.parametrize("dry_run", [True, False])
def test_old_results_that_nothing_refers_to_are_removed(tmp_path: Path, dry_run: bool) -> None:
    used, unused = result(tmp_path, "tune_model", "a"), result(tmp_path, "tune_model", "b")
    young = result(tmp_path, "prepare_splits", "c", modified=2e9)
    similar = result(tmp_path, "tune_model", "ab")
    references = tmp_path / "references"
    references.mkdir()
    value = {"model": {"uri": str(used / "attempt"), "files": []}, "metrics": {"rmse": 1.0}}
    (references / "tuned_model.json").write_text(json.dumps(value))
    assert [r.files for r in stored_results(str(tmp_path / "artifacts"))] == [2, 2, 2, 2]

    with dg.DagsterInstance.ephemeral() as instance:
        done = prune.execute_in_process(
            run_config={"ops": {"prune_old": {"config": {"dry_run": dry_run}}}},
            resources=load_resources({"HOUSING_ROOT": str(tmp_path)}),
            instance=instance,
        )
        assert done.success
        log = "\n".join(record.user_message for record in instance.all_logs(done.run_id))
    assert str(unused) in log
    assert str(similar) in log
    assert used.exists()
    assert young.exists()
    assert unused.exists() == similar.exists() == dry_run


def test_old_runs_go_but_those_of_the_latest_materializations(tmp_path: Path) -> None:
    @dg.asset
    def thing() -> None: ...

    config = {"ops": {"prune_old": {"config": {"dry_run": False, "runs_days": 0}}}}
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as instance:
        first, last = (dg.materialize([thing], instance=instance).run_id for _ in range(2))
        resources = load_resources({"HOUSING_ROOT": str(tmp_path)})
        done = prune.execute_in_process(run_config=config, resources=resources, instance=instance)
        assert {run.run_id for run in instance.get_runs()} == {last, done.run_id}
        assert instance.get_run_by_id(first) is None
