"""What is pruned, and what stays."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from housing_assets.definitions import defs
from housing_assets.deployments import load_automation, load_resources
from housing_assets.retention import PruneConfig, prune, stored_results
from housing_assets.sweeper import sweep
from housing_assets.teardown import teardown
from resources.endpoints.captured_files import CapturedFile, remove_captured, surplus
from resources.endpoints.local import LocalEndpointHost
from resources.inventory import NotOwned
from resources.model_registry.local import LocalModelRegistry
from tests.pruning_contract import PruningContract, launch_prune, names, register
from tests.registry_contract import artifact

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


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


@pytest.fixture
def group() -> str:
    return "prices"


@pytest.fixture
def registry(tmp_path: Path) -> LocalModelRegistry:
    return LocalModelRegistry(root=str(tmp_path / "registry"))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LocalEndpointHost]:
    made = LocalEndpointHost(root=str(tmp_path / "endpoints"))
    yield made
    for status in made.list():
        made.delete(status.name)


@pytest.fixture
def captures(tmp_path: Path) -> Callable[[str], str]:
    return lambda endpoint: str(tmp_path / "endpoints" / endpoint / "captured")


class TestPruning(PruningContract):
    pass


def test_versions_stay_while_another_run_may_need_one(
    tmp_path: Path, instance: dg.DagsterInstance, registry: LocalModelRegistry
) -> None:
    for n in range(2):
        register(registry, "prices", artifact(tmp_path / str(n), f"model {n}"), "Rejected")
    instance.create_run_for_job(sweep, status=dg.DagsterRunStatus.STARTED)  # needs none
    other = instance.create_run_for_job(teardown, status=dg.DagsterRunStatus.STARTED).run_id
    resources = {"model_registry": registry}
    done, metadata = launch_prune(tmp_path, instance, resources, versions=1, dry_run=False)
    assert (done, metadata["model_versions"], metadata["versions_wait_for_runs"]) == (True, 0, other[:8])
    instance.delete_run(other)
    assert launch_prune(tmp_path, instance, resources, versions=1, dry_run=False)[1]["model_versions"] == 1


def test_a_damaged_group_does_not_keep_the_others(
    tmp_path: Path, instance: dg.DagsterInstance, registry: LocalModelRegistry
) -> None:
    for group in ("damaged", "prices"):
        for n in range(2):
            register(registry, group, artifact(tmp_path / str(n), f"model {n}"), "Rejected")
    record = Path(registry.root) / "damaged" / "versions" / "2" / "version.json"
    record.write_text("{")
    done, metadata = launch_prune(tmp_path, instance, {"model_registry": registry}, versions=1, dry_run=False)
    assert not done
    assert names(metadata, "removed") == ["prices/1"]
    assert f"damaged/2: {record} is not a complete record" in metadata["error"]


def test_a_damaged_reference_keeps_what_it_may_name_and_nothing_else(
    tmp_path: Path, instance: dg.DagsterInstance, registry: LocalModelRegistry
) -> None:
    root = tmp_path / "data"
    folder = result(root, "tune_model", "a")
    for n in range(2):
        register(registry, "prices", artifact(tmp_path / str(n), f"model {n}"), "Rejected")
    old = instance.create_run_for_job(sweep, status=dg.DagsterRunStatus.SUCCESS).run_id
    (root / "references").mkdir()
    (root / "references" / "tuned_model.json").write_text('{"uri": "/cut o')
    done, metadata = launch_prune(
        tmp_path, instance, {"model_registry": registry}, versions=1, results_days=0, runs_days=0, dry_run=False
    )
    assert not done
    assert names(metadata, "removed") == [old]
    assert folder.exists()
    assert "tuned_model.json is damaged" in metadata["error"]
    assert "materialize its asset again" in metadata["error"]


NOW = datetime(2026, 11, 23, tzinfo=UTC)


def captured(endpoint: str, days: float, size: int) -> CapturedFile:
    at = NOW - timedelta(days=days)
    return CapturedFile(endpoint=endpoint, folder=f"/{endpoint}", path=f"{days}.jsonl", bytes=size, changed_at=at)


@pytest.mark.parametrize(
    ("days", "most_bytes", "expected"),
    [
        (30, 100, []),
        (3, 100, [("a", 4), ("b", 5)]),
        (30, 59, [("a", 4), ("b", 5), ("b", 1)]),
        (30, 29, [("a", 4), ("a", 2), ("b", 5), ("b", 1)]),
        (0, 100, [("a", 4), ("a", 2), ("a", 1), ("b", 5), ("b", 1)]),
    ],
)
def test_surplus_captures_are_the_old_and_each_endpoints_oldest(
    days: float, most_bytes: float, expected: list[tuple[str, float]]
) -> None:
    files = [captured(*f) for f in (("a", 1, 20), ("b", 5, 10), ("a", 4, 30), ("b", 1, 60), ("a", 2, 10))]
    found = surplus(files, NOW - timedelta(days=days), most_bytes)
    assert [(f.endpoint, (NOW - f.changed_at).days) for f in found] == expected


def test_captures_elsewhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotOwned, match="/a is not below"):
        remove_captured([captured("a", 1, 1)], str(tmp_path))


def test_the_schedule_removes_for_real_with_the_bounds_of_the_environment() -> None:
    repository = defs.get_repository_def()
    schedule = repository.get_schedule_def("nightly_prune")
    assert (schedule.job_name, schedule.cron_schedule) == ("prune", "37 2 * * *")
    with dg.instance_for_test() as instance:
        tick = schedule.evaluate_tick(dg.build_schedule_context(instance, scheduled_execution_time=NOW))
    [request] = tick.run_requests or []
    assert request.run_config == {"ops": {"prune_old": {"config": {"dry_run": False}}}}
    assert PruneConfig().dry_run
    settings = load_automation({"HOUSING_KEEP_VERSIONS": "3", "HOUSING_CAPTURE_DAYS": "2", "HOUSING_PENDING_DAYS": "5"})
    assert (settings.keep_versions, settings.capture_days, settings.pending_days) == (3, 2.0, 5.0)
