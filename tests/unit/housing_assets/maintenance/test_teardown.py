"""What `teardown` and `sweep` remove on this machine, and what they leave alone."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

import housing_assets.definitions  # noqa: F401  # the jobs ask for all assets
from housing_assets.checks.alerts import NOTIFIED
from housing_assets.checks.gate import judged_source
from housing_assets.deployments import load_resources
from housing_assets.maintenance.retention import prune
from housing_assets.maintenance.sweeper import abandoned, sweep, unreported
from housing_assets.maintenance.teardown import teardown
from resources.compute.local_ray import LocalRay
from resources.endpoints.local import LocalEndpointHost
from resources.feature_store.local import LocalFeatureStore
from resources.inventory import NotOwned, OwnedItem
from resources.model_registry.local import LocalModelRegistry
from resources.services.notifier import Notifier
from step_scripts.feature_store.offline_store import OfflineStore
from tests.feature_rows import TABLE, ingest_rows, row, write_rows
from tests.job_outcome import outcome
from tests.serving_models import registered, small_model, smoke_test
from tests.vouching import record

LOG = logging.getLogger("test")
FOREIGN = (
    "data/artifacts/notes.txt",
    "data/artifacts/tune_model/mine/notes.txt",
    "data/references/mine.json",
    "data/references/endpoint.json.bak",
    "data/references/endpoint/notes.json",
    "data/evidence/notes.txt",
    "data/evidence/raw_csv/schema/rows/mine.json",
    "data/sample/house_sales_mine.csv",
    "data/feature_store/house_sales-similar/rows.parquet",
    "data/model_registry/housing-similar/versions/notes.txt",
    "data/endpoints/housing-similar/notes.txt",
    "data/environments/staging/references/endpoint.json",
    "data/in/day.csv",
)


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path / "dagster")) as ephemeral:
        yield ephemeral


def environment(folder: Path) -> dict[str, str]:
    return {"HOUSING_ROOT": str(folder / "data"), "HOUSING_LANDING": str(folder / "data" / "in")}


def launch(job: dg.JobDefinition, folder: Path, instance: dg.DagsterInstance, **config: Any) -> tuple[bool, Any]:
    """Whether the job succeeded, and the metadata of its only op or of the op's failure."""
    [op] = job.nodes
    done = job.execute_in_process(
        run_config={"ops": {op.name: {"config": config}}},
        resources=load_resources(environment(folder)) | config.pop("resources", {}),
        instance=instance,
        raise_on_error=False,
    )
    return outcome(done)


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in (folder / "data").rglob("*") if p.is_file()}


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Path]:
    """Everything that a deployment creates, and among it files that are not its own."""
    resources = load_resources(environment(tmp_path))
    results = tmp_path / "data" / "artifacts" / "tune_model" / ("a" * 16)
    for file in (results / "manifest.json", results / "attempt" / "model" / "model.ubj"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    earlier = ("endpoint.json", "raw_csv.json", "raw_csv/2026-11-01.json")
    for name in (*earlier, f"endpoint/{uuid.uuid4()}-{'0' * 16}.json"):
        file = tmp_path / "data" / "references" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    record(resources["evidence"], judged_source("rows"), "schema")
    assert resources["source_location"].resolve().endswith("house_sales_10000.csv")
    store: LocalFeatureStore = resources["feature_store"]
    store.ensure_group("house_sales-1", TABLE)
    ingest_rows(OfflineStore(store.root), write_rows(tmp_path / "rows", [row(1)]), mirror=False)
    for name in FOREIGN:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    model = small_model(tmp_path / "model")
    version = registered(resources["model_registry"], model)
    host: LocalEndpointHost = resources["endpoint_host"]
    try:
        host.deploy("housing", version, smoke_test(model), LOG)
        yield tmp_path
    finally:
        host.stop("housing")


def has_ended(pid: int) -> bool:
    """Also true of a process that nobody has waited for."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_everything_goes_but_what_is_not_ours(deployment: Path, instance: dg.DagsterInstance) -> None:
    root = str(deployment / "data")
    host = LocalEndpointHost(root=f"{root}/endpoints")
    status = host.describe("housing")
    assert status is not None
    assert status.pid is not None
    before = files(deployment)

    done, metadata = launch(teardown, deployment, instance)
    assert done
    listed = {(r.data["kind"], r.data["name"]) for r in metadata["would_remove"].records}
    assert listed == {
        ("endpoint", "housing"),
        ("model_package", "housing/1"),
        ("model_package_group", "housing"),
        ("feature_group", "house_sales-1"),
        ("feature_group", "sales"),
        ("files", "results of tune_model"),
        ("files", "references of endpoint"),
        ("files", "references of raw_csv"),
        ("files", "evidence of raw_csv/schema"),
        ("files", "house_sales_10000.csv"),
    }
    assert metadata["root"] == root
    assert files(deployment) == before

    done, metadata = launch(teardown, deployment, instance, dry_run=False, confirm="data")
    assert not done
    assert f"confirm must be {root!r}, not 'data'" in metadata["error"]
    assert files(deployment) == before

    done, metadata = launch(teardown, deployment, instance, dry_run=False, confirm=root, kinds=["endpoint", "files"])
    assert done, metadata
    assert has_ended(status.pid)
    assert LocalModelRegistry(root=f"{root}/model_registry").list("housing")

    done, metadata = launch(teardown, deployment, instance, dry_run=False, confirm=root)
    assert done, metadata
    assert {name for name in files(deployment) if not name.endswith(".lock")} == set(FOREIGN)
    assert metadata["items"] == 4

    done, metadata = launch(teardown, deployment, instance, dry_run=False, confirm=root)
    assert done
    assert (metadata["items"], metadata["kept"], metadata["left"].records) == (0, {}, [])


def test_what_cannot_be_removed_is_reported_and_the_rest_goes(
    deployment: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: LocalFeatureStore, item: OwnedItem) -> None:
        raise PermissionError(f"may not remove {item.name}")

    root = str(deployment / "data")
    with monkeypatch.context() as patch:
        patch.setattr(LocalFeatureStore, "remove", refuse)
        done, metadata = launch(teardown, deployment, instance, dry_run=False, confirm=root)
        assert not done
        assert {(r.data["name"], r.data["why"]) for r in metadata["left"].records} == {
            (name, f"PermissionError: may not remove {name}") for name in ("house_sales-1", "sales")
        }
        assert "feature_group sales: PermissionError: may not remove sales" in metadata["error"]
        assert "files" in {r.data["kind"] for r in metadata["removed"].records}
    done, metadata = launch(teardown, deployment, instance, dry_run=False, confirm=root)
    assert done
    assert {r.data["name"] for r in metadata["removed"].records} == {"house_sales-1", "sales"}


@contextmanager
def held(root: Path, *folders: Path) -> Iterator[None]:
    """Folders that cannot be removed: something is mounted there, or (not as root) they may not be changed."""
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "rows").write_text("x")
        if os.geteuid() != 0:
            folder.chmod(0o500)
        elif subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, check=False).returncode:
            pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        for folder in folders:
            for place in list(root.rglob(folder.name)):  # what is above it may have been renamed
                if os.geteuid() != 0:
                    place.chmod(0o700)
                else:
                    subprocess.run(["umount", str(place)], check=True)


def test_what_is_left_of_a_removal_fails_the_job_and_is_found_by_the_next(
    deployment: Path, instance: dg.DagsterInstance
) -> None:
    root = deployment / "data"
    captured = root / "endpoints" / "housing" / "captured" / "held-requests"
    rows = root / "feature_store" / "sales" / "data" / "held-rows"
    model = root / "model_registry" / "housing" / "versions" / "1" / "held-model"
    result = root / "artifacts" / "tune_model" / ("a" * 16) / "held-result"
    (root / "references" / "mine.json").write_text("{}")
    expected = {"endpoint": captured, "feature_group": rows, "model_package": model, "files": result}
    with held(root, *expected.values()):
        for attempt in range(2):
            done, metadata = launch(teardown, deployment, instance, dry_run=False, confirm=str(root))
            assert not done, f"run {attempt + 1} says that everything is gone"
            left = {r.data["kind"]: r.data for r in metadata["left"].records}
            assert left.keys() >= expected.keys()
            assert all(left[kind]["why"] for kind in expected)
        assert all(list(root.rglob(place.name)) for place in expected.values())

        done, metadata = launch(prune, deployment, instance, dry_run=False)
        assert not done
        assert len(metadata["left"]) == 3, "results that nobody refers to are young"
    done, metadata = launch(prune, deployment, instance, dry_run=False)
    assert (done, metadata["rests"]) == (True, 3), metadata
    done, metadata = launch(teardown, deployment, instance, dry_run=False, confirm=str(root))
    assert done, metadata
    assert {name for name in files(deployment) if not name.endswith(".lock")} == set(FOREIGN)


def test_nobody_elses_folders_are_taken_for_rests(tmp_path: Path) -> None:
    store = LocalFeatureStore(root=str(tmp_path / "feature_store"))
    other = tmp_path / "other" / f".sales.{'a' * 32}.deleted"
    other.mkdir(parents=True)
    with pytest.raises(NotOwned):
        store.remove(OwnedItem(kind="feature_group", name=other.name, location=str(other), discarded=True))
    assert other.is_dir()


def test_nothing_is_removed_while_another_run_is_in_progress(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    other = instance.create_run_for_job(teardown, status=dg.DagsterRunStatus.STARTED)
    done, metadata = launch(teardown, tmp_path, instance, dry_run=False, confirm=str(tmp_path / "data"))
    assert not done
    assert f"runs {other.run_id[:8]} are in progress" in metadata["error"]


def test_source_files_stay_wherever_they_are(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    root = tmp_path / "data"
    sample, group = root / "sample" / "house_sales_10.csv", root / "feature_store" / "house_sales-1"
    sample.parent.mkdir(parents=True)
    sample.write_text("x")
    LocalFeatureStore(root=str(root / "feature_store")).ensure_group("house_sales-1", TABLE)
    (group / "exported").mkdir()
    config = {"ops": {"remove_everything": {"config": {"dry_run": False, "confirm": str(root)}}}}
    variables = {
        "HOUSING_ROOT": str(root), "HOUSING_RAW_CSV": str(sample.parent / "*.csv"),
        "HOUSING_LANDING": str(group / "exported"),
    }  # fmt: skip
    done = teardown.execute_in_process(run_config=config, resources=load_resources(variables), instance=instance)
    [output] = [e for e in done.all_events if e.is_successful_output]
    kept: Any = output.step_output_data.metadata["kept"].value
    assert list(kept) == [str(group)]
    assert sample.exists()
    assert (group / "exported").is_dir()


def test_resources_refuse_what_is_not_theirs(tmp_path: Path) -> None:
    resources = load_resources({"HOUSING_ROOT": str(tmp_path / "data")})
    (tmp_path / "other").mkdir()
    kinds: dict[str, Any] = {
        "compute": "files", "feature_store": "feature_group", "model_registry": "model_package_group",
        "endpoint_host": "endpoint",
    }  # fmt: skip
    for name, kind in kinds.items():
        with pytest.raises(NotOwned):
            resources[name].remove(OwnedItem(kind=kind, name="other", location=str(tmp_path / "other")))
    assert (tmp_path / "other").is_dir()


class Messages(Notifier):
    """Writes messages into a file."""

    path: str

    def notify(self, title: str, text: str) -> None:
        with Path(self.path).open("a") as file:
            file.write(f"{title}\n{text}\n")


WAITS = "import time; print(flush=True); time.sleep(600)"


def driver(run: str, artifacts: str, folder: Path) -> subprocess.Popen[bytes]:
    """A process that looks like the driver of a run."""
    variables = {"HOUSING_RUN_ID": run, "HOUSING_ARTIFACTS": artifacts, "HOUSING_RAY_FOLDER": str(folder)}
    return visible([sys.executable, "-c", WAITS], variables)


def visible(command: list[str], variables: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A process that runs `WAITS`, and has come so far: before, it may have neither command line nor environment."""
    process = subprocess.Popen(command, env=os.environ | (variables or {}), stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_processes_whose_run_is_gone_are_found_and_stopped_if_configured(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    artifacts = str(tmp_path / "data" / "artifacts")
    gone, running = "a" * 8, instance.create_run_for_job(teardown, status=dg.DagsterRunStatus.STARTED).run_id
    folder = tmp_path / "0"
    folder.mkdir()
    processes = [
        driver(run, place, tmp_path / str(number))
        for number, (run, place) in enumerate(
            [(gone, artifacts), (running, artifacts), (gone, str(tmp_path / "other"))]
        )
    ]
    orphan = processes[0]
    messages = Messages(path=str(tmp_path / "messages"))
    try:
        resources = {"notifier": messages}
        done, metadata = launch(sweep, tmp_path, instance, minutes=60, resources=resources)
        assert (done, metadata["looked_at"], metadata["abandoned"]) == (True, 2, 0)
        done, metadata = launch(sweep, tmp_path, instance, minutes=0, resources=resources)
        assert done
        [found] = [r.data for r in metadata["found"].records]
        assert (found["name"], found["outcome"]) == (f"process {orphan.pid}", "reported")
        assert found["why"] == f"run {gone} is not known here"
        assert "1 abandoned" in (tmp_path / "messages").read_text()
        assert orphan.poll() is None
        done, metadata = launch(sweep, tmp_path, instance, minutes=0, stop=True, resources=resources)
        assert done, metadata
        assert orphan.wait(30) is not None
        assert not folder.exists()
        assert [p.poll() for p in processes[1:]] == [None, None]
        assert len(LocalRay(artifact_root=artifacts).inventory()) == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_people_are_told_of_each_finding_once_until_it_changes_or_stays(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    artifacts = str(tmp_path / "data" / "artifacts")
    path = tmp_path / "messages"
    processes: list[subprocess.Popen[bytes]] = []

    def start(run: str) -> subprocess.Popen[bytes]:
        processes.append(driver(run, artifacts, tmp_path / f"ray-{run}"))
        return processes[-1]

    def look(folder: Path = tmp_path, **config: Any) -> list[str]:
        """What one sweep tells."""
        path.unlink(missing_ok=True)
        messages = {"notifier": Messages(path=str(path))}
        done, metadata = launch(sweep, folder, instance, minutes=0, resources=messages, **config)
        assert done, metadata
        said = path.read_text().splitlines() if path.exists() else []
        assert metadata[NOTIFIED] == len(said[1:])
        return said

    run = instance.create_run_for_job(teardown, status=dg.DagsterRunStatus.FAILURE).run_id
    try:
        first = start(run)
        title, line = look()
        assert title == "1 abandoned jobs or endpoints, 1 new or changed"
        assert line == f"job process {first.pid} (Ray driver): run {run} is FAILURE; reported"
        assert look() == []
        assert look(repeat_hours=0) == [title, line], "it is still there after so long"
        assert look() == []

        second = start("b" * 8)
        title, line = look()
        assert title == "2 abandoned jobs or endpoints, 1 new or changed"
        assert f"process {second.pid}" in line
        assert look() == []
        instance.delete_run(run)
        [_, line] = look()
        assert f"process {first.pid} (Ray driver): run {run} is not known here" in line, "why it is abandoned changed"

        (tmp_path / "other").mkdir()
        artifacts = str(tmp_path / "other" / "data" / "artifacts")
        third = start("c" * 8)
        [_, line] = look(tmp_path / "other")
        assert f"process {third.pid}" in line, "another deployment on this instance has its own memory"
        assert look(tmp_path / "other") == []
        assert look() == []

        assert [said.endswith("; stopped") for said in look(stop=True)] == [False, True, True]
        assert look() == []
        found = instance.fetch_observations(dg.AssetKey("abandoned"), limit=2).records
        assert [r.asset_observation and r.asset_observation.metadata["abandoned"].value for r in found] == [0, 2]
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Unreachable(Notifier):
    def notify(self, title: str, text: str) -> None:
        raise ConnectionRefusedError("nobody listens")


def test_what_could_not_be_told_is_told_next_time(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: LocalRay) -> list[OwnedItem]:
        raise PermissionError("may not look")

    monkeypatch.setattr(LocalRay, "inventory", fail)
    told = tmp_path / "messages"
    done, metadata = launch(sweep, tmp_path, instance, resources={"notifier": Unreachable()})
    assert not done
    assert "compute" in metadata["could_not_be_listed"], "the findings are not lost with the message"
    assert metadata[NOTIFIED] == 0, "the next sweep reports it"
    said = (
        "0 abandoned jobs or endpoints, 1 new or changed\ncompute could not be asked: PermissionError: may not look\n"
    )
    for _ in range(2):
        done, metadata = launch(sweep, tmp_path, instance, resources={"notifier": Messages(path=str(told))})
        assert not done, "what could not be asked fails the run every time"
        assert "compute: PermissionError: may not look" in metadata["error"]
        assert told.read_text() == said


def test_what_is_unreported() -> None:
    now = datetime.now(UTC)
    known = {name: (name, now - timedelta(hours=hours)) for name, hours in (("a", 1), ("b", 25), ("c", 1))}
    lines = {"a": "a", "b": "b", "c": "changed", "d": "new"}
    assert set(unreported(lines, known, now - timedelta(hours=24))) == {"b", "c", "d"}


def test_a_server_whose_folder_is_gone_is_found(tmp_path: Path) -> None:
    root = tmp_path / "endpoints"
    path = str(root / "housing" / "deployment.json")
    other = str(tmp_path / "elsewhere" / "housing" / "deployment.json")
    program = [sys.executable, "-c", WAITS, "-m", "step_scripts.serve_model", "--deployment"]
    processes = [visible([*program, where]) for where in (path, other)]
    host = LocalEndpointHost(root=str(root))
    try:
        [item] = host.inventory()
        assert (item.name, item.temporary) == ("housing", True)
        host.remove(item)
        assert processes[0].wait(30) is not None
        assert processes[1].poll() is None
        assert host.inventory() == []
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_only_what_is_temporary_and_old_enough_is_abandoned(instance: dg.DagsterInstance) -> None:
    now = datetime.now(UTC)
    ids = {
        status: instance.create_run_for_job(teardown, status=status).run_id
        for status in (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.STARTING)
    }

    def item(name: str, run_id: str | None, *, minutes: float = 20, temporary: bool = True) -> OwnedItem:
        created = now - timedelta(minutes=minutes)
        return OwnedItem(kind="job", name=name, location=name, run_id=run_id, created_at=created, temporary=temporary)

    failed = ids[dg.DagsterRunStatus.FAILURE]
    items = [
        item("of a running run", ids[dg.DagsterRunStatus.STARTED]),
        item("of a starting run", ids[dg.DagsterRunStatus.STARTING]),
        item("of a failed run", failed),
        item("of a failed run, young", failed, minutes=1),
        item("of a failed run, attended to", failed, temporary=False),
        item("of an unknown run", "nobody"),
        item("candidate, perhaps of a run in progress", None, minutes=200),
    ]
    found = abandoned(items, instance, now - timedelta(minutes=10))
    assert [i.name for i, _ in found] == ["of a failed run", "of an unknown run"]


def test_what_names_no_run_is_abandoned_when_no_run_is_in_progress_and_it_is_old(instance: dg.DagsterInstance) -> None:
    now = datetime.now(UTC)
    items = [
        OwnedItem(
            kind="endpoint",
            name=str(minutes),
            location="x",
            created_at=now - timedelta(minutes=minutes),
            temporary=True,
        )
        for minutes in (5, 40, 200)
    ]
    own = instance.create_run_for_job(teardown, status=dg.DagsterRunStatus.STARTED).run_id
    found = abandoned(items, instance, now - timedelta(minutes=10), [own])
    assert [i.name for i, _ in found] == ["200"]
    assert abandoned(items, instance, now - timedelta(minutes=10)) == []
