"""Model package groups and model packages."""

import threading
from typing import Any

from tests.sagemaker_emulator.common import ACCOUNT, Call, Handler, Listing, Params, arn, list_page, now, pick
from tests.sagemaker_emulator.errors import ApiError, not_emulated, validation
from tests.sagemaker_emulator.services import Services

_GROUPS = Listing("ModelPackageGroupSummaryList", "ModelPackageGroupName", order_default="Ascending")
_PACKAGES = Listing("ModelPackageSummaryList", "_name", order_default="Ascending")
_PACKAGE_SUMMARY = (
    "ModelPackageName", "ModelPackageGroupName", "ModelPackageVersion", "ModelPackageArn", "ModelPackageDescription",
    "CreationTime", "ModelPackageStatus", "ModelApprovalStatus",
)  # fmt: skip
_PACKAGE_ECHOED = (
    "ModelPackageGroupName", "ModelPackageDescription", "InferenceSpecification", "SourceAlgorithmSpecification",
    "ModelApprovalStatus", "MetadataProperties", "ModelMetrics", "CustomerMetadataProperties", "DriftCheckBaselines",
    "Domain", "Task", "SamplePayloadUrl", "AdditionalInferenceSpecifications", "SkipModelValidation", "SourceUri",
    "SecurityConfig", "ModelCard", "ModelLifeCycle", "CertifyForMarketplace", "ApprovalDescription",
)  # fmt: skip
_UPDATABLE = ("ModelApprovalStatus", "ApprovalDescription", "InferenceSpecification", "SourceUri", "ModelCard",
              "ModelLifeCycle")  # fmt: skip

_IDENTITY = {"IamIdentity": {"Arn": f"arn:aws:iam::{ACCOUNT}:user/testing", "PrincipalId": "TESTING"}}


