"""What a model registry is: versions of model groups, with evidence, lineage and approval."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Literal

import dagster as dg
from pydantic import Field, JsonValue

from resources.inventory import OwnedItem
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, DamagedArtifactError, FrozenModel, check_files

ApprovalStatus = Literal["PendingManualApproval", "Approved", "Rejected"]
NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")  # of model groups and endpoints; SageMaker's rule
_READERS = 8


class ModelVersionNotFound(LookupError):
    """There is no such version. The message names those that exist."""


class GateNotPassed(ValueError):
    """A version whose gate did not pass cannot be approved."""


class RegistryDamaged(RuntimeError):
    """A file of the registry cannot be read or is not what was written. The message names it."""


class GateEvidence(FrozenModel):
    """The evaluation that let the model in. `evaluation_digest` is the digest of the evaluation's artifact."""

    passed: bool
    metric: str
    value: float
    threshold: float
    evaluation_digest: str
    run_id: str


class StatusChange(FrozenModel):
    """One entry of a version's history."""

    status: ApprovalStatus
    who: str
    why: str
    when: datetime


class ModelVersion(FrozenModel):
    """One registered model. Everything but `status` and its history never changes.

    `artifact` is the registry's own copy. `lineage` says where the model came from: run, code versions, data digests,
    parameters.
    """

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

    @property
    def identity(self) -> tuple[str, str]:
        """What makes two registrations the same: model and evaluation."""
        return self.artifact.digest, self.gate.evaluation_digest

    def with_artifact_at(self, uri: str) -> ModelVersion:
        """This version with its files at another place."""
        return self.model_copy(update={"artifact": self.artifact.model_copy(update={"uri": uri})})

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


def split_reference(reference: str) -> tuple[str, int]:
    """Group and number of a `ModelVersion.reference`."""
    group, _, number = reference.rpartition("/")
    return group, int(number)


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


def check_name(name: str, what: str) -> None:
    """Raises `ValueError` for what cannot be the name of `what`, "an endpoint" for example."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of {what}: 1 to 63 letters, digits and inner hyphens")


def read_model(artifact: Artifact) -> dict[str, bytes]:
    """Contents of the artifact's files, by path. Raises `DamagedArtifactError` if one is not the recorded one."""
    for file in artifact.files:
        if file.path.startswith("/") or ".." in file.path.split("/"):
            raise ValueError(f"{artifact.uri}: {file.path} leads out of the artifact")
    check_files(artifact, "all")
    return {file.path: storage.read_bytes(storage.join(artifact.uri, file.path)) for file in artifact.files}


def verified(version: ModelVersion, *others: Artifact) -> ModelVersion:
    """The version, whose files (and `others`) are read and compared with their record. Raises `RegistryDamaged`."""
    try:
        for artifact in (version.artifact, *others):
            check_files(artifact, "all")
    except DamagedArtifactError as error:
        raise RegistryDamaged(
            f"model version {version.reference} is damaged: {error}. Restore the file, or delete the version."
        ) from error
    return version


class ModelRegistry(dg.ConfigurableResource, ABC):
    """Versions of model groups. Assets depend on this type; the deployment picks the implementation."""

    default_group: str = Field(default="housing", description="Model group of a deployment that names no other.")

    root: str = Field(description="Where the registry's files are kept.")

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
        if status == "Approved":
            require_gate(f"the model of run {gate.run_id}", gate)
        if not artifact.files:
            raise ValueError(f"{artifact.uri} holds no files: nothing to register")
        check_name(group, "a model group")
        now = datetime.now(UTC)
        why = f"registered; {gate.metric} {gate.value:g}, threshold {gate.threshold:g}"
        new = ModelVersion(
            group=group,
            version=1,
            artifact=artifact,
            status=status,
            status_history=(StatusChange(status=status, who=f"run {gate.run_id}", why=why, when=now),),
            metrics=metrics,
            gate=gate,
            lineage=lineage,
            created_at=now,
        )
        return self._register(new)

    @abstractmethod
    def _register(self, new: ModelVersion) -> ModelVersion:
        """See `register`. The number of `new` has yet to be found, and its artifact is the source."""

    @abstractmethod
    def get(self, group: str, version: int) -> ModelVersion:
        """One version, after all its files were compared with their record.

        Raises `ModelVersionNotFound`, `RegistryDamaged`.
        """

    def list(
        self, group: str, status: ApprovalStatus | None = None, damaged: dict[str, str] | None = None
    ) -> Sequence[ModelVersion]:
        """All versions (with `status`, if given), oldest first; empty if the group does not exist.

        Does not read the artifacts. A version whose record cannot be read is left out, and noted in `damaged`:
        reference → reason and remedy. Raises `RegistryDamaged` for it if no `damaged` is given.
        """
        check_name(group, "a model group")

        def read(entry: tuple[int, str]) -> ModelVersion | None:
            number, location = entry
            try:
                return self._read(group, number, location)
            except ModelVersionNotFound:
                return None
            except RegistryDamaged as error:
                if damaged is None:
                    raise
                damaged[f"{group}/{number}"] = str(error)
                return None

        with ThreadPoolExecutor(_READERS) as readers:
            found = [*readers.map(read, sorted(self._find(group, status).items()))]
        return [v for v in found if v is not None and status in (None, v.status)]

    @abstractmethod
    def _find(self, group: str, status: ApprovalStatus | None = None) -> Mapping[int, str]:
        """Numbers of the group's versions, and where they are. Those of another status may be left out."""

    @abstractmethod
    def _read(self, group: str, version: int, location: str) -> ModelVersion:
        """The version at a location that was found a moment ago. Raises `ModelVersionNotFound`, `RegistryDamaged`."""

    def _not_found(self, group: str, version: int, note: str = "") -> ModelVersionNotFound:
        numbers = ", ".join(map(str, sorted(self._find(group)))) or "none"
        return ModelVersionNotFound(
            f"model group {group} has no version {version}{note}; it has {numbers} (in {self.root})"
        )

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
