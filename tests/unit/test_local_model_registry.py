"""The local model registry on real files, with several processes at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from resources.file_lock import file_lock
from resources.model_registry.base import GateNotPassed, ModelVersionNotFound, RegistryDamaged
from resources.model_registry.local import LocalModelRegistry
from step_scripts import storage
from step_scripts.contract import Artifact, file_info
from step_scripts.deployment import DamagedArtifactError
from tests.serving_models import gate

ROOT = Path(__file__).parents[2]


def artifact(folder: Path, content: str = "trees") -> Artifact:
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for name, text in (("model.ubj", content), ("sub/scaler.json", "{}")):
        (folder / name).write_text(text)
    return Artifact.of(str(folder), [file_info(f"{folder}/{n}", str(folder)) for n in ("model.ubj", "sub/scaler.json")])


def register(registry: LocalModelRegistry, model: Artifact, **changes):
    values = {"metrics": {"rmse": 5000.0}, "gate": gate(), "lineage": {"run_id": "run-1"}, **changes}
    return registry.register("housing", model, **values)


@pytest.fixture
def registry(tmp_path: Path) -> LocalModelRegistry:
    return LocalModelRegistry(root=str(tmp_path / "registry"))


def test_a_version_keeps_its_own_copy(registry: LocalModelRegistry, tmp_path: Path) -> None:
    model = artifact(tmp_path / "model")
    version = register(registry, model)
    shutil.rmtree(tmp_path / "model")
    assert version.reference == "housing/1"
    assert version.status == "PendingManualApproval"
    assert version.artifact.digest == model.digest
    assert storage.read_bytes(version.artifact.file_uri("model.ubj")) == b"trees"
    assert registry.get("housing", 1) == version
    assert registry.latest("housing") == version


def test_the_root_can_be_moved(registry: LocalModelRegistry, tmp_path: Path) -> None:
    register(registry, artifact(tmp_path / "model"))
    moved = shutil.move(registry.root, tmp_path / "elsewhere")
    found = LocalModelRegistry(root=str(moved)).get("housing", 1)
    assert Path(found.artifact.file_uri("model.ubj")).read_text() == "trees"
    assert str(tmp_path / "elsewhere") in found.artifact.uri


def test_the_same_model_and_evaluation_is_one_version(registry: LocalModelRegistry, tmp_path: Path) -> None:
    model = artifact(tmp_path / "model")
    first = register(registry, model)
    assert register(registry, model) == first
    assert register(registry, model, gate=gate(evaluation="e2")).version == 2
    assert register(registry, artifact(tmp_path / "other", "more trees")).version == 3
    assert [v.version for v in registry.list("housing")] == [1, 2, 3]


def test_status_changes_are_recorded(registry: LocalModelRegistry, tmp_path: Path) -> None:
    register(registry, artifact(tmp_path / "model"))
    registry.set_status("housing", 1, "Approved", who="ann", why="good")
    registry.set_status("housing", 1, "Approved", who="bob", why="again")
    registry.set_status("housing", 1, "Rejected", who="cid", why="biased")
    found = registry.set_status("housing", 1, "Approved", who="ann", why="fixed upstream")
    history = [(c.status, c.who, c.why) for c in registry.get("housing", 1).status_history]
    assert history == [
        ("PendingManualApproval", "run run-1", "registered; rmse 5000, threshold 15000"),
        ("Approved", "ann", "good"),
        ("Rejected", "cid", "biased"),
        ("Approved", "ann", "fixed upstream"),
    ]
    assert found.status == "Approved"
    with pytest.raises(ValueError, match="housing/1 is Approved and cannot be pending again"):
        registry.set_status("housing", 1, "PendingManualApproval", who="ann", why="?")
    with pytest.raises(ValueError, match="who decided it and why"):
        registry.set_status("housing", 1, "Rejected", who="ann", why=" ")


def test_a_failed_gate_cannot_be_approved(registry: LocalModelRegistry, tmp_path: Path) -> None:
    model = artifact(tmp_path / "model")
    with pytest.raises(GateNotPassed, match=r"rmse 20000, threshold 15000, run run-1"):
        register(registry, model, gate=gate(20000), status="Approved")
    assert registry.list("housing") == []
    register(registry, model, gate=gate(20000))
    with pytest.raises(GateNotPassed, match="housing/1 cannot be approved"):
        registry.set_status("housing", 1, "Approved", who="ann", why="please")
    assert registry.get("housing", 1).status == "PendingManualApproval"


def test_listing_by_status(registry: LocalModelRegistry, tmp_path: Path) -> None:
    for number in range(1, 4):
        register(registry, artifact(tmp_path / str(number), str(number)))
    registry.set_status("housing", 2, "Approved", who="ann", why="good")
    assert [v.version for v in registry.list("housing", "Approved")] == [2]
    latest = registry.latest("housing", "Approved")
    assert latest is not None
    assert latest.version == 2
    assert registry.latest("housing", "Rejected") is None
    assert registry.list("unknown") == []


def test_absent_versions_are_named(registry: LocalModelRegistry, tmp_path: Path) -> None:
    with pytest.raises(ModelVersionNotFound, match="housing has no version 1; it has none"):
        registry.get("housing", 1)
    register(registry, artifact(tmp_path / "model"))
    with pytest.raises(ModelVersionNotFound, match="housing has no version 7; it has 1"):
        registry.set_status("housing", 7, "Approved", who="ann", why="good")
    with pytest.raises(ValueError, match="no name of a model group"):
        registry.get("../housing", 1)


def test_numbers_are_not_used_again(registry: LocalModelRegistry, tmp_path: Path) -> None:
    model = artifact(tmp_path / "model")
    register(registry, model)
    registry.delete("housing", 1)
    with pytest.raises(ModelVersionNotFound):
        registry.delete("housing", 1)
    assert register(registry, model).version == 2
    left = sorted(p.name for p in (Path(registry.root) / "housing" / "versions").iterdir())
    assert left == ["2"]


@pytest.mark.parametrize("damage", ["altered", "shorter", "missing"])
def test_damaged_model_files_are_named(registry: LocalModelRegistry, tmp_path: Path, damage: str) -> None:
    version = register(registry, artifact(tmp_path / "model"))
    path = Path(version.artifact.file_uri("model.ubj"))
    path.unlink() if damage == "missing" else path.write_text("treeX" if damage == "altered" else "tree")
    with pytest.raises(RegistryDamaged, match=f"housing/1 is damaged: {path}"):
        registry.get("housing", 1)


@pytest.mark.parametrize("content", [b"", b'{"group": "housing", "ver', None])
def test_half_written_records_are_named(registry: LocalModelRegistry, tmp_path: Path, content: bytes | None) -> None:
    register(registry, artifact(tmp_path / "model"))
    path = Path(registry.root) / "housing" / "versions" / "1" / "version.json"
    path.unlink() if content is None else path.write_bytes(content)
    for read in (lambda: registry.get("housing", 1), lambda: registry.list("housing")):
        with pytest.raises(RegistryDamaged, match=str(path)):
            read()
    registry.delete("housing", 1)  # the remedy that the message names
    assert registry.list("housing") == []


def test_a_copied_record_does_not_pass_for_another_version(registry: LocalModelRegistry, tmp_path: Path) -> None:
    register(registry, artifact(tmp_path / "model"))
    versions = Path(registry.root) / "housing" / "versions"
    shutil.copytree(versions / "1", versions / "2")
    with pytest.raises(RegistryDamaged, match="describes version housing/1, not housing/2"):
        registry.get("housing", 2)


def test_a_model_that_does_not_match_its_artifact_is_refused(registry: LocalModelRegistry, tmp_path: Path) -> None:
    model = artifact(tmp_path / "model")
    (tmp_path / "model" / "model.ubj").write_text("other")
    with pytest.raises(DamagedArtifactError, match=r"model\.ubj has SHA-256"):
        register(registry, model)
    (tmp_path / "model" / "model.ubj").unlink()
    with pytest.raises(DamagedArtifactError, match=f"{tmp_path}/model/model.ubj is missing"):
        register(registry, model)
    assert list((Path(registry.root) / "housing" / "versions").iterdir()) == []


def test_leftovers_of_a_killed_writer_are_removed(registry: LocalModelRegistry, tmp_path: Path) -> None:
    left = Path(registry.root) / "housing" / "versions" / ".staging-1"
    left.mkdir(parents=True)
    assert registry.list("housing") == []
    register(registry, artifact(tmp_path / "model"))
    assert not left.exists()


def test_a_held_lock_has_a_deadline(tmp_path: Path) -> None:
    registry = LocalModelRegistry(root=str(tmp_path / "registry"), lock_timeout_seconds=0.1)
    model = artifact(tmp_path / "model")
    lock = tmp_path / "registry" / "housing" / "lock"
    with file_lock(lock, 1, "test"), pytest.raises(TimeoutError, match=f"registering .* has held {lock}"):
        register(registry, model)
    assert register(registry, model).version == 1


REGISTER = """
import sys
from tests.serving_models import gate
from resources.model_registry.local import LocalModelRegistry
from step_scripts.contract import Artifact
registry = LocalModelRegistry(root=sys.argv[1])
model = Artifact.model_validate_json(sys.argv[2])
for n in range(5):
    for evaluation in ("shared", sys.argv[3] + str(n)):
        version = registry.register(
            "housing", model, metrics={}, gate=gate(evaluation=f"{evaluation}-{n}"), lineage={"process": sys.argv[3]}
        )
        print(evaluation, version.version)
