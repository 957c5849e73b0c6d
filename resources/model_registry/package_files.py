"""What the SageMaker registry keeps on S3 for a model package, what of it SageMaker's record shows, and who serves it.

`<root>/<group>/<model>/<evaluation>/`, where `model` is the start of the artifact's digest and `evaluation` that of the
evaluation's, holds `artifact/` (the model's files), `model.tar.gz` (the same files, as endpoints take them),
`metrics.json`, and the package's facts: `facts-<digest>.json`, which never changes, and for every change of status a
`status-<digest>.json` with the whole history. The package's properties name the files that count.

The container that serves a model is a custom image, or AWS's XGBoost image with the project's code. A custom image (see
the `Dockerfile`) holds the code and answers `serve`. AWS's image has a server of its own, which imports a module named
by `SAGEMAKER_PROGRAM` from the archive at `SAGEMAKER_SUBMIT_DIRECTORY`, after installing the archive and its
`requirements.txt`: such endpoints need a package index to start.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import JsonValue, TypeAdapter, ValidationError

from resources.aws.code_package import archive, job_image, requirements
from resources.aws.ownership import sanitised
from resources.model_registry.base import GateEvidence, ModelVersion, RegistryDamaged, StatusChange, read_model
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, FileInfo, FrozenModel

Parsed = TypeVar("Parsed")
ARCHIVE = "model.tar.gz"
FACTS = "facts_uri"  # the property that marks a package as registered here
_FACTS_DIGEST = "facts_sha256"
_HISTORY_URI, _HISTORY_DIGEST = "status_uri", "status_sha256"
_PROPERTY_LENGTH = 256
_DESCRIPTION_LIMIT = 1024
_ELSEWHERE = "SageMaker console or API"
_HISTORY = TypeAdapter(tuple[StatusChange, ...])
_HEX = re.compile(r"[0-9a-f]{32,}")
PROGRAM = "inference.py"
# The container's name and its model's digest, which the server shows, and checks before it serves.
VERSION_VARIABLE, DIGEST_VARIABLE = "HOUSING_MODEL_VERSION", "HOUSING_MODEL_DIGEST"
# What serving imports and AWS's image lacks, or has in another version: its server installs them before it serves.
# XGBoost and NumPy stay the image's.
SERVING_PACKAGES = {"polars": "", "pyarrow": "", "pydantic": ""}
_STEP_SCRIPTS = Path(__file__).parents[2] / "step_scripts"
_SETUP = b"""from setuptools import find_packages, setup

setup(name="housing-serving", version="1", py_modules=["inference"], packages=find_packages())
"""


class PackageFacts(FrozenModel):
    """Everything about a version that SageMaker's own record cannot hold in full. `artifact.uri` is left out."""

    artifact: Artifact
    archive: FileInfo
    metrics: dict[str, float]
    gate: GateEvidence
    lineage: dict[str, JsonValue]
    registered: StatusChange
    created_at: datetime


def write_model(folder: str, version: ModelVersion) -> dict[str, str]:
    """Copy the version's artifact below `folder`, with an archive of it, and write the facts.

    Returns the package's properties, which people and filters see in SageMaker; they cannot hold all characters. Raises
    `DamagedArtifactError` before anything is written if a file is missing or not the recorded one.
    """
    contents = read_model(version.artifact)
    for path, content in contents.items():
        storage.write_bytes(storage.join(folder, "artifact", path), content)
    packed = archive(contents)
    storage.write_bytes(storage.join(folder, ARCHIVE), packed)
    gate = version.gate
    facts = PackageFacts(
        artifact=version.artifact.model_copy(update={"uri": "artifact"}),
        archive=FileInfo(path=ARCHIVE, bytes=len(packed), sha256=hashlib.sha256(packed).hexdigest()),
        registered=version.status_history[0],
        **version.model_dump(include={"metrics", "gate", "lineage", "created_at"}),
    )
    uri, digest = _write(folder, "facts", facts.model_dump_json(indent=2).encode())
    lineage = {key: value for key, value in facts.lineage.items() if isinstance(value, str | int | float)}
    shown = {
        FACTS: uri,
        _FACTS_DIGEST: digest,
        "model_digest": facts.artifact.digest,
        "evaluation_digest": gate.evaluation_digest,
        "gate": f"{'passed' if gate.passed else 'failed'} {gate.metric}={gate.value:g} threshold={gate.threshold:g}",
        "run_id": gate.run_id,
        **{f"lineage:{key}": str(value) for key, value in lineage.items()},
    }
    clean = {sanitised(key, 128): sanitised(value, _PROPERTY_LENGTH) for key, value in shown.items() if value}
    return dict([*clean.items()][:40])  # of 50; the history needs two more


def write_metrics(folder: str, version: ModelVersion) -> dict[str, str]:
    """Write `metrics.json`: SageMaker's form of a model quality report. Returns the `Statistics` of the package."""
    quality = {
        "regression_metrics": {name: {"value": value} for name, value in sorted(version.metrics.items())},
        "gate": version.gate.model_dump(mode="json"),
    }
    content = json.dumps(quality, indent=2, sort_keys=True).encode()
    uri = storage.join(folder, "metrics.json")
    storage.write_bytes(uri, content)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return {"ContentType": "application/json", "ContentDigest": digest, "S3Uri": uri}


