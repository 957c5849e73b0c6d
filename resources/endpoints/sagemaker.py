"""Endpoints of SageMaker: created, changed by SageMaker's blue/green deployment, tested before they count.

A new version is first tested on a candidate endpoint of its own, which lives for some minutes; then SageMaker starts it
beside the old one and moves the traffic; then the endpoint itself is tested, and if that fails the previous
configuration serves again. Configurations and models made for an endpoint are removed when neither the version served
nor the one before needs them. Only what carries this project's tags is changed or removed.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import dagster as dg
from pydantic import Field, PrivateAttr, model_validator

from resources.aws.calls import aws_client, error_message
from resources.aws.ownership import is_ours, root_tags
from resources.aws.request_validation import check_request
from resources.endpoints.base import (
    PROBE_ID,
    DeploymentLog,
    EndpointDeploymentFailed,
    EndpointHost,
    EndpointNotFound,
    EndpointStatus,
    InvocationFailed,
    SmokeTest,
    SmokeTestFailed,
    SmokeTestResult,
    require_approved,
)
from resources.endpoints.captured_files import CapturedFile, captured_below, captured_items, remove_captured
from resources.endpoints.endpoint_inventory import EndpointInventory
from resources.endpoints.endpoint_parts import BROKEN, EndpointParts, FoundEndpoint
from resources.endpoints.endpoint_requests import (
    CAPTURED,
    DEPLOYED_TAG,
    DIGEST_TAG,
    PREVIOUS_VERSION_TAG,
    VERSION_TAG,
    DataCapture,
    Serverless,
    TrafficShift,
    capture_request,
    config_request,
    model_request,
)
from resources.endpoints.invocation import MAX_BODY_BYTES, send
from resources.endpoints.rollout import Rollout, remove_candidates
from resources.inventory import NotOwned, OwnedItem
from resources.model_registry.base import ModelVersion
from resources.model_registry.model_packages import ModelPackages
from step_scripts.runner import storage
from step_scripts.table.spec import TableSpec

if TYPE_CHECKING:
    from step_scripts.serving.captured_requests import CapturedRows

_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
_KNOWN_SECONDS = 60.0  # how long an endpoint that was found to be this project's is taken for that
_LOG_SECONDS = 20.0  # for the log of a failed deployment, which is a help and no more
_Names = list[str]  # in the class `list` is a method

logger = logging.getLogger(__name__)


class SageMakerEndpointHost(EndpointHost):
    """Serves versions of `SageMakerModelRegistry`."""

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
    subnets: _Names = Field(default_factory=_Names, description="VPC subnets. Empty: SageMaker's own network.")
    security_group_ids: _Names = Field(default_factory=_Names, description="Security groups; needed with subnets.")
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

    _known: dict[str, float] = PrivateAttr(default_factory=dict)

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
        model = {"PrimaryContainer": {"Image": self.image or "image", "Environment": dict(self.environment)}}
        model |= {"ModelName": "model", "ExecutionRoleArn": self.role_arn}
        check_request("CreateModel", model | ({"VpcConfig": self._vpc} if self._vpc else {}))
        variant = {"VariantName": "variant", "ModelName": "model", **self._variant}
        config: dict[str, Any] = {"EndpointConfigName": "config", "ProductionVariants": [variant]}
        if self.data_capture:
            config["DataCaptureConfig"] = capture_request(self.data_capture, self.root)
        check_request("CreateEndpointConfig", config | ({"KmsKeyId": self.kms_key} if self.kms_key else {}))
        update = {"EndpointName": "e", "EndpointConfigName": "c", "DeploymentConfig": self.traffic.request()}
        check_request("UpdateEndpoint", update)

    def deploy(self, name: str, version: ModelVersion, smoke_test: SmokeTest, log: DeploymentLog) -> EndpointStatus:
        """See `EndpointHost.deploy`. A version that is served already, in the same way, is only tested."""
        from botocore.exceptions import BotoCoreError, ClientError

        require_approved(version)
        _check_name(name)
        since = datetime.now(UTC)
        parts = self._parts()

        def smoke(endpoint: str) -> SmokeTestResult:
            return smoke_test.run(lambda body: self._send(endpoint, body, "text/csv", "text/csv", PROBE_ID))

        current = parts.find(name)
        if current and not is_ours(current.tags):
            raise EndpointDeploymentFailed(
                f"endpoint {name} exists and was not created by this project; it is left alone. Choose another name"
            )
        try:
            found, result = self._rollout(parts, name, version, smoke, log).run()
        except (EndpointDeploymentFailed, SmokeTestFailed, InvocationFailed, ClientError, BotoCoreError) as error:
            tail = parts.log_tail(name, since)
            shown = f"\nEnd of the containers' log (/aws/sagemaker/Endpoints/{name}):\n{tail}" if tail else ""
            kept = self.describe(name)
            now = f"{kept.version} keeps serving" if kept and kept.state == "InService" else "nothing is served"
            reason = error if isinstance(error, ValueError | RuntimeError) else error_message(error)
            raise EndpointDeploymentFailed(
                f"{version.reference} was not deployed to endpoint {name}; {now}. {reason}{shown}"
            ) from error
        status = self._status(name, found, result)
        log.info(f"Endpoint {name} serves {version.reference} at {status.url}.")
        return status

    def describe(self, name: str) -> EndpointStatus | None:
        """See `EndpointHost.describe`. None also for an endpoint that this project did not create."""
        found = self._parts().find_ours(name)
        return self._status(name, found) if found else None

    def invoke(
        self, name: str, body: bytes, content_type: str, accept: str = "*/*", inference_id: str | None = None
    ) -> bytes:
        """See `EndpointHost.invoke`. Bodies may have at most 6,291,456 bytes; that is SageMaker's limit."""
        if len(body) > MAX_BODY_BYTES:
            raise InvocationFailed(
                f"the body has {len(body)} bytes; endpoints take at most {MAX_BODY_BYTES}. Send the rows in several "
                "requests",
                status=413,
                body=b"",
            )
        if self._known.get(name, 0.0) < time.monotonic():
            if self._parts().find_ours(name) is None:
                raise EndpointNotFound(self._missing(name))
            self._known[name] = time.monotonic() + _KNOWN_SECONDS
        try:
            return self._send(name, body, content_type, accept, inference_id)
        except EndpointNotFound:
            self._known.pop(name, None)
            raise EndpointNotFound(self._missing(name)) from None

    def captured(self, name: str, table: TableSpec, since: datetime, limit: int) -> CapturedRows | None:
        """See `EndpointHost.captured`. SageMaker writes requests with a delay of minutes."""
        from step_scripts.serving.captured_requests import read_captured

        found = self._parts().find_ours(name)
        capture = found.description.get("DataCaptureConfig", {}) if found else {}
        if not capture.get("EnableCapture"):
            return None
        uri = storage.join(capture["DestinationS3Uri"], name)
        return read_captured(uri, table, since, limit, without=PROBE_ID)

    def captured_files(self) -> Sequence[CapturedFile]:
        """See `EndpointHost.captured_files`. What is captured to another `uri` is its owner's business."""
        from step_scripts.runner.s3_objects import list_folders

        root = f"{self.root.rstrip('/')}/{CAPTURED}"
        return [file for name in list_folders(root) for file in captured_below(f"{root}/{name}", name)]

    def remove_captured(self, files: Sequence[CapturedFile]) -> None:
        """See `EndpointHost.remove_captured`."""
        remove_captured(files, self._captured)

    def delete(self, name: str) -> None:
        """See `EndpointHost.delete`. With it go its candidates, configurations and models; its log stays.

        Raises `EndpointNotFound` for an endpoint that this project did not create.
        """
        parts = self._parts()
        found = parts.find(name)
        if found and not is_ours(found.tags):
            raise EndpointNotFound(f"endpoint {name} was not created by this project; it is left alone")
        self._known.pop(name, None)
        if found:
            parts.remove_endpoint(name, self.update_timeout_seconds, logger)
        remove_candidates(parts, name, self.start_timeout_seconds, logger, older_than=0.0)
        parts.remove_parts(name, set(), candidates=True)

    def list(self) -> Sequence[EndpointStatus]:
        """See `EndpointHost.list`. Without candidates."""
        parts = self._parts()
        found = [(name, parts.find_ours(name)) for name in parts.names()]
        return [self._status(name, endpoint) for name, endpoint in found if endpoint]

    def inventory(self) -> Sequence[OwnedItem]:
        """See `EndpointHost.inventory`. With candidates, configurations, models and captured requests; not the logs."""
        return [*self._inventory.items(), *captured_items(self.captured_files(), self._captured)]

    def remove(self, item: OwnedItem) -> None:
        """See `EndpointHost.remove`."""
        if item.kind == "files":
            if item.location != self._captured:
                raise NotOwned(f"{item.location} holds no captured requests of this host ({self.root})")
            self.remove_captured(self.captured_files())
            return
        self._known.pop(item.name, None)
        self._inventory.remove(item, logger)

    @property
    def _captured(self) -> str:
        return f"{self.root.rstrip('/')}/{CAPTURED}"

    @property
    def _inventory(self) -> EndpointInventory:
        return EndpointInventory(self._parts(), self.root, self.update_timeout_seconds)

    @property
    def _tags(self) -> dict[str, str]:
        return {**root_tags(self.root), **self.tags}

    def _rollout(
        self,
        parts: EndpointParts,
        name: str,
        version: ModelVersion,
        smoke: Callable[[str], SmokeTestResult],
        log: DeploymentLog,
    ) -> Rollout:
        model = model_request(
            name,
            version,
            self._container(version),
            role_arn=self.role_arn,
            environment=self.environment,
            vpc=self._vpc,
            network_isolation=self.network_isolation,
            tags=self._tags,
        )

        def config(model_name: str, candidate: bool) -> dict[str, Any]:
            return config_request(
                name,
                version,
                {"ModelName": model_name, **self._variant},
                capture=capture_request(self.data_capture, self.root) if self.data_capture else None,
                kms_key=self.kms_key,
                candidate=candidate,
                tags=self._tags,
            )

        return Rollout(
            parts=parts,
            name=name,
            version=version,
            model=model,
            config=config,
            deployment=None if self.serverless else self.traffic.request(),
            tags=self._tags,
            smoke_test_on_candidate=self.smoke_test_on_candidate,
            start_seconds=self.start_timeout_seconds,
            update_seconds=self.update_timeout_seconds + self.traffic.seconds,
            smoke=smoke,
            log=log,
        )

    def _client(self, service: str, retry_seconds: float | None = None) -> Any:
        return aws_client(service, self.region_name, retry_seconds=retry_seconds or self.retry_timeout_seconds)

    def _parts(self) -> EndpointParts:
        logs = self._client("logs", min(_LOG_SECONDS, self.retry_timeout_seconds))
        return EndpointParts(self._client("sagemaker"), logs, self.poll_seconds)

    @property
    def _vpc(self) -> Mapping[str, Sequence[str]] | None:
        return {"Subnets": self.subnets, "SecurityGroupIds": self.security_group_ids} if self.subnets else None

    @property
    def _variant(self) -> dict[str, Any]:
        if self.serverless is None:
            return {"InstanceType": self.instance_type, "InitialInstanceCount": self.instance_count}
        chosen = {"MemorySizeInMB": self.serverless.memory_mb, "MaxConcurrency": self.serverless.max_concurrency}
        if self.serverless.provisioned_concurrency:
            chosen["ProvisionedConcurrency"] = self.serverless.provisioned_concurrency
        return {"ServerlessConfig": chosen}

    def _container(self, version: ModelVersion) -> dict[str, Any]:
        """The container that serves the version. Raises `EndpointDeploymentFailed` if SageMaker does not know it."""
        packages = ModelPackages(self._client("sagemaker"))
        arn = packages.arn(version.group, version.version)
        package = packages.describe(arn) if arn else None
        if package is None:
            raise EndpointDeploymentFailed(
                f"SageMaker's model registry has no {version.reference} in {packages.region}: register it there"
            )
        if not self.image:
            return {"ModelPackageName": package["ModelPackageArn"]}
        archive = package["InferenceSpecification"]["Containers"][0]["ModelDataUrl"]
        return {"Image": self.image, "ModelDataUrl": archive}

    def _status(self, name: str, found: FoundEndpoint, result: SmokeTestResult | None = None) -> EndpointStatus:
        deployed = found.tags.get(DEPLOYED_TAG)
        return EndpointStatus(
            name=name,
            state="OutOfService" if found.status in (*BROKEN, "Creating", "Deleting") else "InService",
            url=f"{self._client('sagemaker-runtime').meta.endpoint_url}/endpoints/{name}/invocations",
            version=found.config_tags.get(VERSION_TAG, ""),
            model_digest=found.config_tags.get(DIGEST_TAG, ""),
            started_at=found.description["CreationTime"],
            deployed_at=datetime.fromisoformat(deployed) if deployed else found.description["LastModifiedTime"],
            previous_version=found.tags.get(PREVIOUS_VERSION_TAG) or None,
            smoke_test=result,
        )

    def _missing(self, name: str) -> str:
        names = ", ".join(status.name for status in self.list())
        return f"{name} is not served; served are: {names or 'none'}"

    def _send(self, name: str, body: bytes, content_type: str, accept: str, inference_id: str | None) -> bytes:
        seconds = self.invocation_retry_timeout_seconds
        client = aws_client("sagemaker-runtime", self.region_name, retry_seconds=seconds)
        return send(client, name, body, content_type, accept, inference_id)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an endpoint: 1 to 63 letters, digits and inner hyphens")
