"""Typed configuration of SageMaker endpoints, and the requests made of it.

Names of models and endpoint configurations are `<endpoint>-<digest>`: the digest is that of the content, so the same
content has the same name and is created once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import dagster as dg
from pydantic import Field, model_validator

from resources.aws.ownership import owned
from resources.model_registry.base import ModelVersion
from resources.model_registry.serving_container import DIGEST_VARIABLE, VERSION_VARIABLE

VARIANT = "AllTraffic"
CAPTURED = "captured"  # folder of captured requests below the host's root
# Tags: the endpoint that something was created for, what it is there, and what it holds.
ENDPOINT_TAG = "housing-assets:endpoint"
ROLE_TAG = "housing-assets:role"
VERSION_TAG, DIGEST_TAG = "housing-assets:model-version", "housing-assets:model-digest"
PREVIOUS_VERSION_TAG, PREVIOUS_CONFIG_TAG = "housing-assets:previous-version", "housing-assets:previous-config"
# The configuration of the last deployment that was seen to its end, and when that was.
CONFIG_TAG, DEPLOYED_TAG = "housing-assets:config", "housing-assets:deployed-at"
_SMALLEST_LINEAR_STEP = 10  # percent
CANDIDATE, SERVING = "candidate", "serving"
_NAME_PART = 40  # of an endpoint's name in the names of its parts, which have at most 63 characters


class Serverless(dg.Config):
    """A serverless variant instead of instances."""

    memory_mb: int = Field(default=2048, description="Memory: 1024 to 6144 MB, in steps of 1024.")
    max_concurrency: int = Field(default=5, ge=1, le=200, description="Requests answered at once.")
    provisioned_concurrency: int | None = Field(
        default=None, ge=1, le=200, description="Of these, kept warm. Costs money while idle."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.memory_mb not in range(1024, 6145, 1024):
            raise ValueError(f"memory_mb is {self.memory_mb}; choose 1024, 2048, 3072, 4096, 5120 or 6144")
        if (self.provisioned_concurrency or 0) > self.max_concurrency:
            raise ValueError("provisioned_concurrency is larger than max_concurrency")
        return self


class DataCapture(dg.Config):
    """Requests and answers, kept on S3; job `prune` bounds them."""

    sampling_percentage: int = Field(default=100, ge=0, le=100, description="Share of the requests, percent.")
    uri: str | None = Field(
        default=None, description="s3:// prefix, which `prune` leaves alone. Empty: captured/ below the root."
    )
    kms_key: str | None = Field(default=None, description="KMS key for the captured data.")


class TrafficShift(dg.Config):
    """How traffic moves to a new version: SageMaker's blue/green deployment."""

    mode: str = Field(
        default="all_at_once",
        pattern="^(all_at_once|canary|linear)$",
        description="all_at_once; canary: a first share, then the rest; linear: share by share.",
    )
    percent: int = Field(default=10, ge=1, le=50, description="canary, linear: the share, percent of the capacity.")
    wait_seconds: int = Field(default=0, ge=0, le=3600, description="How long each share is watched.")
    keep_old_seconds: int = Field(
        default=0, ge=0, le=3600, description="How long the old instances are kept when all traffic has moved."
    )
    rollback_alarms: list[str] = Field(
        default_factory=list,
        max_length=10,
        description="CloudWatch alarms: SageMaker goes back to the old version when one rings during the change.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mode == "linear" and self.percent < _SMALLEST_LINEAR_STEP:
            raise ValueError(
                f"traffic.percent is {self.percent}: SageMaker's linear steps have {_SMALLEST_LINEAR_STEP} to 50 %"
            )
        return self

    @property
    def seconds(self) -> int:
        """How long the change waits."""
        steps = {"all_at_once": 1, "canary": 2, "linear": -(-100 // self.percent)}[self.mode]
        return steps * self.wait_seconds + self.keep_old_seconds

    def request(self) -> dict[str, Any]:
        """The `DeploymentConfig` member."""
        share = {"Type": "CAPACITY_PERCENT", "Value": self.percent}
        routing: dict[str, Any] = {"Type": self.mode.upper(), "WaitIntervalInSeconds": self.wait_seconds}
        if self.mode == "canary":
            routing["CanarySize"] = share
        elif self.mode == "linear":
            routing["LinearStepSize"] = share
        policy = {
            "TrafficRoutingConfiguration": routing,
            "TerminationWaitInSeconds": self.keep_old_seconds,
            "MaximumExecutionTimeoutInSeconds": min(28_800, self.seconds + 3600),
        }
        deployment: dict[str, Any] = {"BlueGreenUpdatePolicy": policy}
        if self.rollback_alarms:
            alarms = [{"AlarmName": name} for name in self.rollback_alarms]
            deployment["AutoRollbackConfiguration"] = {"Alarms": alarms}
        return deployment


def part_name(endpoint: str, content: Mapping[str, Any], middle: str = "") -> str:
    """`<endpoint><middle>-<digest of the content>`, at most 63 characters."""
    digest = hashlib.sha256(json.dumps([endpoint, content], sort_keys=True).encode()).hexdigest()[:12]
    return f"{endpoint[:_NAME_PART].rstrip('-')}{middle}-{digest}"


def name_prefix(endpoint: str) -> str:
    """What the names of all parts of the endpoint start with; those of others may, too."""
    return f"{endpoint[:_NAME_PART].rstrip('-')}-"


def part_tags(endpoint: str, version: ModelVersion, role: Literal["candidate", "serving"]) -> dict[str, str]:
    """Tags of a model, an endpoint configuration or an endpoint made for `version`."""
    return {
        ENDPOINT_TAG: endpoint,
        ROLE_TAG: role,
        VERSION_TAG: version.reference,
        DIGEST_TAG: version.artifact.digest,
    }


def model_request(
    endpoint: str,
    version: ModelVersion,
    container: Mapping[str, Any],
    *,
    role_arn: str,
    environment: Mapping[str, str],
    vpc: Mapping[str, Sequence[str]] | None,
    network_isolation: bool,
    tags: Mapping[str, str],
) -> dict[str, Any]:
    """Parameters of `create_model`."""
    variables = {
        VERSION_VARIABLE: version.reference,
        DIGEST_VARIABLE: version.artifact.digest,
        **container.get("Environment", {}),
        **environment,
    }
    content: dict[str, Any] = {
        "PrimaryContainer": {**container, "Environment": variables},
        "ExecutionRoleArn": role_arn,
        "EnableNetworkIsolation": network_isolation,
        **({"VpcConfig": {name: list(ids) for name, ids in vpc.items()}} if vpc else {}),
    }
    return {
        "ModelName": part_name(endpoint, content),
        **content,
        "Tags": owned(part_tags(endpoint, version, SERVING), tags),
    }


def config_request(
    endpoint: str,
    version: ModelVersion,
    variant: Mapping[str, Any],
    *,
    capture: Mapping[str, Any] | None,
    kms_key: str | None,
    candidate: bool,
    tags: Mapping[str, str],
) -> dict[str, Any]:
    """Parameters of `create_endpoint_config`. A candidate has one instance and no data capture."""
    content: dict[str, Any] = {"ProductionVariants": [{"VariantName": VARIANT, **variant}]}
    if "InitialInstanceCount" in variant and candidate:
        content["ProductionVariants"][0]["InitialInstanceCount"] = 1
    if capture and not candidate:
        content["DataCaptureConfig"] = dict(capture)
    if kms_key:
        content["KmsKeyId"] = kms_key
    role: Literal["candidate", "serving"] = CANDIDATE if candidate else SERVING
    return {
        "EndpointConfigName": part_name(endpoint, content, "-candidate" if candidate else ""),
        **content,
        "Tags": owned(part_tags(endpoint, version, role), tags),
    }


def capture_request(capture: DataCapture, root: str) -> dict[str, Any]:
    """The `DataCaptureConfig` member."""
    return {
        "EnableCapture": True,
        "InitialSamplingPercentage": capture.sampling_percentage,
        "DestinationS3Uri": capture.uri or f"{root.rstrip('/')}/{CAPTURED}",
        "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
        "CaptureContentTypeHeader": {
            "CsvContentTypes": ["text/csv"],
            "JsonContentTypes": ["application/json", "application/jsonlines"],
        },
        **({"KmsKeyId": capture.kms_key} if capture.kms_key else {}),
    }
