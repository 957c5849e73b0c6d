"""Builds a model version from SageMaker's record and the files on S3, and the texts that SageMaker keeps of it."""

from __future__ import annotations

from datetime import UTC
from typing import Any

from resources.aws.ownership import sanitised
from resources.model_registry import package_files as files
from resources.model_registry.base import GateEvidence, ModelVersion, StatusChange
from resources.model_registry.model_packages import one_line
from step_scripts.runner.contract import Artifact

# Properties of a package: the files that count, with their SHA-256.
FACTS, FACTS_DIGEST = "facts_uri", "facts_sha256"
HISTORY, HISTORY_DIGEST = "status_uri", "status_sha256"
_PROPERTY_LENGTH = 256
_ELSEWHERE = "SageMaker console or API"


def description_of(artifact: Artifact, gate: GateEvidence) -> str:
    """The text by which a model and its evaluation are found in a list of packages."""
    model, evaluation = files.shortened(artifact.digest, 32), files.shortened(gate.evaluation_digest, 16)
    return f"model {model}, evaluation {evaluation}"


def properties_of(facts: files.PackageFacts, uri: str, digest: str) -> dict[str, str]:
    """What people and filters see in SageMaker; the file has it in full. Properties cannot hold all characters."""
    lineage = {key: value for key, value in facts.lineage.items() if isinstance(value, str | int | float)}
    shown = {
        FACTS: uri,
        FACTS_DIGEST: digest,
        "model_digest": facts.artifact.digest,
        "evaluation_digest": facts.gate.evaluation_digest,
        "gate": f"{'passed' if facts.gate.passed else 'failed'} {facts.gate.metric}={facts.gate.value:g} "
        f"threshold={facts.gate.threshold:g}",
        "run_id": facts.gate.run_id,
        **{f"lineage:{key}": str(value) for key, value in lineage.items()},
    }
    clean = {sanitised(key, 128): sanitised(value, _PROPERTY_LENGTH) for key, value in shown.items() if value}
    return dict([*clean.items()][:40])  # of 50; the history needs two more


def named(described: dict[str, Any], uri: str, digest: str) -> tuple[str, str]:
    """URI and SHA-256 of a file that the package's properties name."""
    properties = described["CustomerMetadataProperties"]
    return properties[uri], properties.get(digest, "")


def approval_description(change: StatusChange) -> str:
    """The `ApprovalDescription` that goes with a change of status."""
    return one_line(f"{change.who}: {change.why}")


def version_of(group: str, described: dict[str, Any], facts: files.PackageFacts) -> ModelVersion:
    """The version as SageMaker and the facts have it. Raises `RegistryDamaged` if the history cannot be read."""
    history: tuple[StatusChange, ...] = (facts.registered,)
    if HISTORY in described["CustomerMetadataProperties"]:
        history = files.read_history(*named(described, HISTORY, HISTORY_DIGEST))
    if change := _change_elsewhere(described, history[-1]):
        history = (*history, change)
    return ModelVersion(
        group=group,
        version=described["ModelPackageVersion"],
        artifact=facts.artifact,
        status=history[-1].status,
        status_history=history,
        metrics=facts.metrics,
        gate=facts.gate,
        lineage=facts.lineage,
        created_at=facts.created_at,
    )


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
