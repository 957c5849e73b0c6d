"""The local model registry on real files, with several processes at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from resources.model_registry.base import RegistryDamaged
from resources.model_registry.local import LocalModelRegistry
from step_scripts.runner.contract import DamagedArtifactError
from step_scripts.runner.local_files import file_lock
from tests import ROOT
from tests.registry_contract import RegistryContract, artifact, register


class TestContract(RegistryContract):
    pass


@pytest.fixture
def registry(tmp_path: Path) -> LocalModelRegistry:
    return LocalModelRegistry(root=str(tmp_path / "registry"))


def test_the_root_can_be_moved(registry: LocalModelRegistry, tmp_path: Path) -> None:
    register(registry, artifact(tmp_path / "model"))
    moved = shutil.move(registry.root, tmp_path / "elsewhere")
    found = LocalModelRegistry(root=str(moved)).get("housing", 1)
    assert Path(found.artifact.file_uri("model.ubj")).read_text() == "trees"
    assert str(tmp_path / "elsewhere") in found.artifact.uri


def test_a_refused_or_deleted_version_leaves_no_files(registry: LocalModelRegistry, tmp_path: Path) -> None:
    model = artifact(tmp_path / "model")
    register(registry, model)
    registry.delete("housing", 1)
    (tmp_path / "model" / "model.ubj").write_text("other")
    with pytest.raises(DamagedArtifactError):
        register(registry, model)
    assert list((Path(registry.root) / "housing" / "versions").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b'{"group": "housing", "ver', None])
def test_half_written_records_are_named(registry: LocalModelRegistry, tmp_path: Path, content: bytes | None) -> None:
    register(registry, artifact(tmp_path / "model"))
    path = Path(registry.root) / "housing" / "versions" / "1" / "version.json"
    path.unlink() if content is None else path.write_bytes(content)
    for read in (lambda: registry.get("housing", 1), lambda: registry.list("housing")):
        with pytest.raises(RegistryDamaged, match=str(path)):
            read()
    register(registry, artifact(tmp_path / "other", "other"))
    damaged: dict[str, str] = {}
    assert [v.version for v in registry.list("housing", damaged=damaged)] == [2], "it does not hide the others"
    assert str(path) in damaged["housing/1"]
    registry.delete("housing", 2)
    registry.delete("housing", 1)  # the remedy that the message names
    assert registry.list("housing") == []


def test_a_copied_record_does_not_pass_for_another_version(registry: LocalModelRegistry, tmp_path: Path) -> None:
    register(registry, artifact(tmp_path / "model"))
    versions = Path(registry.root) / "housing" / "versions"
    shutil.copytree(versions / "1", versions / "2")
    with pytest.raises(RegistryDamaged, match="describes version housing/1, not housing/2"):
        registry.get("housing", 2)


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
from step_scripts.runner.contract import DamagedArtifactError
from tests.registry_contract import RegistryContract, artifact, register
from tests.serving_models import gate
from resources.model_registry.local import LocalModelRegistry
from step_scripts.runner.contract import Artifact
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
