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
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Self

import dagster as dg
from pydantic import Field, model_validator

from resources.aws.calls import aws_client, if_found, pages
from resources.aws.ownership import belongs_to, root_tags, tags_of
from resources.aws.request_validation import check_request
from resources.inventory import NotOwned, OwnedItem, files_at
from resources.model_registry import package_files as files
from resources.model_registry.base import (
    ApprovalStatus,
    ModelRegistry,
    ModelVersion,
    ModelVersionNotFound,
    RegistryDamaged,
    check_name,
    verified,
)
from resources.model_registry.model_packages import (
    create_package,
    describe_package,
    ensure_group,
    find_package,
    list_packages,
)
from resources.waiting import wait_until
from step_scripts.runner import storage
from step_scripts.runner.wording import counted

CONTENT_TYPES = ["text/csv", "application/json", "application/jsonlines"]
_CODE = "code"  # folder of the serving code for AWS's image
_MODEL = re.compile(r"[0-9a-f]{32}")  # folders of models, see `package_files`
_ROOT = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_.=+@-]+)*")
_ROOT_LENGTH = 128  # a property's value has at most 256 characters, and must hold the URI of a file below the root
_OTHER_SECONDS = 5.0  # how long the version of a faster process may take to appear in the list


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
    instance_types: list[str] = Field(
        default=["ml.m5.large", "ml.m5.xlarge", "ml.c5.large", "ml.c5.xlarge", "ml.t2.medium"],
        min_length=1,
        description="Instance types that the models are good for as endpoints.",
    )
    transform_instance_types: list[str] = Field(
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

    def _register(self, new: ModelVersion) -> ModelVersion:
        """Creates the model package group if there is none."""
        if existing := self._registered(new):
            return existing
        folder = storage.join(self.root, new.group, *files.short_digests(new))
        properties = files.write_model(folder, new)
        region, code_root = self._client.meta.region_name, storage.join(self.root, _CODE)
        environment = {files.DIGEST_VARIABLE: new.artifact.digest, **self.environment}
        container = files.serving_container(self.image, region, code_root, environment)
        request = {
            "ModelPackageGroupName": new.group,
            "ModelPackageDescription": files.description_of(new),
            "ModelApprovalStatus": new.status,
            "InferenceSpecification": {
                "Containers": [
                    {**container, "ModelDataUrl": storage.join(folder, files.ARCHIVE), "Framework": "XGBOOST"}
                ],
                "SupportedContentTypes": CONTENT_TYPES,
                "SupportedResponseMIMETypes": CONTENT_TYPES,
                "SupportedRealtimeInferenceInstanceTypes": self.instance_types,
                "SupportedTransformInstanceTypes": self.transform_instance_types,
            },
            "ModelMetrics": {"ModelQuality": {"Statistics": files.write_metrics(folder, new)}},
            "CustomerMetadataProperties": properties,
        }
        check_request("CreateModelPackage", request)
        # A version has its group's tags and may have none itself.
        ensure_group(self._client, new.group, {**root_tags(self.root), **self.tags}, self.settle_seconds)
        return self._create(new, request)

    def get(self, group: str, version: int) -> ModelVersion:
        """See `ModelRegistry.get`."""
        return verified(*files.read_version(group, self._describe(group, version)))

    def set_status(self, group: str, version: int, status: ApprovalStatus, *, who: str, why: str) -> ModelVersion:
        """See `ModelRegistry.set_status`. Of two changes at the same moment the later one counts."""
        described = self._describe(group, version)
        found, _ = files.read_version(group, described)
        changed = found.with_status(status, who=who, why=why, when=datetime.now(UTC))
        if changed is found:
            return found
        request = {
            "ModelPackageArn": described["ModelPackageArn"],
            "ModelApprovalStatus": status,
            "ApprovalDescription": files.approval_description(changed.status_history[-1]),
            "CustomerMetadataProperties": files.write_history(files.folder_of(described), changed.status_history),
        }
        check_request("UpdateModelPackage", request)
        self._client.update_model_package(**request)
        return changed

    def delete(self, group: str, version: int) -> None:
        """See `ModelRegistry.delete`. The group stays, even if it is empty: it keeps the highest number."""
        described = self._describe(group, version)
        if_found(self._client.delete_model_package, ModelPackageName=described["ModelPackageArn"])
        if self._is_here(group, described):
            storage.delete_folder(files.folder_of(described))

    def inventory(self) -> Sequence[OwnedItem]:
        """See `ModelRegistry.inventory`. Groups of others are left out, but not the versions that were put there."""
        root, items = self.root.rstrip("/"), []
        folders = set(storage.list_folders(root))
        for found in [*pages(self._client, "list_model_package_groups", "ModelPackageGroupSummaryList")]:
            name, arn = found["ModelPackageGroupName"], found["ModelPackageGroupArn"]
            ours = belongs_to(tags_of(self._client, arn), root)
            if ours or name in folders:
                items += self._versions(name)
            if ours:
                created = found["CreationTime"]
                items.append(OwnedItem(kind="model_package_group", name=name, location=arn, created_at=created))
        for folder in sorted(folders):
            if folder == _CODE:
                items += files_at(f"{root}/{folder}", "serving code")
            elif any(_MODEL.fullmatch(name) for name in storage.list_folders(f"{root}/{folder}")):
                items += files_at(f"{root}/{folder}", f"models of {folder}")
        return items

    def remove(self, item: OwnedItem) -> None:
        """See `ModelRegistry.remove`. Raises `RegistryDamaged` for a group, or its files, while it has versions."""
        uri, below = item.location, self.root.rstrip("/") + "/"
        if item.kind == "model_package":
            if (described := describe_package(self._client, uri)) is None:
                return
            group = item.name.rpartition("/")[0]
            if not self._is_here(group, described):
                raise NotOwned(f"model package {item.name} was not registered by this deployment; it is left alone")
            self.delete(group, described["ModelPackageVersion"])
        elif item.kind == "model_package_group":
            self._remove_group(item.name)
        elif not uri.startswith(below):
            raise NotOwned(f"{uri} is not below {self.root}")
        elif uri == f"{below}{_CODE}":
            storage.delete_folder(uri)
        elif self._versions(uri.removeprefix(below)):
            raise RegistryDamaged(f"{uri} holds the files of registered versions: remove them first")
        else:
            for folder in filter(_MODEL.fullmatch, storage.list_folders(uri)):
                storage.delete_folder(storage.join(uri, folder))

    def _remove_group(self, name: str) -> None:
        found = if_found(self._client.describe_model_package_group, ModelPackageGroupName=name)
        if found is None:
            return
        if not belongs_to(tags_of(self._client, found["ModelPackageGroupArn"]), self.root):
            raise NotOwned(f"group {name} was not created by this deployment; it is left alone")
        if left := list_packages(self._client, name):
            raise RegistryDamaged(f"group {name} has {counted(len(left), 'version')}: it cannot be removed before them")
        self._client.delete_model_package_group(ModelPackageGroupName=name)

    def _versions(self, group: str) -> list[OwnedItem]:
        """The versions that this deployment has registered."""
        described = [describe_package(self._client, arn) for arn in self._find(group).values()]
        return [
            OwnedItem(
                kind="model_package",
                name=f"{group}/{found['ModelPackageVersion']}",
                location=found["ModelPackageArn"],
                created_at=found["CreationTime"],
                run_id=found["CustomerMetadataProperties"].get("lineage:run_id"),
                detail=found["ModelApprovalStatus"],
            )
            for found in described
            if found is not None and self._is_here(group, found)
        ]

    def _is_here(self, group: str, described: dict[str, Any]) -> bool:
        return files.folder_of(described).startswith(storage.join(self.root, group) + "/")

    @property
    def _client(self) -> Any:
        return aws_client("sagemaker", self.region_name, retry_seconds=self.retry_timeout_seconds)

    def _find(self, group: str, status: ApprovalStatus | None = None) -> Mapping[int, str]:
        listed = list_packages(self._client, group, status)
        return {item["ModelPackageVersion"]: item["ModelPackageArn"] for item in listed}

    def _read(self, group: str, version: int, location: str) -> ModelVersion:
        described = describe_package(self._client, location)
        if described is None or not files.folder_of(described):
            raise ModelVersionNotFound(location)
        try:
            return files.read_version(group, described)[0]
        except RegistryDamaged:
            if describe_package(self._client, location) is None:
                raise ModelVersionNotFound(location) from None
            raise

    def _describe(self, group: str, version: int) -> dict[str, Any]:
        """The package of a version registered here. Raises `ModelVersionNotFound`."""
        check_name(group, "a model group")
        found = find_package(self._client, group, version) if version >= 1 else None
        if found is None or not files.folder_of(found):
            note = " (that one was not registered by this project)" if found else ""
            raise self._not_found(group, version, note)
        return found

    def _registered(self, new: ModelVersion) -> ModelVersion | None:
        """The version of the same model with the same evaluation, if there is one; of several the first."""
        for item in list_packages(self._client, new.group):
            if item.get("ModelPackageDescription") != files.description_of(new):
                continue
            with contextlib.suppress(ModelVersionNotFound):
                found = self._read(new.group, item["ModelPackageVersion"], item["ModelPackageArn"])
                if found.identity == new.identity:
                    return self.get(new.group, found.version)
        return None

    def _create(self, new: ModelVersion, request: dict[str, Any]) -> ModelVersion:
        """Create the package; if another process was faster with the same model, its version is returned."""
        facts_uri = request["CustomerMetadataProperties"][files.FACTS]
        token = hashlib.sha256("\0".join([self.root, new.group, *new.identity]).encode()).hexdigest()[:36]
        while True:
            described = create_package(self._client, request, token, self.settle_seconds)
            if described is not None:
                if described["CustomerMetadataProperties"].get(files.FACTS) != facts_uri:
                    storage.delete_file(facts_uri)
                return self.get(new.group, described["ModelPackageVersion"])
            # The token was used: by a process that registers the same, or for a version deleted since.
            with contextlib.suppress(TimeoutError):
                existing = wait_until(
                    lambda: self._registered(new),
                    timeout=min(_OTHER_SECONDS, self.settle_seconds),
                    interval=0.2,
                    what=f"the version of another process in {new.group}",
                )
                storage.delete_file(facts_uri)
                return existing
            token = uuid.uuid4().hex
