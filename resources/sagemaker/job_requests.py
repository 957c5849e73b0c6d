"""Typed configuration of jobs, and the create requests made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import dagster as dg
from pydantic import Field, model_validator

TRAINING_INPUT = "/opt/ml/input/data"
PROCESSING_INPUT = "/opt/ml/processing/input"


# What SageMaker offers for training jobs only.
TRAINING_ONLY = ("instance_groups", "use_spot", "max_wait_seconds", "internal_error_retries", "keep_alive_seconds")


class InstanceGroup(dg.Config):
    """Hosts of one type in a training job of several types."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Name of the group.")
    instance_type: str = Field(description="SageMaker instance type.")
    instance_count: int = Field(default=1, ge=1, le=100, description="Hosts.")


class JobConfig(dg.Config):
    """A SageMaker job: role, instances, limits, network, encryption.

    Limits that SageMaker's service model gives (instance types, lengths, patterns) are checked against it before a
    request is sent; here are the rules between fields.
    """

    role_arn: str = Field(description="ARN of the IAM role that the job runs as.")
    instance_type: str = Field(default="ml.m5.xlarge", description="SageMaker instance type.")
    instance_count: int = Field(default=1, ge=1, le=100, description="Hosts. Ray spans all of them.")
    instance_groups: list[InstanceGroup] = Field(
        default_factory=list,
        description="Hosts of several types, instead of instance_type and instance_count. Training jobs only. The "
        "first host of the first group is the head of the Ray cluster. price_per_hour is then the hosts' average.",
    )
    volume_size_gb: int = Field(default=30, ge=1, le=16384, description="Volume of each host, GB.")
    max_run_seconds: int = Field(default=86_400, ge=1, description="Longest running time; seconds.")
    use_spot: bool = Field(default=False, description="Managed spot instances. Training jobs only.")
    max_wait_seconds: int | None = Field(
        default=None,
        ge=1,
        description="Spot: longest time for waiting and running together; seconds. Empty: twice max_run_seconds.",
    )
    checkpoint_uri: str | None = Field(
        default=None,
        description="s3:// prefix that /opt/ml/checkpoints is kept in step with. Training jobs only; needed to resume "
        "after a spot interruption.",
    )
    internal_error_retries: int = Field(
        default=0, ge=0, le=30, description="Times that SageMaker itself starts a training job again after an internal "
        "error."
    )  # fmt: skip
    keep_alive_seconds: int = Field(
        default=0, ge=0, le=21_600, description="Warm pool: keep the instances this long after a training job; seconds."
    )
    subnets: list[str] = Field(default_factory=list, description="VPC subnets. Empty: SageMaker's own network.")
    security_group_ids: list[str] = Field(default_factory=list, description="Security groups; needed with subnets.")
    volume_kms_key: str | None = Field(default=None, description="KMS key for the hosts' volumes: its id or ARN.")
    output_kms_key: str | None = Field(default=None, description="KMS key for what SageMaker writes to S3.")
    network_isolation: bool = Field(
        default=False,
        description="No connections but those between hosts: not even to S3, which Pipes messages need. For scripts "
        "that live on channels alone.",
    )
    encrypt_inter_container_traffic: bool = Field(
        default=False, description="Encrypt traffic between the hosts. Slower with many hosts."
    )
    price_per_hour: float | None = Field(
        default=None, ge=0, description="Price of one instance-hour, for the cost estimate. Empty: no estimate."
    )
    environment: dict[str, str] = Field(default_factory=dict, description="Environment variables of the containers.")
    tags: dict[str, str] = Field(default_factory=dict, description="Tags beside those that come from the Dagster run.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.volume_kms_key and "alias/" in self.volume_kms_key:
            raise ValueError(
                f"volume_kms_key is {self.volume_kms_key!r}: jobs take the id or the ARN of a key, no alias"
            )
        if bool(self.subnets) != bool(self.security_group_ids):
            raise ValueError("subnets and security_group_ids belong together: give both or neither")
        if self.max_wait_seconds is not None and not self.use_spot:
            raise ValueError("max_wait_seconds is for managed spot training: set use_spot, or leave it empty")
        if self.max_wait_seconds is not None and self.max_wait_seconds < self.max_run_seconds:
            raise ValueError(
                f"max_wait_seconds ({self.max_wait_seconds}) must be at least max_run_seconds ({self.max_run_seconds})"
            )
        names = [group.name for group in self.instance_groups]
        if len(names) != len(set(names)):
            raise ValueError(f"instance_groups: two groups have the same name; there are {', '.join(names)}")
        if names and self.keep_alive_seconds:
            raise ValueError("keep_alive_seconds (warm pool) cannot be combined with instance_groups")
        if self.use_spot and self.keep_alive_seconds:
            raise ValueError("keep_alive_seconds (warm pool) cannot be combined with use_spot")
        return self


def training_request(
    config: JobConfig,
    *,
    image: str,
    entrypoint: Sequence[str],
    channels: Mapping[str, str],
    output_uri: str,
    checkpoint_folder: str = "",
) -> dict[str, Any]:
    """Parameters of `create_training_job` without a name. `channels` are s3:// prefixes by name.

    Channels appear below `/opt/ml/input/data/<name>`. `checkpoint_folder` is appended to `config.checkpoint_uri`.
    """
    spot = config.max_wait_seconds or 2 * config.max_run_seconds
    stopping = {"MaxRuntimeInSeconds": config.max_run_seconds}
    checkpoints = config.checkpoint_uri and "/".join([config.checkpoint_uri.rstrip("/"), checkpoint_folder])
    return _without_empty(
        {
            **_common(config),
            **_network(config),
            "AlgorithmSpecification": {
                "TrainingImage": image,
                "TrainingInputMode": "File",
                "ContainerEntrypoint": list(entrypoint),
            },
            "InputDataConfig": [
                {"ChannelName": name, "DataSource": {"S3DataSource": _all_below(uri)}} for name, uri in channels.items()
            ],
            "OutputDataConfig": {"S3OutputPath": output_uri, "KmsKeyId": config.output_kms_key},
            "ResourceConfig": _hosts(config) | {"KeepAlivePeriodInSeconds": config.keep_alive_seconds or None},
            "StoppingCondition": stopping | ({"MaxWaitTimeInSeconds": spot} if config.use_spot else {}),
            "EnableManagedSpotTraining": config.use_spot,
            "RetryStrategy": {"MaximumRetryAttempts": config.internal_error_retries or None},
            "CheckpointConfig": {"S3Uri": checkpoints},
        }
    )


def processing_request(
    config: JobConfig, *, image: str, entrypoint: Sequence[str], channels: Mapping[str, str]
) -> dict[str, Any]:
    """Parameters of `create_processing_job` without a name. `channels` are s3:// prefixes by name.

    They appear below `/opt/ml/processing/input/<name>`. Spot, warm pool and checkpoints do not exist there and are
    left out. Raises `ValueError` for instance groups, which do not exist either: other hosts are not what was meant.
    """
    if config.instance_groups:
        raise ValueError(
            "instance_groups exist for training jobs only: give them to a step that is one (steps: tune_model)"
        )
    return _without_empty(
        {
            **_common(config),
            "AppSpecification": {"ImageUri": image, "ContainerEntrypoint": list(entrypoint)},
            "ProcessingInputs": [
                {
                    "InputName": name,
                    "S3Input": {
                        **_all_below(uri),
                        "LocalPath": f"{PROCESSING_INPUT}/{name}",
                        "S3InputMode": "File",
                    },
                }
                for name, uri in channels.items()
            ],
            "ProcessingResources": {"ClusterConfig": _hosts(config)},
            "StoppingCondition": {"MaxRuntimeInSeconds": config.max_run_seconds},
            "NetworkConfig": _network(config),
        }
    )


def _hosts(config: JobConfig) -> dict[str, Any]:
    def of_one_type(hosts: JobConfig | InstanceGroup) -> dict[str, Any]:
        return {"InstanceType": hosts.instance_type, "InstanceCount": hosts.instance_count}

    groups = [{"InstanceGroupName": group.name, **of_one_type(group)} for group in config.instance_groups]
    hosts = {"InstanceGroups": groups} if groups else of_one_type(config)
    return {**hosts, "VolumeSizeInGB": config.volume_size_gb, "VolumeKmsKeyId": config.volume_kms_key}


def _network(config: JobConfig) -> dict[str, Any]:
    vpc = {"Subnets": list(config.subnets), "SecurityGroupIds": list(config.security_group_ids)}
    return {
        "EnableNetworkIsolation": config.network_isolation,
        "EnableInterContainerTrafficEncryption": config.encrypt_inter_container_traffic,
        "VpcConfig": vpc if config.subnets else None,
    }


def _common(config: JobConfig) -> dict[str, Any]:
    return {
        "RoleArn": config.role_arn,
        "Environment": dict(config.environment),
        "Tags": [{"Key": key, "Value": value} for key, value in config.tags.items()],
    }


def _all_below(uri: str) -> dict[str, str]:
    return {"S3Uri": uri, "S3DataType": "S3Prefix", "S3DataDistributionType": "FullyReplicated"}


def _without_empty(members: Mapping[str, Any]) -> dict[str, Any]:
    """Members that have a value, on all levels: what is not configured is not in a request."""
    kept = {name: _without_empty(value) if isinstance(value, Mapping) else value for name, value in members.items()}
    return {name: value for name, value in kept.items() if value not in (None, {}, [])}