def write_history(folder: str, history: tuple[StatusChange, ...]) -> dict[str, str]:
    """Write all changes of status so far. Returns the properties that name the file."""
    uri, digest = _write(folder, "status", _HISTORY.dump_json(history, indent=2))
    return {_HISTORY_URI: uri, _HISTORY_DIGEST: digest}


def description_of(version: ModelVersion) -> str:
    """The text by which a model and its evaluation are found in a list of packages."""
    model, evaluation = short_digests(version)
    return f"model {model}, evaluation {evaluation}"


def approval_description(change: StatusChange) -> str:
    """The `ApprovalDescription` that goes with a change of status: one line."""
    return " ".join(f"{change.who}: {change.why}".split())[:_DESCRIPTION_LIMIT]


def folder_of(described: dict[str, Any]) -> str:
    """Where the files of a package are; empty for one that no registry of this project has created."""
    return described.get("CustomerMetadataProperties", {}).get(FACTS, "").rpartition("/")[0]


def read_version(group: str, described: dict[str, Any]) -> tuple[ModelVersion, Artifact]:
    """The version that a package is, by SageMaker's record and the files on S3, and its archive.

    Raises `RegistryDamaged` if a file cannot be read.
    """
    properties = described["CustomerMetadataProperties"]
    uri, folder = properties[FACTS], folder_of(described)
    facts = _read(uri, properties.get(_FACTS_DIGEST, ""), PackageFacts.model_validate_json, "record")
    history: tuple[StatusChange, ...] = (facts.registered,)
    if uri := properties.get(_HISTORY_URI):
        history = _read(uri, properties.get(_HISTORY_DIGEST, ""), _HISTORY.validate_json, "history")
    if change := _change_elsewhere(described, history[-1]):
        history = (*history, change)
    version = ModelVersion(
        group=group,
        version=described["ModelPackageVersion"],
        status=history[-1].status,
        status_history=history,
        **facts.model_dump(exclude={"archive", "registered"}),
    )
    return version.with_artifact_at(storage.join(folder, "artifact")), Artifact.of(folder, [facts.archive])


def _change_elsewhere(described: dict[str, Any], last: StatusChange) -> StatusChange | None:
    """The change that SageMaker knows of and the history does not, such as an approval in the console."""
    status, comment = described["ModelApprovalStatus"], described.get("ApprovalDescription", "")
    commented = bool(comment) and comment != approval_description(last)
    if status == last.status and not commented:
        return None
    modifier = described.get("LastModifiedBy") or {}
    who = modifier.get("UserProfileName") or (modifier.get("IamIdentity") or {}).get("Arn") or _ELSEWHERE
    when = described.get("LastModifiedTime") or described["CreationTime"]
    why = comment if commented else "no reason given"
    return StatusChange(status=status, who=who, why=why, when=when.astimezone(UTC))


def short_digests(version: ModelVersion) -> tuple[str, str]:
    """The start of the model's digest and of the evaluation's in hexadecimal digits; of the SHA-256 of other names."""
    model, evaluation = (
        digest if _HEX.fullmatch(digest) else hashlib.sha256(digest.encode()).hexdigest() for digest in version.identity
    )
    return model[:32], evaluation[:16]


def _write(folder: str, kind: str, content: bytes) -> tuple[str, str]:
    sha256 = hashlib.sha256(content).hexdigest()
    uri = storage.join(folder, f"{kind}-{sha256[:16]}.json")
    storage.write_bytes(uri, content)
    return uri, sha256


def _read(uri: str, sha256: str, parse: Callable[[bytes], Parsed], what: str) -> Parsed:
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise RegistryDamaged(f"{uri} is missing. Restore it, or delete the version.") from error
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise RegistryDamaged(f"{uri} has SHA-256 {found}, recorded was {sha256}. Restore it, or delete the version.")
    try:
        return parse(content)
    except ValidationError as error:
        raise RegistryDamaged(f"{uri} is no {what} of a model package: {error.errors()[0]['msg']}") from error


def serving_container(image: str | None, region: str, code_root: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """`Image` and `Environment` of the container. For AWS's image the code is put below `code_root` first.

    Raises `dagster.Failure` if AWS's image is wanted and cannot be known.
    """
    if image:
        return {"Image": image, "Environment": dict(environment)}
    found = job_image(None, region)
    code = serving_code()
    uri = storage.join(code_root, hashlib.sha256(code).hexdigest()[:16], "sourcedir.tar.gz")
    if not storage.exists(uri):
        storage.write_bytes(uri, code)
    script = {"SAGEMAKER_PROGRAM": PROGRAM, "SAGEMAKER_SUBMIT_DIRECTORY": uri, "SAGEMAKER_REGION": region}
    return {"Image": found, "Environment": {**script, **environment}}


def serving_code() -> bytes:
    """The archive for AWS's image: the module that its server imports, `step_scripts`, and pinned requirements."""
    files = {
        path.relative_to(_STEP_SCRIPTS.parent).as_posix(): path.read_bytes() for path in _STEP_SCRIPTS.rglob("*.py")
    }
    files[PROGRAM] = files[f"{_STEP_SCRIPTS.name}/{PROGRAM}"]
    files |= {"setup.py": _SETUP, "requirements.txt": requirements(SERVING_PACKAGES).encode()}
    return archive(files)
