"""Typed configuration of SageMaker endpoints, and the requests made of it.

Names of models and endpoint configurations are `<endpoint>-<digest>`: the digest is that of the content, so the same
content has the same name and is created once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Self

import dagster as dg
from pydantic import Field, model_validator

from resources.aws.ownership import owned, root_tags
from resources.aws.request_validation import check_request
from resources.endpoints.base import EndpointHost
from resources.model_registry.base import ModelVersion
from resources.model_registry.package_files import DIGEST_VARIABLE, VERSION_VARIABLE
from step_scripts.serving.deployment import CAPTURE_FOLDER, CSV, JSON, JSON_LINES

_VARIANT = "AllTraffic"
_SMALLEST_LINEAR_STEP = 10  # percent
CANDIDATE, SERVING = "candidate", "serving"
_NAME_PART = 40  # of an endpoint's name in the names of its parts, which have at most 63 characters


class Tag(StrEnum):
    """Tags of endpoints and of their parts."""

    ENDPOINT = "housing-assets:endpoint"  # that something was created for
    ROLE = "housing-assets:role"
    VERSION = "housing-assets:model-version"
    DIGEST = "housing-assets:model-digest"
    PREVIOUS_VERSION = "housing-assets:previous-version"
    PREVIOUS_CONFIG = "housing-assets:previous-config"
    CONFIG = "housing-assets:config"  # of the last deployment that was seen to its end
    DEPLOYED = "housing-assets:deployed-at"  # when that was


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


class EndpointRequests(EndpointHost):
    """The configuration of `SageMakerEndpointHost`, and the requests that it leads to."""

    root: str = Field(description="s3:// prefix for captured data.")
    role_arn: str = Field(description="ARN of the IAM role that the containers run as: it reads model and image.")
    image: str | None = Field(
        default=None,
        description="Image that serves the archive of the model package. Empty: the model package as it was registered "
        "and approved, with its own image. Give one to serve a registered model with a newer image.",
    )
    environment: dict[str, str] = Field(default_factory=dict, description="Environment variables of the containers.")
    instance_type: str = Field(default="ml.m5.large", description="SageMaker instance type.")
    instance_count: int = Field(default=1, ge=1, description="Instances.")
    serverless: Serverless | None = Field(default=None, description="Serverless instead of instances.")
    data_capture: DataCapture | None = Field(default=None, description="Keep requests and answers. Empty: no.")
    traffic: TrafficShift = Field(default=TrafficShift(), description="How traffic moves to a new version.")
    smoke_test_on_candidate: bool = Field(
        default=True,
        description="Test a new version on an endpoint of its own before the one that serves is changed. Costs one "
        "instance for the minutes that takes. Off: the test comes after the change, which is undone if it fails.",
    )
    kms_key: str | None = Field(default=None, description="KMS key for the instances' volumes.")
    subnets: list[str] = Field(default_factory=list, description="VPC subnets. Empty: SageMaker's own network.")
    security_group_ids: list[str] = Field(default_factory=list, description="Security groups; needed with subnets.")
    network_isolation: bool = Field(
        default=False, description="No connections from the containers. Needs an image that holds the code."
    )
    tags: dict[str, str] = Field(default_factory=dict, description="More tags for all that is created.")
    region_name: str | None = Field(default=None, description="AWS region. Empty: boto3's.")
    start_timeout_seconds: float = Field(default=1800.0, gt=0, description="How long an endpoint may take to start.")
    update_timeout_seconds: float = Field(
        default=3600.0, gt=0, description="How long a change may take beside the waits of `traffic`."
    )
    poll_seconds: float = Field(default=2.0, gt=0, description="Shortest interval between two polls of an endpoint.")
    retry_timeout_seconds: float = Field(
        default=300.0, gt=0, description="How long calls that AWS throttles or does not answer are repeated; seconds."
    )
    invocation_retry_timeout_seconds: float = Field(
        default=20.0, ge=0, description="The same for requests to the endpoint; seconds."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.subnets) != bool(self.security_group_ids):
            raise ValueError("subnets and security_group_ids belong together: give both or neither")
        if self.serverless is not None:
            unsupported = {
                "data_capture": self.data_capture,
                "subnets": self.subnets,
                "network_isolation": self.network_isolation,
                "kms_key": self.kms_key,
                "traffic": self.traffic != TrafficShift(),
            }
            if given := [name for name, value in unsupported.items() if value]:
                raise ValueError(f"serverless endpoints have no {', '.join(given)}: leave that empty, or use instances")
        return self

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Check the requests that the configuration leads to, before the first step runs.

        Raises `InvalidJobRequest` naming each wrong value.
        """
        model = self.model_content({"Image": self.image or "image"}, {})
        check_request("CreateModel", {"ModelName": "model", **model})
        config = self.config_content("model", SERVING)
        check_request("CreateEndpointConfig", {"EndpointConfigName": "config", **config})
        update = {"EndpointName": "e", "EndpointConfigName": "c", "DeploymentConfig": self.traffic.request()}
        check_request("UpdateEndpoint", update)

    def model_content(self, container: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
        """What a model is. Of variables that are given twice, the configured ones win, then the container's."""
        environment = {**variables, **container.get("Environment", {}), **self.environment}
        vpc = {"SecurityGroupIds": self.security_group_ids, "Subnets": self.subnets}
        return {
            "PrimaryContainer": {**container, "Environment": environment},
            "ExecutionRoleArn": self.role_arn,
            "EnableNetworkIsolation": self.network_isolation,
            **({"VpcConfig": vpc} if self.subnets else {}),
        }

    def config_content(self, model: str, role: str) -> dict[str, Any]:
        """What an endpoint configuration is. A candidate has one instance and no data capture."""
        variant: dict[str, Any] = {"VariantName": _VARIANT, "ModelName": model}
        if self.serverless is not None:
            chosen = {"MemorySizeInMB": self.serverless.memory_mb, "MaxConcurrency": self.serverless.max_concurrency}
            if self.serverless.provisioned_concurrency:
                chosen["ProvisionedConcurrency"] = self.serverless.provisioned_concurrency
            variant["ServerlessConfig"] = chosen
        else:
            variant["InstanceType"] = self.instance_type
            variant["InitialInstanceCount"] = 1 if role == CANDIDATE else self.instance_count
        content: dict[str, Any] = {"ProductionVariants": [variant]}
        if (capture := self.data_capture) and role != CANDIDATE:
            content["DataCaptureConfig"] = {
                "EnableCapture": True,
                "InitialSamplingPercentage": capture.sampling_percentage,
                "DestinationS3Uri": capture.uri or self._captured,
                "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
                "CaptureContentTypeHeader": {"CsvContentTypes": [CSV], "JsonContentTypes": [JSON, JSON_LINES]},
                **({"KmsKeyId": capture.kms_key} if capture.kms_key else {}),
            }
        if self.kms_key:
            content["KmsKeyId"] = self.kms_key
        return content

    def model_request(self, endpoint: str, version: ModelVersion, container: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters of `create_model`."""
        variables = {VERSION_VARIABLE: version.reference, DIGEST_VARIABLE: version.artifact.digest}
        content = self.model_content(container, variables)
        tags = self.tags_for(endpoint, version, SERVING)
        return {"ModelName": part_name(endpoint, content), **content, "Tags": tags}

    def config_request(self, endpoint: str, version: ModelVersion, model: str, role: str) -> dict[str, Any]:
        """Parameters of `create_endpoint_config`."""
        content = self.config_content(model, role)
        name = part_name(endpoint, content, f"-{CANDIDATE}" if role == CANDIDATE else "")
        return {"EndpointConfigName": name, **content, "Tags": self.tags_for(endpoint, version, role)}

    def tags_for(self, endpoint: str, version: ModelVersion, role: str) -> list[dict[str, str]]:
        """Tags of a model, an endpoint configuration or a candidate endpoint made for `version`."""
        holds = {Tag.VERSION: version.reference, Tag.DIGEST: version.artifact.digest}
        return self.owned({Tag.ENDPOINT: endpoint, Tag.ROLE: role, **holds})

    def owned(self, own: Mapping[str, str]) -> list[dict[str, str]]:
        """Tags as the API takes them, with those of everything that this host creates."""
        return owned(own, root_tags(self.root), self.tags)

    @property
    def update_seconds(self) -> float:
        """How long a change may take, with the waits of `traffic`."""
        return self.update_timeout_seconds + self.traffic.seconds

    @property
    def _captured(self) -> str:
        return f"{self.root.rstrip('/')}/{CAPTURE_FOLDER}"
