"""The model registry of SageMaker: a model package group a group, a model package a version.

SageMaker keeps number, container, metrics and approval status; the full facts lie on S3 (`package_files`), named with
their digests by the package's properties, so that a version is complete as soon as it exists. A version approved or
rejected in the SageMaker console, or by anything else, counts: its history shows what SageMaker knows of that change.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Self

import dagster as dg
from pydantic import Field, JsonValue, model_validator

from resources.aws.calls import aws_client
from resources.aws.ownership import root_tags
from resources.aws.request_validation import check_request
from resources.inventory import OwnedItem, remove_file
from resources.model_registry import package_files as files
from resources.model_registry.base import (
    ApprovalStatus,
    GateEvidence,
    ModelRegistry,
    ModelVersion,
    ModelVersionNotFound,
    RegistryDamaged,
    StatusChange,
    require_gate,
)
from resources.model_registry.model_packages import GROUP, ModelPackages, package_request
from resources.model_registry.package_inventory import PackageInventory
from resources.model_registry.package_record import (
    FACTS,
    FACTS_DIGEST,
    HISTORY,
    HISTORY_DIGEST,
    approval_description,
    description_of,
    named,
    properties_of,
    version_of,
)
from resources.model_registry.serving_container import DIGEST_VARIABLE, serving_container
from resources.waiting import wait_until
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, DamagedArtifactError, check_files
from step_scripts.runner.s3_objects import delete_prefix
from step_scripts.serving.deployment import verify_file

_ROOT = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_.=+@-]+)*")
_ROOT_LENGTH = 128  # a property's value has at most 256 characters, and must hold the URI of a file below the root
_READERS = 8
_OTHER_SECONDS = 5.0  # how long the version of a faster process may take to appear in the list
_Names = list[str]  # in the class `list` is a method


class SageMakerModelRegistry(ModelRegistry):
    """Versions as model packages. Any number of processes may use it at once."""

    root: str = Field(description="s3:// prefix for the models' files, at most 128 characters.")
    image: str | None = Field(
        default=None,
        description="Image that serves the models. Empty: AWS's XGBoost image of the region; needs sagemaker.",
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="Environment variables of the serving containers."
    )
    instance_types: _Names = Field(
        default=["ml.m5.large", "ml.m5.xlarge", "ml.c5.large", "ml.c5.xlarge", "ml.t2.medium"],
        min_length=1,
        description="Instance types that the models are good for as endpoints.",
    )
    transform_instance_types: _Names = Field(
        default=["ml.m5.large", "ml.m5.xlarge"],
        min_length=1,
        description="Instance types that the models are good for in batch transform jobs.",
    )
    tags: dict[str, str] = Field(default_factory=dict, description="More tags for the groups that are created.")
    region_name: str | None = Field(default=None, description="AWS region. Empty: boto3's.")
    settle_seconds: float = Field(default=120.0, gt=0, description="How long a new version may take to be there.")
    retry_timeout_seconds: float = Field(
        default=300.0, gt=0, description="How long calls that AWS throttles or does not answer are repeated; seconds."
    )

    @model_validator(mode="after")
    def _check_root(self) -> Self:
        root = self.root
        if not isinstance(root, dg.EnvVar) and (len(root) > _ROOT_LENGTH or not _ROOT.fullmatch(root.rstrip("/"))):
            raise ValueError(
                f"root must be an s3:// prefix of at most {_ROOT_LENGTH} characters, of letters, digits and _.=+@-; "
                f"it is {root!r}"
            )
        return self

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
        """See `ModelRegistry.register`. Creates the model package group if there is none."""
        if status == "Approved":
            require_gate(f"the model of run {gate.run_id}", gate)
        if not artifact.files:
            raise ValueError(f"{artifact.uri} holds no files: nothing to register")
        _check_group(group)
        if existing := self._registered(group, artifact, gate):
            return existing
        folder = files.package_uri(self.root, group, artifact.digest, gate.evaluation_digest)
        copy, packed = files.copy_artifact(artifact, folder)
        now = datetime.now(UTC)
        why = f"registered; {gate.metric} {gate.value:g}, threshold {gate.threshold:g}"
        facts = files.PackageFacts(
            artifact=copy,
            archive=packed,
            metrics=metrics,
            gate=gate,
            lineage=lineage,
            registered=StatusChange(status=status, who=f"run {gate.run_id}", why=why, when=now),
            created_at=now,
        )
        facts_uri, facts_digest = files.write_facts(folder, facts)
        container = serving_container(
            self.image, self._packages.region, f"{self.root.rstrip('/')}/code", self.environment
        )
        container["Environment"] = {DIGEST_VARIABLE: artifact.digest, **container["Environment"]}
        request = package_request(
            group,
            container=container,
            archive_uri=storage.join(folder, files.ARCHIVE),
            metrics=files.write_metrics(folder, metrics, gate),
            properties=properties_of(facts, facts_uri, facts_digest),
            status=status,
            description=description_of(artifact, gate),
            instance_types=self.instance_types,
            transform_instance_types=self.transform_instance_types,
        )
        check_request("CreateModelPackage", request)
        self._packages.ensure_group(group, {**root_tags(self.root), **self.tags})
        return self._create(group, artifact, gate, request, facts_uri)

    def get(self, group: str, version: int) -> ModelVersion:
        """See `ModelRegistry.get`. Reads all files of the artifact and compares them with their record."""
        described = self._describe(group, version)
        facts = files.read_facts(*named(described, FACTS, FACTS_DIGEST))
        try:
            check_files(facts.artifact, "all")
            verify_file(storage.join(facts.artifact.uri.rpartition("/")[0], files.ARCHIVE), facts.archive)
        except DamagedArtifactError as error:
            raise RegistryDamaged(
                f"model version {group}/{version} is damaged: {error}. Restore the file, or delete the version."
            ) from error
        return version_of(group, described, facts)

    def list(
        self, group: str, status: ApprovalStatus | None = None, damaged: dict[str, str] | None = None
    ) -> Sequence[ModelVersion]:
        """See `ModelRegistry.list`. Does not read the artifacts. Packages registered by others are left out."""
        _check_group(group)
        items = self._packages.list(group, status)

        def read(item: dict[str, Any]) -> ModelVersion | None:
            try:
                return self._read(group, item["ModelPackageArn"])
            except RegistryDamaged as error:
                if damaged is None:
                    raise
                damaged[f"{group}/{item['ModelPackageVersion']}"] = str(error)
                return None

        with ThreadPoolExecutor(_READERS) as readers:
            found = [version for version in readers.map(read, items) if version]
        return sorted((v for v in found if status is None or v.status == status), key=lambda v: v.version)

    def set_status(self, group: str, version: int, status: ApprovalStatus, *, who: str, why: str) -> ModelVersion:
        """See `ModelRegistry.set_status`. Of two changes at the same moment the later one counts."""
        described = self._describe(group, version)
        facts = files.read_facts(*named(described, FACTS, FACTS_DIGEST))
        found = version_of(group, described, facts)
        changed = found.with_status(status, who=who, why=why, when=datetime.now(UTC))
        if changed is found:
            return found
        uri, digest = files.write_history(facts.artifact.uri.rpartition("/")[0], changed.status_history)
        request = {
            "ModelPackageArn": described["ModelPackageArn"],
            "ModelApprovalStatus": status,
            "ApprovalDescription": approval_description(changed.status_history[-1]),
            "CustomerMetadataProperties": {HISTORY: uri, HISTORY_DIGEST: digest},
        }
        self._packages.update(request)
        return changed

    def delete(self, group: str, version: int) -> None:
        """See `ModelRegistry.delete`. The group stays, even if it is empty: it keeps the highest number."""
        described = self._describe(group, version)
        uri, _ = named(described, FACTS, FACTS_DIGEST)
        self._packages.delete(described["ModelPackageArn"])
        if uri.startswith(storage.join(self.root, group) + "/"):
            delete_prefix(uri.rpartition("/")[0])

    def delete_group(self, group: str) -> None:
        """Remove all versions of the group, and the group if this registry created it and nobody else uses it."""
        for version in self.list(group):
            self.delete(group, version.version)
        self._packages.delete_group(group)

    def inventory(self) -> Sequence[OwnedItem]:
        """See `ModelRegistry.inventory`."""
        return [*self._inventory.items()]

    def remove(self, item: OwnedItem) -> None:
        """See `ModelRegistry.remove`."""
        self._inventory.remove(item)

    @property
    def _inventory(self) -> PackageInventory:
        return PackageInventory(self._packages, self.root, self.delete)

    @property
    def _packages(self) -> ModelPackages:
        client = aws_client("sagemaker", self.region_name, retry_seconds=self.retry_timeout_seconds)
        return ModelPackages(client, self.settle_seconds)

    def _describe(self, group: str, version: int) -> dict[str, Any]:
        """The package of a version registered here. Raises `ModelVersionNotFound`."""
        _check_group(group)
        arn = self._packages.arn(group, version)
        found = self._packages.describe(arn) if arn and version >= 1 else None
        if found is not None and FACTS in found.get("CustomerMetadataProperties", {}):
            return found
        numbers = [str(item["ModelPackageVersion"]) for item in self._packages.list(group)]
        existing = f"it has {', '.join(numbers)}" if numbers else "it has none"
        foreign = " (that one was not registered by this project)" if found else ""
        raise ModelVersionNotFound(
            f"model group {group} has no version {version}{foreign}; {existing} (in {self._packages.region})"
        )

    def _read(self, group: str, arn: str) -> ModelVersion | None:
        described = self._packages.describe(arn)
        if described is None or FACTS not in described.get("CustomerMetadataProperties", {}):
            return None
        try:
            return version_of(group, described, files.read_facts(*named(described, FACTS, FACTS_DIGEST)))
        except RegistryDamaged:
            if self._packages.describe(arn) is None:  # deleted since it was described
                return None
            raise

    def _registered(self, group: str, artifact: Artifact, gate: GateEvidence) -> ModelVersion | None:
        """The version of the same model with the same evaluation, if there is one; of several the first."""
        description = description_of(artifact, gate)
        for item in self._packages.list(group):
            if item.get("ModelPackageDescription") != description:
                continue
            found = self._read(group, item["ModelPackageArn"])
            key = (artifact.digest, gate.evaluation_digest)
            if found and (found.artifact.digest, found.gate.evaluation_digest) == key:
                return self.get(group, found.version)
        return None

    def _create(
        self, group: str, artifact: Artifact, gate: GateEvidence, request: dict[str, Any], facts_uri: str
    ) -> ModelVersion:
        """Create the package; if another process was faster with the same model, its version is returned."""
        key = "\0".join([self.root, group, artifact.digest, gate.evaluation_digest])
        token = hashlib.sha256(key.encode()).hexdigest()[:36]
        while True:
            described = self._packages.create(request, token)
            if described is None:
                # The token was used: by a process that registers the same, or for a version deleted since.
                if existing := self._await_other(group, artifact, gate):
                    remove_file(facts_uri)
                    return existing
                token = uuid.uuid4().hex
                continue
            if described["CustomerMetadataProperties"].get(FACTS) != facts_uri:
                remove_file(facts_uri)
            return self.get(group, described["ModelPackageVersion"])

    def _await_other(self, group: str, artifact: Artifact, gate: GateEvidence) -> ModelVersion | None:
        with contextlib.suppress(TimeoutError):
            return wait_until(
                lambda: self._registered(group, artifact, gate),
                timeout=min(_OTHER_SECONDS, self.settle_seconds),
                interval=0.2,
                what=f"the version of another process in {group}",
            )
        return None


def _check_group(group: str) -> None:
    if not GROUP.fullmatch(group):
        raise ValueError(f"{group!r} is no name of a model group: 1 to 63 letters, digits and inner hyphens")