"""


def test_processes_that_register_at_once_get_different_versions(tmp_path: Path) -> None:
    root, model = str(tmp_path / "registry"), artifact(tmp_path / "model").model_dump_json()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REGISTER, root, model, f"process{n}-"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for n in range(3)
    ]
    lines = [line.split() for p in processes for line in p.communicate(timeout=60)[0].splitlines()]
    assert all(p.returncode == 0 for p in processes)
    own = [int(number) for evaluation, number in lines if evaluation != "shared"]
    shared = {int(number) for evaluation, number in lines if evaluation == "shared"}
    assert len(own) == len(set(own)) == 15
    assert len(shared) == 5  # registered by all three, one version each
    assert sorted([*own, *shared]) == list(range(1, 21))
    listed = LocalModelRegistry(root=root).list("housing")
    assert [v.version for v in listed] == list(range(1, 21))


def test_the_record_is_readable_json(registry: LocalModelRegistry, tmp_path: Path) -> None:
    register(registry, artifact(tmp_path / "model"), lineage={"data": {"train": "abc"}, "trials": 4})
    stored = json.loads((Path(registry.root) / "housing" / "versions" / "1" / "version.json").read_text())
    assert stored["lineage"] == {"data": {"train": "abc"}, "trials": 4}
    assert stored["gate"]["passed"] is True
    assert stored["artifact"]["uri"] == "artifact"
