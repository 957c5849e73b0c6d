"""What the SageMaker registry keeps on S3 for a model package.

`<root>/<group>/<model>/<evaluation>/`, where `model` is the start of the artifact's digest and `evaluation` that of the
evaluation's, holds `artifact/` (the model's files), `model.tar.gz` (the same files, as endpoints take them),
`metrics.json`, and the package's facts: `facts-<digest>.json`, which never changes, and for every change of status a
`status-<digest>.json` with the whole history. The package's properties name the files that count.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError

from resources.aws.code_package import archive
from resources.model_registry.base import GateEvidence, RegistryDamaged, StatusChange
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, DamagedArtifactError, FileInfo
from step_scripts.serving.deployment import verify_content

ARCHIVE = "model.tar.gz"
METRICS = "metrics.json"
_HISTORY = TypeAdapter(tuple[StatusChange, ...])
_HEX = re.compile(r"[0-9a-f]{32,}")


class PackageFacts(BaseModel):
    """Everything about a version that SageMaker's own record cannot hold in full. `artifact.uri` is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    artifact: Artifact
    archive: FileInfo
    metrics: dict[str, float]
    gate: GateEvidence
    lineage: dict[str, JsonValue]
    registered: StatusChange
    created_at: datetime


def shortened(digest: str, length: int) -> str:
    """The start of a digest in hexadecimal digits; of the SHA-256 of anything else."""
    return (digest if _HEX.fullmatch(digest) else hashlib.sha256(digest.encode()).hexdigest())[:length]


def package_uri(root: str, group: str, model_digest: str, evaluation_digest: str) -> str:
    """The folder of the package."""
    return storage.join(root, group, shortened(model_digest, 32), shortened(evaluation_digest, 16))


def copy_artifact(source: Artifact, folder: str) -> tuple[Artifact, FileInfo]:
    """Put the artifact's files and the archive of them below `folder`; returns the copy, and the archive.

    Raises `DamagedArtifactError` before anything is written if a file is missing or not the recorded one.
    """
    contents: dict[str, bytes] = {}
    for file in source.files:
        if file.path.startswith("/") or ".." in file.path.split("/"):
            raise ValueError(f"{source.uri}: {file.path} leads out of the artifact")
        uri = storage.join(source.uri, file.path)
        try:
            contents[file.path] = storage.read_bytes(uri)
        except FileNotFoundError as error:
            raise DamagedArtifactError(
                f"{uri} is missing: the model that was to be registered is incomplete"
            ) from error
        verify_content(uri, contents[file.path], file)
    copy = source.model_copy(update={"uri": storage.join(folder, "artifact")})
    for path, content in contents.items():
        storage.write_bytes(storage.join(copy.uri, path), content)
    packed = archive(contents)
    storage.write_bytes(storage.join(folder, ARCHIVE), packed)
    return copy, FileInfo(path=ARCHIVE, bytes=len(packed), sha256=hashlib.sha256(packed).hexdigest())


def model_quality(metrics: dict[str, float], gate: GateEvidence) -> dict[str, Any]:
    """The metrics in the form of SageMaker's model quality reports, with the gate beside them."""
    return {
        "regression_metrics": {name: {"value": value} for name, value in sorted(metrics.items())},
        "gate": gate.model_dump(mode="json"),
    }


def write_metrics(folder: str, metrics: dict[str, float], gate: GateEvidence) -> tuple[str, str]:
    """Write `metrics.json`; returns its URI and its digest as `sha256:…`."""
    content = json.dumps(model_quality(metrics, gate), indent=2, sort_keys=True).encode()
    uri = storage.join(folder, METRICS)
    storage.write_bytes(uri, content)
    return uri, f"sha256:{hashlib.sha256(content).hexdigest()}"


def write_facts(folder: str, facts: PackageFacts) -> tuple[str, str]:
    """Write the facts; returns URI and SHA-256."""
    stored = facts.model_copy(update={"artifact": facts.artifact.model_copy(update={"uri": "artifact"})})
    return _write(folder, "facts", stored.model_dump_json(indent=2).encode())


def write_history(folder: str, history: tuple[StatusChange, ...]) -> tuple[str, str]:
    """Write all changes of status so far; returns URI and SHA-256."""
    return _write(folder, "status", _HISTORY.dump_json(history, indent=2))


def read_facts(uri: str, sha256: str) -> PackageFacts:
    """The facts, with `artifact.uri` set. Raises `RegistryDamaged`."""
    try:
        facts = PackageFacts.model_validate_json(_read(uri, sha256))
    except ValidationError as error:
        raise RegistryDamaged(f"{uri} is no record of a model package: {error.errors()[0]['msg']}") from error
    folder = uri.rpartition("/")[0]
    return facts.model_copy(
        update={"artifact": facts.artifact.model_copy(update={"uri": storage.join(folder, "artifact")})}
    )


def read_history(uri: str, sha256: str) -> tuple[StatusChange, ...]:
    """All recorded changes of status, oldest first. Raises `RegistryDamaged`."""
    try:
        return _HISTORY.validate_json(_read(uri, sha256))
    except ValidationError as error:
        raise RegistryDamaged(f"{uri} is no history of a model package: {error.errors()[0]['msg']}") from error


def _write(folder: str, kind: str, content: bytes) -> tuple[str, str]:
    sha256 = hashlib.sha256(content).hexdigest()
    uri = storage.join(folder, f"{kind}-{sha256[:16]}.json")
    storage.write_bytes(uri, content)
    return uri, sha256


def _read(uri: str, sha256: str) -> bytes:
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise RegistryDamaged(f"{uri} is missing. Restore it, or delete the version.") from error
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise RegistryDamaged(f"{uri} has SHA-256 {found}, recorded was {sha256}. Restore it, or delete the version.")
    return content
