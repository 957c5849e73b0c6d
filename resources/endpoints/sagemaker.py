"""Endpoints of SageMaker: created, changed by SageMaker's blue/green deployment, tested before they count.

A new version is first tested on a candidate endpoint of its own, which lives for some minutes; then SageMaker starts it
beside the old one and moves the traffic; then the endpoint itself is tested, and if that fails the previous
configuration serves again. Configurations and models made for an endpoint are removed when neither the version served
nor the one before needs them. Only what carries this project's tags is changed or removed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import PrivateAttr

from resources.aws.calls import aws_client, error_code, error_message, pages
from resources.aws.ownership import is_ours
from resources.endpoints.base import (
    EndpointDeploymentFailed,
    EndpointNotFound,
    EndpointStatus,
    InvocationFailed,
    SmokeTest,
    SmokeTestFailed,
)
from resources.endpoints.captured_files import CapturedFile, captured_below
from resources.endpoints.endpoint_parts import BROKEN, MEMBERS, EndpointParts
from resources.endpoints.endpoint_requests import EndpointRequests, Tag
from resources.endpoints.sagemaker_rollout import SageMakerRollout
from resources.inventory import NotOwned, OwnedItem, files_item
from resources.model_registry.base import ModelVersion
from resources.model_registry.model_packages import find_package
from step_scripts.runner import storage
from step_scripts.serving.deployment import MAX_BODY_BYTES

_KNOWN_SECONDS = 60.0  # how long an endpoint that was found to be this project's is taken for that
_LOG_SECONDS = 20.0  # for the log of a failed deployment, which is a help and no more
_SHOWN = 2000  # characters of an answer in an error

logger = logging.getLogger(__name__)


class SageMakerEndpointHost(EndpointRequests):
    """Serves versions of `SageMakerModelRegistry`."""

    _known: dict[str, float] = PrivateAttr(default_factory=dict)

    def _deploy(self, name: str, version: ModelVersion, smoke_test: SmokeTest, log: logging.Logger) -> EndpointStatus:
        from botocore.exceptions import BotoCoreError, ClientError

        since = datetime.now(UTC)
        parts = self._parts()
        current = parts.find(name)
        if current and not is_ours(current.tags):
            raise EndpointDeploymentFailed(
                f"endpoint {name} exists and was not created by this project; it is left alone. Choose another name"
            )
        try:
            result = SageMakerRollout(self, parts, name, version, smoke_test, log).run()
        except (EndpointDeploymentFailed, SmokeTestFailed, InvocationFailed, ClientError, BotoCoreError) as error:
            reason = f"{error_message(error)}{parts.log_tail(name, since)}"
            raise self._not_deployed(name, version, reason) from error
        status = self.describe(name)
        if status is None:
            raise EndpointDeploymentFailed(f"endpoint {name} was deleted in the meantime")
        log.info(f"Endpoint {name} serves {version.reference} at {status.url}.")
        return status.model_copy(update={"smoke_test": result})

    def describe(self, name: str) -> EndpointStatus | None:
        """See `EndpointHost.describe`. None also for an endpoint that this project did not create."""
        found = self._parts().find_ours(name)
        if found is None:
            return None
        deployed, capture = found.tags.get(Tag.DEPLOYED), found.description.get("DataCaptureConfig", {})
        return EndpointStatus(
            name=name,
            state="OutOfService" if found.status in (*BROKEN, "Creating", "Deleting") else "InService",
            url=f"{self._client('sagemaker-runtime').meta.endpoint_url}/endpoints/{name}/invocations",
            version=found.config_tags.get(Tag.VERSION, ""),
            model_digest=found.config_tags.get(Tag.DIGEST, ""),
            started_at=found.description["CreationTime"],
            deployed_at=datetime.fromisoformat(deployed) if deployed else found.description["LastModifiedTime"],
            previous_version=found.tags.get(Tag.PREVIOUS_VERSION) or None,
            capture_uri=storage.join(capture["DestinationS3Uri"], name) if capture.get("EnableCapture") else None,
        )

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
                raise self._not_served(name)
            self._known[name] = time.monotonic() + _KNOWN_SECONDS
        try:
            return self.send(name, body, content_type, accept, inference_id)
        except EndpointNotFound:
            self._known.pop(name, None)
            raise self._not_served(name) from None

    def send(self, name: str, body: bytes, content_type: str, accept: str, inference_id: str | None) -> bytes:
        """The answer of the endpoint, whoever created it.

        Raises `EndpointNotFound`, or `InvocationFailed` with the container's answer.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        client = aws_client("sagemaker-runtime", self.region_name, retry_seconds=self.invocation_retry_timeout_seconds)
        given: dict[str, Any] = {"EndpointName": name, "Body": body, "ContentType": content_type, "Accept": accept}
        if inference_id:
            given["InferenceId"] = inference_id
        try:
            return client.invoke_endpoint(**given)["Body"].read()
        except ClientError as error:
            code, text = error_code(error), error_message(error)
            if code == "ValidationError" and "not found" in text:
                raise EndpointNotFound(text) from error
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
            what = f": {code}:"
            if code == "ModelError":  # the container answered, with an error
                status = error.response.get("OriginalStatusCode", 500)
                text = str(error.response.get("OriginalMessage") or text)
                what = f" answered {status}:"
            raise InvocationFailed(
                f"endpoint {name}{what} {text[:_SHOWN]}", status=int(status), body=text.encode()
            ) from error
        except BotoCoreError as error:
            raise InvocationFailed(f"endpoint {name} does not answer: {error}", status=504, body=b"") from error

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
            parts.delete_endpoint(name, self.update_timeout_seconds, logger)
        parts.delete_candidates(name, self.start_timeout_seconds, logger, older_than=0.0)
        parts.delete_parts(name, set(), candidates=True)

    def inventory(self) -> Sequence[OwnedItem]:
        """See `EndpointHost.inventory`. With candidates, configurations, models and captured requests; not the logs."""
        parts, captured = self._parts(), [(f.bytes, f.changed_at.timestamp()) for f in self.captured_files()]
        items = [item for kind in MEMBERS for item in parts.items(kind, self.root)]
        return items + files_item(self._captured, "captured requests", captured)

    def remove(self, item: OwnedItem) -> None:
        """See `EndpointHost.remove`."""
        if item.kind == "files":
            if item.location != self._captured:
                raise NotOwned(f"{item.location} holds no captured requests of this host ({self.root})")
            self.remove_captured(self.captured_files())
            return
        self._known.pop(item.name, None)
        self._parts().remove(item, self.root, self.update_timeout_seconds, logger)

    def container(self, version: ModelVersion) -> dict[str, Any]:
        """The container that serves the version. Raises `EndpointDeploymentFailed` if SageMaker does not know it."""
        client = self._client("sagemaker")
        package = find_package(client, version.group, version.version)
        if package is None:
            raise EndpointDeploymentFailed(
                f"SageMaker's model registry has no {version.reference} in {client.meta.region_name}: register it there"
            )
        if not self.image:
            return {"ModelPackageName": package["ModelPackageArn"]}
        archive = package["InferenceSpecification"]["Containers"][0]["ModelDataUrl"]
        return {"Image": self.image, "ModelDataUrl": archive}

    def _names(self) -> Sequence[str]:
        """With those of others and of candidates, which `describe` leaves out."""
        return sorted(item["EndpointName"] for item in pages(self._client("sagemaker"), "list_endpoints", "Endpoints"))

    def captured_files(self) -> Sequence[CapturedFile]:
        """See `EndpointHost.captured_files`. What is captured to another `uri` is its owner's business."""
        return captured_below(self._captured)

    def _client(self, service: str, retry_seconds: float | None = None) -> Any:
        return aws_client(service, self.region_name, retry_seconds=retry_seconds or self.retry_timeout_seconds)

    def _parts(self) -> EndpointParts:
        logs = self._client("logs", min(_LOG_SECONDS, self.retry_timeout_seconds))
        return EndpointParts(self._client("sagemaker"), logs, self.poll_seconds)
