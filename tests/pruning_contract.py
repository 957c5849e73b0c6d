"""What `prune` does to versions and captured requests, whatever holds them: a class of tests to derive from.

Fixtures: `registry` and `host`, empty; `group`, a model group that nothing else uses; `captures`, where the host keeps
captured requests of an endpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import housing_assets.definitions  # noqa: F401  # the jobs ask for all assets
from housing_assets.deployments import load_resources
from housing_assets.maintenance.retention import prune
from resources.endpoints.base import EndpointHost
from resources.inventory import OwnedItem
from resources.model_registry.base import ApprovalStatus, ModelRegistry, ModelVersion
from resources.references.io_manager import StoredReference
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact
from tests.job_outcome import outcome
from tests.registry_contract import artifact
from tests.serving_models import gate, small_model, smoke_test

LOG = logging.getLogger("test")
P: ApprovalStatus = "PendingManualApproval"
A: ApprovalStatus = "Approved"
R: ApprovalStatus = "Rejected"


def register(registry: ModelRegistry, group: str, model: Artifact, status: ApprovalStatus) -> ModelVersion:
    evidence = gate(evaluation=model.digest)
    version = registry.register(group, model, metrics={"rmse": 1.0}, gate=evidence, lineage={"run_id": "run-1"})
    if status != P:
        version = registry.set_status(group, version.version, status, who="ann", why="looked at it")
    return version


def launch_prune(
    folder: Path, instance: dg.DagsterInstance, resources: dict[str, Any], **config: Any
) -> tuple[bool, dict[str, Any]]:
    """Whether job `prune` succeeded, and the metadata of its op or of the op's failure."""
    done = prune.execute_in_process(
        run_config={"ops": {"prune_old": {"config": config}}},
        resources=load_resources({"HOUSING_ROOT": str(folder / "data")}) | resources,
        instance=instance,
        raise_on_error=False,
    )
    return outcome(done)


def names(metadata: dict[str, Any], table: str) -> list[str]:
    return [record.data["name"] for record in metadata[table].records]


Launch = Callable[..., tuple[bool, dict[str, Any]]]


