"""What is pruned, and what stays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.remote_origin import (  # have no public names
    RegisteredCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)

from housing_assets.definitions import defs
from housing_assets.deployments import load_resources
from housing_assets.maintenance.retention import PruneConfig, prune
from housing_assets.maintenance.sweeper import sweep
from housing_assets.maintenance.teardown import teardown
from housing_assets.maintenance.unneeded import old_runs
from housing_assets.settings import Settings
from resources.endpoints.captured_files import CapturedFile, remove_captured, surplus
from resources.endpoints.local import LocalEndpointHost
from resources.feature_store.local import LocalFeatureStore
from resources.inventory import NotOwned
from resources.model_registry.local import LocalModelRegistry
from resources.references.evidence import Evidence, EvidenceStore, Judged
from resources.references.io_manager import REFERENCE, StoredReference
from step_scripts.feature_store.offline_store import OfflineStore
from tests.feature_rows import TABLE, ingest_rows, row, write_rows
from tests.job_outcome import outcome
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
    used, unused = result(tmp_path, "tune_model", "a" * 16), result(tmp_path, "tune_model", "b" * 16)
    young = result(tmp_path, "prepare_splits", "c" * 16, modified=2e9)
    similar = result(tmp_path, "tune_model", "a" * 15 + "b")
    foreign = result(tmp_path, "tune_model", "mine")
    value: Any = {"model": {"uri": str(used / "attempt"), "files": []}, "metrics": {"rmse": 1.0}}
    StoredReference(asset="tuned_model", run_id="run-1", value=value).write(str(tmp_path / "references"))

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
    assert foreign.exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_old_evidence_goes_with_the_last_that_mentions_what_it_judged(
    tmp_path: Path, instance: dg.DagsterInstance, dry_run: bool
) -> None:
    resources = load_resources({"HOUSING_ROOT": str(tmp_path)})
    store: EvidenceStore = resources["evidence"]
    LocalFeatureStore(root=resources["feature_store"].root).ensure_group("sales", TABLE)
    ingest_rows(OfflineStore(resources["feature_store"].root), write_rows(tmp_path / "rows", [row(1)]), mirror=True)
    [ingested] = resources["feature_store"].snapshot_lineage(resources["feature_store"].offline("sales")).datasets
    version = register(resources["model_registry"], "housing", artifact(tmp_path / "model"), "Approved")
    value: Any = {"rows": {"digest": "referenced"}}
    StoredReference(asset="train_split", run_id="run-1", value=value).write(str(tmp_path / "references"))
    kept = {"referenced", ingested.digest, version.artifact.digest, "young"}
    for digest in (*kept, "gone"):
        at = datetime.now(UTC) - timedelta(days=0 if digest == "young" else 100)
        judged = Judged(asset="raw_csv", subject=digest, inputs={"raw_csv": digest, "group": "referenced"})
        store.record(Evidence(check="schema", judged=judged, passed=True, severity="ERROR", run_id="r", at=at))
    damaged = Path(next(uri for uri, _, found in store.stored() if found and found.judged.subject == "gone"))
    damaged = damaged.with_name(f"0123456789abcdef{damaged.name[16:]}")
    damaged.write_text("{")
    config = {"ops": {"prune_old": {"config": {"dry_run": dry_run}}}}
    done = prune.execute_in_process(run_config=config, resources=resources, instance=instance)
    assert done.success
    left = {found.judged.subject if found else "damaged" for _, _, found in store.stored()}
    assert left == (kept | {"gone", "damaged"} if dry_run else kept)


def origin_in(location: str) -> RemoteJobOrigin:
    """Of a run that the UI has launched."""
    code = RegisteredCodeLocationOrigin(location)
    return RemoteJobOrigin(RemoteRepositoryOrigin(code, "__repository__"), "sweep")


def test_old_runs_go_but_those_of_the_latest_materializations_and_of_others(tmp_path: Path) -> None:
    @dg.asset(name="endpoint")
    def ours() -> None: ...

    @dg.asset
    def theirs() -> None: ...

    @dg.job(name="theirs_too")
    def other_job() -> None: ...

    def materialized(asset: dg.AssetsDefinition) -> str:
        job = dg.Definitions(assets=[asset]).resolve_implicit_global_asset_job_def()
        return job.execute_in_process(instance=instance, asset_selection=[asset.key]).run_id

    def launched(job: dg.JobDefinition, location: str | None = None) -> str:
        origin = origin_in(location) if location else None
        status = dg.DagsterRunStatus.FAILURE
        return instance.create_run_for_job(job, status=status, remote_job_origin=origin).run_id

    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as instance:
        gone = {materialized(ours), launched(sweep), launched(sweep, "housing_assets")}
        last = materialized(ours)
        others = {materialized(theirs), materialized(theirs), launched(other_job)}

        def pruned(location: str) -> set[str]:
            run = instance.create_run_for_job(prune, remote_job_origin=origin_in(location))
            return set(old_runs(instance, datetime.now(UTC), run))

        assert launched(sweep, "elsewhere") not in pruned("housing_assets")
        config = {"ops": {"prune_old": {"config": {"dry_run": False, "runs_days": 0}}}}
        resources = load_resources({"HOUSING_ROOT": str(tmp_path)})
        done = prune.execute_in_process(run_config=config, resources=resources, instance=instance)
        left = {run.run_id for run in instance.get_runs()}
        assert {last, done.run_id, *others} <= left
        assert not gone & left


def test_references_go_once_they_are_replaced_and_those_that_a_reader_may_find_stay(tmp_path: Path) -> None:
    root = str(tmp_path / "references")

    def made(run: str, asset: str, *partitions: str, old: bool = True, at: str = root, told: bool = True) -> str:
        """The file of a materialization; the events come in the order of the calls."""
        uri = StoredReference(asset=asset, partitions=partitions, run_id=run, value={"uri": f"/{run}"}).write(at)
        if old:
            os.utime(uri, (OLD, OLD))
        for partition in partitions or (None,):
            if told:
                metadata = {REFERENCE: dg.MetadataValue.path(uri)}
                instance.report_runless_asset_event(dg.AssetMaterialization(asset, None, metadata, partition))
        return uri

    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as instance:
        busy = instance.create_run_for_job(sweep, status=dg.DagsterRunStatus.STARTED).run_id
        expected = {
            "replaced": made("r1", "tuned_model"),
            "replaced a moment ago": made("r2", "tuned_model", old=False),
            "being made": made(busy, "tuned_model"),
            "latest": made("r3", "tuned_model"),
            "of a deployment that shares the event log": made("r4", "tuned_model", at=str(tmp_path / "staging")),
            "in another event log": made("r5", "evaluation_report", told=False),
            "days, one of them replaced": made("r6", "raw_csv", "2026-11-01", "2026-11-02"),
            "day, replaced": made("r7", "raw_csv", "2026-11-03"),
            "latest day": made("r8", "raw_csv", "2026-11-03"),
            "another day": made("r9", "raw_csv", "2026-11-02"),
            "a day whose run is forgotten": made("r10", "raw_csv", "2026-10-01", told=False),
        }
        foreign = tmp_path / "references" / "tuned_model" / "mine.json"
        foreign.write_text("{}")
        config = {"ops": {"prune_old": {"config": {"dry_run": False}}}}
        resources = load_resources({"HOUSING_ROOT": str(tmp_path)})
        done = prune.execute_in_process(run_config=config, resources=resources, instance=instance)
        _, metadata = outcome(done)
    gone = {what for what, uri in expected.items() if not Path(uri).exists()}
    assert gone == {"replaced", "day, replaced", "a day whose run is forgotten"}
    assert metadata["references"] == len(gone)
    assert foreign.exists()


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
    folder = result(root, "tune_model", "a" * 16)
    for n in range(2):
        register(registry, "prices", artifact(tmp_path / str(n), f"model {n}"), "Rejected")
    old = instance.create_run_for_job(sweep, status=dg.DagsterRunStatus.SUCCESS).run_id
    uri = StoredReference(asset="tuned_model", run_id=old, value={"uri": "/there"}).write(str(root / "references"))
    instance.report_runless_asset_event(
        dg.AssetMaterialization("tuned_model", metadata={REFERENCE: dg.MetadataValue.path(uri)})
    )
    Path(uri).write_text(Path(uri).read_text()[:-20])
    done, metadata = launch_prune(
        tmp_path, instance, {"model_registry": registry}, versions=1, results_days=0, runs_days=0, dry_run=False
    )
    assert not done
    assert names(metadata, "removed") == []
    assert folder.exists()
    assert f"{uri} is damaged" in metadata["error"]
    assert "materialize tuned_model again" in metadata["error"]
    assert instance.get_run_by_id(old) is not None


NOW = datetime(2026, 11, 23, tzinfo=UTC)


def captured(endpoint: str, days: float, size: int) -> CapturedFile:
    at = NOW - timedelta(days=days)
    return CapturedFile(folder=f"/{endpoint}", path=f"{days}.jsonl", bytes=size, changed_at=at)


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
    assert [(f.folder.strip("/"), (NOW - f.changed_at).days) for f in found] == expected


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
    settings = Settings.load({"HOUSING_KEEP_VERSIONS": "3", "HOUSING_CAPTURE_DAYS": "2", "HOUSING_PENDING_DAYS": "5"})
    assert (settings.keep_versions, settings.capture_days, settings.pending_days) == (3, 2.0, 5.0)
