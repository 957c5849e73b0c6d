"""What every model registry does: a class of tests to derive from, with a fixture `registry`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from resources.model_registry.base import (
    GateNotPassed,
    ModelRegistry,
    ModelVersion,
    ModelVersionNotFound,
    RegistryDamaged,
)
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, DamagedArtifactError, file_info
from tests.serving_models import gate


def artifact(folder: Path, content: str = "trees") -> Artifact:
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for name, text in (("model.ubj", content), ("sub/scaler.json", "{}")):
        (folder / name).write_text(text)
    return Artifact.of(str(folder), [file_info(f"{folder}/{n}", str(folder)) for n in ("model.ubj", "sub/scaler.json")])


def register(registry: ModelRegistry, model: Artifact, **changes: Any) -> ModelVersion:
    values: dict[str, Any] = {"metrics": {"rmse": 5000.0}, "gate": gate(), "lineage": {"run_id": "run-1"}, **changes}
    return registry.register("housing", model, **values)


def clear(registry: ModelRegistry) -> None:
    """Remove all that the registry holds."""
    for item in registry.inventory():
        registry.remove(item)


class RegistryContract:
    def test_a_version_keeps_its_own_copy(self, registry: ModelRegistry, tmp_path: Path) -> None:
        model = artifact(tmp_path / "model")
        version = register(registry, model)
        shutil.rmtree(tmp_path / "model")
        assert version.reference == "housing/1"
        assert version.status == "PendingManualApproval"
        assert version.artifact.digest == model.digest
        assert storage.read_bytes(version.artifact.file_uri("model.ubj")) == b"trees"
        assert registry.get("housing", 1) == version
        assert registry.latest("housing") == version

    def test_the_same_model_and_evaluation_is_one_version(self, registry: ModelRegistry, tmp_path: Path) -> None:
        model = artifact(tmp_path / "model")
        first = register(registry, model)
        assert register(registry, model) == first
        assert register(registry, model, gate=gate(evaluation="e2")).version == 2
        assert register(registry, artifact(tmp_path / "other", "more trees")).version == 3
        assert [v.version for v in registry.list("housing")] == [1, 2, 3]

    def test_status_changes_are_recorded(self, registry: ModelRegistry, tmp_path: Path) -> None:
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

    def test_a_failed_gate_cannot_be_approved(self, registry: ModelRegistry, tmp_path: Path) -> None:
        model = artifact(tmp_path / "model")
        with pytest.raises(GateNotPassed, match=r"rmse 20000, threshold 15000, run run-1"):
            register(registry, model, gate=gate(20000), status="Approved")
        assert registry.list("housing") == []
        register(registry, model, gate=gate(20000))
        with pytest.raises(GateNotPassed, match="housing/1 cannot be approved"):
            registry.set_status("housing", 1, "Approved", who="ann", why="please")
        assert registry.get("housing", 1).status == "PendingManualApproval"

    def test_listing_by_status(self, registry: ModelRegistry, tmp_path: Path) -> None:
        for number in range(1, 4):
            register(registry, artifact(tmp_path / str(number), str(number)))
        registry.set_status("housing", 2, "Approved", who="ann", why="good")
        assert [v.version for v in registry.list("housing", "Approved")] == [2]
        latest = registry.latest("housing", "Approved")
        assert latest is not None
        assert latest.version == 2
        assert registry.latest("housing", "Rejected") is None
        assert registry.list("unknown") == []

    def test_absent_versions_are_named(self, registry: ModelRegistry, tmp_path: Path) -> None:
        with pytest.raises(ModelVersionNotFound, match="housing has no version 1; it has none"):
            registry.get("housing", 1)
        register(registry, artifact(tmp_path / "model"))
        with pytest.raises(ModelVersionNotFound, match="housing has no version 7; it has 1"):
            registry.set_status("housing", 7, "Approved", who="ann", why="good")
        with pytest.raises(ValueError, match="no name of a model group"):
            registry.get("../housing", 1)

    @pytest.mark.parametrize("damage", ["altered", "shorter", "missing"])
    def test_damaged_model_files_are_named(self, registry: ModelRegistry, tmp_path: Path, damage: str) -> None:
        version = register(registry, artifact(tmp_path / "model"))
        uri = version.artifact.file_uri("model.ubj")
        if damage == "missing":
            storage.delete_file(uri)
        else:
            storage.write_bytes(uri, b"treeX" if damage == "altered" else b"tree")
        with pytest.raises(RegistryDamaged, match=f"housing/1 is damaged: {uri}"):
            registry.get("housing", 1)

    def test_a_model_that_does_not_match_its_artifact_is_refused(self, registry: ModelRegistry, tmp_path: Path) -> None:
        model = artifact(tmp_path / "model")
        (tmp_path / "model" / "model.ubj").write_text("other")
        with pytest.raises(DamagedArtifactError, match=r"model\.ubj has SHA-256"):
            register(registry, model)
        (tmp_path / "model" / "model.ubj").unlink()
        with pytest.raises(DamagedArtifactError, match=f"{tmp_path}/model/model.ubj is missing"):
            register(registry, model)
        assert registry.list("housing") == []

    def test_a_deleted_version_is_gone_and_its_number_not_used_again(
        self, registry: ModelRegistry, tmp_path: Path
    ) -> None:
        model = artifact(tmp_path / "model")
        version = register(registry, model)
        registry.delete("housing", 1)
        assert not storage.exists(version.artifact.uri)
        with pytest.raises(ModelVersionNotFound):
            registry.delete("housing", 1)
        assert register(registry, model).version == 2