class PruningContract:
    @pytest.fixture
    def launch(
        self, tmp_path: Path, instance: dg.DagsterInstance, registry: ModelRegistry, host: EndpointHost
    ) -> Launch:
        resources: dict[str, Any] = {"model_registry": registry, "endpoint_host": host}
        return lambda **config: launch_prune(tmp_path, instance, resources, **config)

    def numbers(self, registry: ModelRegistry, group: str) -> list[int]:
        return [version.version for version in registry.list(group)]

    def test_old_versions_go_but_those_that_are_needed(
        self, launch: Launch, registry: ModelRegistry, group: str, tmp_path: Path
    ) -> None:
        statuses: list[ApprovalStatus] = [A, R, A, P, A, R, P]
        models = [artifact(tmp_path / str(n), f"model {n}") for n in range(len(statuses))]
        versions = [register(registry, group, *pair) for pair in zip(models, statuses, strict=True)]
        assert [v.version for v in versions] == [1, 2, 3, 4, 5, 6, 7]

        done, metadata = launch(versions=1)
        assert done, metadata
        assert names(metadata, "would_remove") == [f"{group}/{n}" for n in (1, 2, 6)]
        assert metadata["model_versions"] == 3
        assert self.numbers(registry, group) == [1, 2, 3, 4, 5, 6, 7], "a dry run, by default"

        done, metadata = launch(versions=3, pending_days=0, dry_run=False)
        assert done, metadata
        assert names(metadata, "removed") == [f"{group}/{n}" for n in (1, 2, 4)]
        assert self.numbers(registry, group) == [3, 5, 6, 7]
        assert [storage.exists(v.artifact.uri) for v in versions] == [n in (3, 5, 6, 7) for n in range(1, 8)]

        done, metadata = launch(versions=1, pending_days=0, dry_run=False)
        assert done, metadata
        assert {r.data["version"]: r.data["why"] for r in metadata["versions_kept"].records} == {
            f"{group}/3": "the latest approved version is compared with it",
            f"{group}/5": "it is the latest approved version",
        }
        assert self.numbers(registry, group) == [3, 5, 7]
        done, metadata = launch(versions=1, pending_days=0, dry_run=False)
        assert (done, metadata["model_versions"]) == (True, 0)
        assert register(registry, group, models[0], P).version == 8, "numbers are not used again"

    def test_what_endpoints_serve_or_go_back_to_stays(
        self, launch: Launch, registry: ModelRegistry, host: EndpointHost, group: str, tmp_path: Path
    ) -> None:
        models = [small_model(tmp_path / str(n), factor=n, rounds=2) for n in range(1, 7)]
        versions = [register(registry, group, model, A) for model in models]
        for n in (1, 2):
            host.deploy(group, versions[n], smoke_test(models[n]), LOG)
        done, metadata = launch(versions=1, dry_run=False)
        assert done, metadata
        assert {r.data["version"]: r.data["why"] for r in metadata["versions_kept"].records} == {
            f"{group}/2": f"endpoint {group} goes back to it",
            f"{group}/3": f"endpoint {group} serves it",
            f"{group}/5": "the latest approved version is compared with it",
        }
        assert names(metadata, "removed") == [f"{group}/1", f"{group}/4"]
        status = host.deploy(group, registry.get(group, 2), smoke_test(models[1]), LOG)
        assert (status.version, status.state) == (f"{group}/2", "InService")

    def test_what_an_asset_refers_to_stays(
        self, launch: Launch, registry: ModelRegistry, group: str, tmp_path: Path
    ) -> None:
        versions = [register(registry, group, artifact(tmp_path / str(n), f"model {n}"), R) for n in range(12)]
        value = versions[0].model_dump(mode="json")
        stored = StoredReference(asset="registered_model", run_id="run-1", value=value)
        stored.write(str(tmp_path / "data" / "references"))
        done, metadata = launch(dry_run=False)
        assert done, metadata
        assert names(metadata, "removed") == [f"{group}/2"], "ten newest stay, if nothing else is said"
        assert self.numbers(registry, group) == [1, *range(3, 13)]

    def test_a_version_that_cannot_be_removed_is_reported_and_the_rest_goes(
        self,
        launch: Launch,
        registry: ModelRegistry,
        group: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for n in range(4):
            register(registry, group, artifact(tmp_path / str(n), f"model {n}"), R)
        remove = type(registry).remove

        def refuse(self: Any, item: OwnedItem) -> None:
            if item.name == f"{group}/2":
                raise PermissionError("may not be removed")
            remove(self, item)

        with monkeypatch.context() as patch:
            patch.setattr(type(registry), "remove", refuse)
            done, metadata = launch(versions=1, dry_run=False)
        assert not done
        assert metadata["left"] == {f"{group}/2": "PermissionError: may not be removed"}
        assert f"{group}/2: PermissionError" in metadata["error"]
        assert names(metadata, "removed") == [f"{group}/1", f"{group}/3"]
        assert launch(versions=1, dry_run=False)[0]
        assert self.numbers(registry, group) == [4]

    def test_captured_requests_are_bounded_and_nothing_else_goes(
        self, launch: Launch, host: EndpointHost, captures: Callable[[str], str], tmp_path: Path
    ) -> None:
        def put(endpoint: str, path: str, size: int) -> str:
            uri = storage.join(captures(endpoint), path)
            storage.write_bytes(uri, b"x" * size)
            return uri

        first = put("houses", "AllTraffic/2026/11/01/10/00-01-002-a.jsonl", 600_000)
        foreign = [
            put("houses", "AllTraffic/2026/notes.txt", 900_000),
            put("houses", "2026/11/01/10/00-01-002-a.jsonl.bak", 10),
            storage.join(captures("houses").rpartition("captured")[0], "mine.jsonl"),
        ]
        storage.write_bytes(foreign[-1], b"x")
        wait_for_another_second(first)
        second = put("houses", "AllTraffic/2026/11/01/11/00-01-002-b.jsonl", 700_000)
        other = put("gone", "AllTraffic/2026/11/01/11/00-01-002-c.jsonl", 900_000)
        assert {file.bytes for file in host.captured_files()} == {600_000, 700_000, 900_000}

        done, metadata = launch(capture_megabytes=1.0)
        assert (done, metadata["captured_folders"], metadata["megabytes"]) == (True, 1, 0.6)
        assert storage.exists(first), "a dry run"
        done, metadata = launch(capture_megabytes=1.0, dry_run=False)
        assert done, metadata
        assert [storage.exists(uri) for uri in (first, second, other)] == [False, True, True]
        done, metadata = launch(capture_days=0, dry_run=False)
        assert (done, metadata["captured_folders"], metadata["megabytes"]) == (True, 2, 1.6)
        assert host.captured_files() == []
        assert all(storage.exists(uri) for uri in foreign)
        assert launch(capture_days=0, dry_run=False)[1]["captured_folders"] == 0


def wait_for_another_second(uri: str) -> None:
    """Until files that are written now are younger, in S3's resolution, than the file at `uri`."""
    folder, _, name = uri.rpartition("/")
    [written] = [modified for path, _, modified in storage.list_details(folder) if path == name]
    probe = storage.join(folder, "probe")
    while True:
        storage.write_bytes(probe, b"x")
        [now] = [modified for path, _, modified in storage.list_details(folder) if path == "probe"]
        if now >= written + 1:
            break
        time.sleep(0.1)
    storage.delete_file(probe)
