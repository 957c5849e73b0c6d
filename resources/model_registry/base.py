"""What a model registry is: versions of model groups, with evidence, lineage and approval."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import datetime
from typing import Literal

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from resources.inventory import OwnedItem
from step_scripts.runner.contract import Artifact

ApprovalStatus = Literal["PendingManualApproval", "Approved", "Rejected"]


class ModelVersionNotFound(KeyError):
    """There is no such version. The message names those that exist."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show it quoted


class GateNotPassed(ValueError):
    """A version whose gate did not pass cannot be approved."""


class RegistryDamaged(RuntimeError):
    """A file of the registry cannot be read or is not what was written. The message names it."""


class GateEvidence(BaseModel):
    """The evaluation that let the model in. `evaluation_digest` is the digest of the evaluation's artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    passed: bool
    metric: str
    value: float
    threshold: float
    evaluation_digest: str
    run_id: str


class StatusChange(BaseModel):
    """One entry of a version's history."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: ApprovalStatus
    who: str
    why: str
    when: datetime


class ModelVersion(BaseModel):
    """One registered model. Everything but `status` and its history never changes.

    `artifact` is the registry's own copy. `lineage` says where the model came from: run, code versions, data digests,
    parameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: str
    version: int = Field(ge=1)
    artifact: Artifact
    status: ApprovalStatus
    status_history: tuple[StatusChange, ...]
    metrics: dict[str, float]
    gate: GateEvidence
    lineage: dict[str, JsonValue]
    created_at: datetime

    @property
    def reference(self) -> str:
        """`<group>/<version>`."""
        return f"{self.group}/{self.version}"

    def with_status(self, status: ApprovalStatus, *, who: str, why: str, when: datetime) -> ModelVersion:
        """This version with another status, and the change in its history; itself if it has that status already.

        Raises `ValueError` if `who` or `why` is empty or the change is not allowed: a decided version is approved or
        rejected, never pending again. Raises `GateNotPassed` for the approval of a version whose gate did not pass.
        """
        if not who.strip() or not why.strip():
            raise ValueError(f"model version {self.reference}: a change of status needs who decided it and why")
        if status == self.status:
            return self
        if status == "PendingManualApproval":
            raise ValueError(f"model version {self.reference} is {self.status} and cannot be pending again")
        if status == "Approved":
            require_gate(self.reference, self.gate)
        change = StatusChange(status=status, who=who, why=why, when=when)
        return self.model_copy(update={"status": status, "status_history": (*self.status_history, change)})


def require_gate(name: str, gate: GateEvidence) -> None:
    """Raises `GateNotPassed` with the figures if the gate did not pass."""
    if not gate.passed:
        raise GateNotPassed(
            f"{name} cannot be approved: its gate did not pass ({gate.metric} {gate.value:g}, threshold "
            f"{gate.threshold:g}, run {gate.run_id})"
        )


def champion_of(versions: Sequence[ModelVersion], challenger: str) -> ModelVersion | None:
    """The approved version that a model with digest `challenger` has to beat: the latest that is another model."""
    others = [v for v in versions if v.status == "Approved" and v.artifact.digest != challenger]
    return max(others, key=lambda v: v.version, default=None)


class ModelRegistry(dg.ConfigurableResource, ABC):
    """Versions of model groups. Assets depend on this type; the deployment picks the implementation."""

    default_group: str = Field(default="housing", description="Model group of a deployment that names no other.")

    @abstractmethod
    def register(
        self,
        group: str,
        artifact: Artifact,
        *,
        metrics: dict[str, float],
        gate: GateEvidence,
        lineage: dict[str, JsonValue],
        status: ApprovalStatus = "PendingManualApproval",
    ) -> ModelVersion:
        """Copy the artifact into the registry as the next version of `group`.

        A model that is there already (same artifact digest and same evaluation digest) is not registered twice: the
        existing version is returned, with the status it has. Raises `GateNotPassed` if `status` is Approved without a
        passed gate, `step_scripts.runner.contract.DamagedArtifactError` if a file does not match the artifact.
        """

    @abstractmethod
    def get(self, group: str, version: int) -> ModelVersion:
        """One version. Raises `ModelVersionNotFound`, `RegistryDamaged`."""

    @abstractmethod
    def list(
        self, group: str, status: ApprovalStatus | None = None, damaged: dict[str, str] | None = None
    ) -> Sequence[ModelVersion]:
        """All versions (with `status`, if given), oldest first; empty if the group does not exist.

        A version whose record cannot be read is left out, and noted in `damaged`: reference → reason and remedy.
        Raises `RegistryDamaged` for it if no `damaged` is given.
        """

    @abstractmethod
    def set_status(self, group: str, version: int, status: ApprovalStatus, *, who: str, why: str) -> ModelVersion:
        """Approve or reject a version, see `ModelVersion.with_status`."""

    @abstractmethod
    def delete(self, group: str, version: int) -> None:
        """Remove a version and its files. Its number is not used again. Raises `ModelVersionNotFound`."""

    @abstractmethod
    def inventory(self) -> Sequence[OwnedItem]:
        """All groups and versions of this registry, and their files."""

    @abstractmethod
    def remove(self, item: OwnedItem) -> None:
        """Remove what `inventory` listed; nothing happens if it is gone. Raises `NotOwned` for what is another's."""

    def latest(self, group: str, status: ApprovalStatus | None = None) -> ModelVersion | None:
        """The version with the highest number (among those with `status`, if given), or None."""
        versions = self.list(group, status)
        return self.get(group, versions[-1].version) if versions else None