class Registry:
    """The model-package part of the API."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._lock = threading.RLock()
        self._groups: dict[str, Params] = {}
        self._packages: dict[str, Params] = {}
        self._tokens: dict[tuple[str, str], tuple[Params, str]] = {}

    def operations(self) -> dict[str, Handler]:
        """Handlers by operation name."""
        return {
            "CreateModelPackageGroup": self._create_group,
            "DescribeModelPackageGroup": lambda call: _public(self._group(call)),
            "ListModelPackageGroups": self._list_groups,
            "DeleteModelPackageGroup": self._delete_group,
            "CreateModelPackage": self._create,
            "DescribeModelPackage": lambda call: _public(self.find(call.region, call.params["ModelPackageName"])),
            "ListModelPackages": self._list,
            "UpdateModelPackage": self._update,
            "DeleteModelPackage": self._delete,
        }

    def find(self, region: str, name_or_arn: str) -> Params:
        """A package by ARN or, if it has no group, by name."""
        key = name_or_arn if name_or_arn.startswith("arn:") else arn(region, "model-package", name_or_arn)
        with self._lock:
            package = self._packages.get(key)
        if package is None:
            raise validation(f"ModelPackage {key} does not exist.")
        return package

    def _group(self, call: Call) -> Params:
        name: str = call.params["ModelPackageGroupName"]
        key = name if name.startswith("arn:") else arn(call.region, "model-package-group", name)
        with self._lock:
            group = self._groups.get(key)
        if group is None:
            raise validation(f"ModelPackageGroup {key} does not exist.")
        return group

    def _create_group(self, call: Call) -> Params:
        key = arn(call.region, "model-package-group", call.params["ModelPackageGroupName"])
        with self._lock:
            if key in self._groups:
                raise validation(f"Model Package Group already exists: {key}")
            self._groups[key] = {
                **pick(call.params, ("ModelPackageGroupName", "ModelPackageGroupDescription")),
                "ModelPackageGroupArn": key,
                "CreationTime": now(),
                "CreatedBy": {},
                "ModelPackageGroupStatus": "Completed",
            }
        self._services.tag(key, call.params.get("Tags"))
        return {"ModelPackageGroupArn": key}

    def _list_groups(self, call: Call) -> Params:
        members = ("ModelPackageGroupName", "ModelPackageGroupArn", "ModelPackageGroupDescription", "CreationTime",
                   "ModelPackageGroupStatus")  # fmt: skip
        prefix = arn(call.region, "model-package-group", "")
        with self._lock:
            items = [pick(group, members) for key, group in self._groups.items() if key.startswith(prefix)]
        return list_page(call.params, items, _GROUPS)

    def _delete_group(self, call: Call) -> Params:
        group = self._group(call)
        with self._lock:
            if any(p.get("ModelPackageGroupName") == group["ModelPackageGroupName"] for p in self._packages.values()):
                raise ApiError(
                    "ConflictException",
                    f"Model Package Group {group['ModelPackageGroupArn']} still contains model packages.",
                )
            del self._groups[group["ModelPackageGroupArn"]]
        return {}

    def _create(self, call: Call) -> Params:
        params = call.params
        for member in ("ValidationSpecification", "SourceAlgorithmSpecification"):
            if params.get(member):
                raise not_emulated(f"{member} of model packages")
        if bool(params.get("ModelPackageName")) == bool(params.get("ModelPackageGroupName")):
            raise validation("Exactly one of ModelPackageName and ModelPackageGroupName must be specified.")
        if params.get("ModelPackageGroupName") and params.get("Tags"):
            raise validation("Tags cannot be given for a model package that belongs to a group.")
        with self._lock:
            token = (call.region, params.get("ClientToken", ""))
            if token in self._tokens:
                given, made = self._tokens[token]
                if given != params:
                    raise ApiError("ConflictException", "The client token was used with other parameters.")
                return {"ModelPackageArn": made}
            identity = self._versioned(call) if params.get("ModelPackageGroupName") else self._unversioned(call)
            package = {
                **pick(params, _PACKAGE_ECHOED),
                **identity,
                "CreationTime": now(),
                "CreatedBy": _IDENTITY,
                "ModelPackageStatus": "Completed",
                "ModelPackageStatusDetails": {"ValidationStatuses": [], "ImageScanStatuses": []},
            }
            self._packages[package["ModelPackageArn"]] = package
            if token[1]:
                self._tokens[token] = (params, package["ModelPackageArn"])
        self._services.tag(package["ModelPackageArn"], params.get("Tags"))
        return {"ModelPackageArn": package["ModelPackageArn"]}

    def _versioned(self, call: Call) -> Params:
        group = self._group(call)
        group["_last"] = version = group.get("_last", 0) + 1
        name = group["ModelPackageGroupName"]
        return {
            "ModelPackageGroupName": name,
            "ModelPackageName": name,
            "ModelPackageVersion": version,
            "ModelPackageArn": f"{arn(call.region, 'model-package', name)}/{version}",
            "ModelApprovalStatus": call.params.get("ModelApprovalStatus", "PendingManualApproval"),
        }

    def _unversioned(self, call: Call) -> Params:
        name = call.params["ModelPackageName"]
        key = arn(call.region, "model-package", name)
        if key in self._packages:
            raise validation(f"Model Package already exists: {key}")
        return {"ModelPackageName": name, "ModelPackageArn": key}

    def _list(self, call: Call) -> Params:
        params = call.params
        group = self._group(call)["ModelPackageGroupName"] if params.get("ModelPackageGroupName") else None
        kind = params.get("ModelPackageType", "Versioned" if group else "Unversioned")
        prefix = arn(call.region, "model-package", "")
        with self._lock:
            packages = [dict(p) for key, p in self._packages.items() if key.startswith(prefix)]
        if group is not None:
            packages = [p for p in packages if p.get("ModelPackageGroupName") == group]
        if kind != "Both":
            packages = [p for p in packages if ("ModelPackageVersion" in p) == (kind == "Versioned")]
        if wanted := params.get("ModelApprovalStatus"):
            packages = [p for p in packages if p.get("ModelApprovalStatus") == wanted]
        # Versions made within a millisecond keep their order.
        items = [{**pick(p, _PACKAGE_SUMMARY), "_name": p["ModelPackageName"]} for p in packages]
        page = list_page(params, items, _PACKAGES)
        for item in page["ModelPackageSummaryList"]:
            del item["_name"]
        return page

    def _update(self, call: Call) -> Params:
        if call.params.get("AdditionalInferenceSpecificationsToAdd"):
            raise not_emulated("AdditionalInferenceSpecificationsToAdd")
        package = self.find(call.region, call.params["ModelPackageArn"])
        with self._lock:
            if "ModelPackageVersion" not in package and call.params.get("ModelApprovalStatus"):
                raise validation("ModelApprovalStatus can be set only on model packages that belong to a group.")
            package |= pick(call.params, _UPDATABLE)
            properties: dict[str, Any] = dict(package.get("CustomerMetadataProperties", {}))
            properties |= call.params.get("CustomerMetadataProperties", {})
            for key in call.params.get("CustomerMetadataPropertiesToRemove", []):
                properties.pop(key, None)
            package["CustomerMetadataProperties"] = properties
            package["LastModifiedTime"] = now()
            package["LastModifiedBy"] = _IDENTITY
        return {"ModelPackageArn": package["ModelPackageArn"]}

    def _delete(self, call: Call) -> Params:
        package = self.find(call.region, call.params["ModelPackageName"])
        with self._lock:
            self._packages.pop(package["ModelPackageArn"], None)
        return {}


def _public(package: Params) -> Params:
    return {key: value for key, value in package.items() if not key.startswith("_")}
