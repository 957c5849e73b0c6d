"""Endpoints of SageMaker: created, changed by SageMaker's blue/green deployment, tested before they count.

A new version is first tested on a candidate endpoint of its own, which lives for some minutes; then SageMaker starts it
beside the old one and moves the traffic; then the endpoint itself is tested, and if that fails the previous
configuration serves again. Configurations and models made for an endpoint are removed when neither the version served
nor the one before needs them. Only what carries this project's tags is changed or removed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import PrivateAttr

from resources.aws.calls import aws_client, error_message, pages
from resources.aws.ownership import is_ours
from resources.endpoints.base import (
    PROBE_ID,
    EndpointDeploymentFailed,
    EndpointNotFound,
    EndpointStatus,
    InvocationFailed,
    SmokeTest,
    SmokeTestFailed,
    SmokeTestResult,
)
from resources.endpoints.endpoint_parts import BROKEN, MEMBERS, MOVING, EndpointParts, FoundEndpoint
from resources.endpoints.endpoint_requests import CANDIDATE, SERVING, EndpointRequests, Tag, part_name
from resources.inventory import NotOwned, OwnedItem, files_item
from resources.model_registry.base import ModelVersion
from step_scripts.runner import storage
from step_scripts.serving.deployment import MAX_BODY_BYTES

_KNOWN_SECONDS = 60.0  # how long an endpoint that was found to be this project's is taken for that
_FAILURES = (EndpointDeploymentFailed, SmokeTestFailed, InvocationFailed)
_LOG_SECONDS = 20.0  # for the log of a failed deployment, which is a help and no more

logger = logging.getLogger(__name__)


class SageMakerEndpointHost(EndpointRequests):
    """Serves versions of `SageMakerModelRegistry`."""

    _known: dict[str, float] = PrivateAttr(default_factory=dict)

    def _deploy(self, name: str, version: ModelVersion, smoke_test: SmokeTest, log: logging.Logger) -> EndpointStatus:
        from botocore.exceptions import BotoCoreError, ClientError

        since = datetime.now(UTC)
        parts = self._parts()
        if (current := parts.find(name)) and not is_ours(current.tags):
            raise EndpointDeploymentFailed(
                f"endpoint {name} exists and was not created by this project; it is left alone. Choose another name"
            )
        try:
            result = SageMakerRollout(self, parts, name, version, smoke_test, log).run()
        except (*_FAILURES, ClientError, BotoCoreError) as error:
            reason = f"{error_message(error)}{parts.log_tail(name, since)}"
            raise self._not_deployed(name, version, reason) from error
        status = self.describe(name)
        if status is None:
            raise EndpointDeploymentFailed(f"endpoint {name} was deleted in the meantime")
        log.info(f"Endpoint {name} serves {version.reference} at {status.url}.")
        return status.model_copy(update={"smoke_test": result})

    def describe(self, name: str) -> EndpointStatus | None:
        """See `EndpointHost.describe`. None also for an endpoint that this project did not create."""
        parts = self._parts()
        found = parts.find_ours(name)
        if found is None:
            return None
        deployed, capture = found.tags.get(Tag.DEPLOYED), found.description.get("DataCaptureConfig", {})
        return EndpointStatus(
            name=name,
            state="OutOfService" if found.status in (*BROKEN, "Creating", "Deleting") else "InService",
            url=f"{parts.runtime.meta.endpoint_url}/endpoints/{name}/invocations",
            version=found.config_tags.get(Tag.VERSION, ""),
            model_digest=found.config_tags.get(Tag.DIGEST, ""),
            started_at=found.description["CreationTime"],
            deployed_at=datetime.fromisoformat(deployed) if deployed else found.description["LastModifiedTime"],
            previous_version=found.tags.get(Tag.PREVIOUS_VERSION) or None,
            capture_uri=storage.join(capture["DestinationS3Uri"], name) if capture.get("EnableCapture") else None,
        )

    def invoke(self, name: str, body: bytes, content_type: str, accept: str = "*/*", inference_id: str = "") -> bytes:
        """See `EndpointHost.invoke`. Bodies may have at most 6,291,456 bytes; that is SageMaker's limit."""
        if len(body) > MAX_BODY_BYTES:
            limit = f"endpoints take at most {MAX_BODY_BYTES}. Send the rows in several requests"
            raise InvocationFailed(f"the body has {len(body)} bytes; {limit}", status=413, body=b"")
        parts = self._parts()
        if self._known.get(name, 0.0) < time.monotonic():
            if parts.find_ours(name) is None:
                raise self._not_served(name)
            self._known[name] = time.monotonic() + _KNOWN_SECONDS
        try:
            return parts.send(name, body, content_type, accept, inference_id)
        except EndpointNotFound:
            raise self._not_served(name) from None

    def delete(self, name: str) -> None:
        """See `EndpointHost.delete`. With it go its candidates, configurations and models; its log stays.

        Raises `EndpointNotFound` for an endpoint that this project did not create.
        """
        parts = self._parts()
        if (found := parts.find(name)) and not is_ours(found.tags):
            raise EndpointNotFound(f"endpoint {name} was not created by this project; it is left alone")
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
        self._parts().remove(item, self.root, self.update_timeout_seconds, logger)

    def _names(self) -> Sequence[str]:
        """With those of others and of candidates, which `describe` leaves out."""
        return sorted(item["EndpointName"] for item in pages(self._parts().client, "list_endpoints", "Endpoints"))

    def _parts(self) -> EndpointParts:
        seconds = self.retry_timeout_seconds
        client = aws_client("sagemaker", self.region_name, retry_seconds=seconds)
        logs = aws_client("logs", self.region_name, retry_seconds=min(_LOG_SECONDS, seconds))
        runtime = aws_client("sagemaker-runtime", self.region_name, retry_seconds=self.invocation_retry_timeout_seconds)
        return EndpointParts(client, logs, runtime, self.poll_seconds)


@dataclass(frozen=True)
class SageMakerRollout:
    """Brings `version` to endpoint `name` of the host."""

    host: SageMakerEndpointHost
    parts: EndpointParts
    name: str
    version: ModelVersion
    smoke_test: SmokeTest
    log: logging.Logger

    def run(self) -> SmokeTestResult:
        """Have the version served; returns its smoke test.

        Raises `EndpointDeploymentFailed`, `SmokeTestFailed` or `InvocationFailed` when what served before still does,
        and nothing that was created is left. An interrupt leaves a change that SageMaker has begun to SageMaker.
        """
        container, start_seconds = self.parts.container(self.version, self.host.image), self.host.start_timeout_seconds
        current = self.parts.settled(self.name, self.host.update_seconds, self.log)
        if current and current.status in BROKEN:
            reason = current.description.get("FailureReason", "no reason given")
            self.log.warning(f"Endpoint {self.name} is {current.status} ({reason}): it is created again.")
            self.parts.delete_endpoint(self.name, self.host.update_seconds, self.log)
            current = None
        self.parts.delete_candidates(self.name, start_seconds, self.log, older_than=start_seconds)
        keep = {current.config, current.tags.get(Tag.PREVIOUS_CONFIG, "")} if current else set[str]()
        try:
            model = self.parts.create("model", self.host.model_request(self.name, self.version, container))
            config = self._config(model, SERVING)
            if current is None:
                return self._create(config)
            if current.config == config:
                self.log.info(f"Endpoint {self.name} serves {self.version.reference} already.")
                result = self._smoke(self.name)
                before = current.tags.get(Tag.CONFIG, config)
                if before != config:  # the run that changed the endpoint did not live to see it
                    self._record(current, config, before)
                return result
            if self.host.smoke_test_on_candidate:
                self._smoke_test_on_candidate(model)
            return self._change(current, config)
        except Exception:
            found = self.parts.find(self.name)
            if found is None or found.status not in MOVING:  # else SageMaker may still be using what was created
                self.parts.delete_parts(self.name, keep | ({found.config} if found else set()))
            raise

    def _config(self, model: str, role: str) -> str:
        return self.parts.create("endpoint_config", self.host.config_request(self.name, self.version, model, role))

    def _create(self, config: str) -> SmokeTestResult:
        name = self.name
        self.log.info(f"Creating endpoint {name} for {self.version.reference}.")
        now = datetime.now(UTC).isoformat()
        tags = self.host.owned({Tag.ENDPOINT: name, Tag.ROLE: SERVING, Tag.CONFIG: config, Tag.DEPLOYED: now})
        request = {"EndpointName": name, "EndpointConfigName": config, "Tags": tags}
        self.parts.create("endpoint", request)
        try:
            self._in_service(name, config, self.host.start_timeout_seconds)
            result = self._smoke(name)
        except _FAILURES:
            self.parts.delete_endpoint(name, self.host.update_seconds, self.log)
            raise
        self.parts.delete_parts(name, {config})
        return result

    def _smoke_test_on_candidate(self, model: str) -> None:
        from botocore.exceptions import ClientError

        config = self._config(model, CANDIDATE)
        candidate = part_name(self.name, {"config": config}, "-candidate")
        self.log.info(f"Testing {self.version.reference} on endpoint {candidate}.")
        try:
            result = self._tested(candidate, config)
        except Exception:
            self._discard(candidate, config)
            raise
        except BaseException:  # interrupted: there is no time to wait
            with contextlib.suppress(ClientError):
                self.parts.client.delete_endpoint(EndpointName=candidate)
            self.log.warning(
                f"Endpoint {candidate} may still be starting, which costs money. Deploying {self.version.reference} "
                f"again takes it up; any deployment to {self.name} after {self.host.start_timeout_seconds:g} s removes "
                "it."
            )
            raise
        self._discard(candidate, config)
        self.log.info(result.of(self.version.reference))

    def _tested(self, candidate: str, config: str) -> SmokeTestResult:
        since = datetime.now(UTC)
        tags = self.host.tags_for(self.name, self.version, CANDIDATE)
        # One that an interrupted deployment left is used as it is.
        self.parts.create("endpoint", {"EndpointName": candidate, "EndpointConfigName": config, "Tags": tags})
        try:
            self._in_service(candidate, config, self.host.start_timeout_seconds)
            return self._smoke(candidate)
        except _FAILURES as error:
            raise EndpointDeploymentFailed(f"{error}{self.parts.log_tail(candidate, since)}") from error

    def _change(self, current: FoundEndpoint, config: str) -> SmokeTestResult:
        name, served = self.name, current.config_tags.get(Tag.VERSION, "")
        self.log.info(f"Changing endpoint {name} from {served} to {self.version.reference}.")
        self.parts.update(name, config, None if self.host.serverless else self.host.traffic.request())
        found = self._in_service(name, config, self.host.update_seconds)
        try:
            result = self._smoke(name)
        except BaseException as error:
            self.log.warning(f"Going back to {served}.")
            self.parts.update(name, current.config, None)
            if isinstance(error, Exception):
                self._in_service(name, current.config, self.host.update_seconds)
            raise
        self._record(found, config, current.config)
        return result

    def _record(self, found: FoundEndpoint, config: str, before: str) -> None:
        """Note on the endpoint what it serves and what it served before; remove what is older."""
        served = self.parts.tags("endpoint_config", before).get(Tag.VERSION, "")
        previous = {tag: found.tags.get(tag, "") for tag in (Tag.PREVIOUS_VERSION, Tag.PREVIOUS_CONFIG)}
        if served != self.version.reference:
            previous = {Tag.PREVIOUS_VERSION: served, Tag.PREVIOUS_CONFIG: before}
        tags = {**previous, Tag.CONFIG: config, Tag.DEPLOYED: datetime.now(UTC).isoformat()}
        self.parts.client.add_tags(
            ResourceArn=found.description["EndpointArn"], Tags=[{"Key": k, "Value": v} for k, v in tags.items()]
        )
        if removed := self.parts.delete_parts(self.name, {config, previous[Tag.PREVIOUS_CONFIG]}):
            self.log.info(f"Removed what endpoint {self.name} needs no more: {', '.join(removed)}.")

    def _in_service(self, name: str, config: str, seconds: float) -> FoundEndpoint:
        """The endpoint when it serves with `config`. Raises `EndpointDeploymentFailed` with SageMaker's reason."""
        found = self.parts.settled(name, seconds, self.log, is_new=True)
        if found and found.status == "InService" and found.config == config:
            return found
        if found is None:
            raise EndpointDeploymentFailed(f"endpoint {name} was deleted in the meantime")
        reason = found.description.get("FailureReason", "SageMaker gives no reason")
        outcome = f"was rolled back to {found.config}" if found.status == "InService" else f"is {found.status}"
        raise EndpointDeploymentFailed(f"Endpoint {name} {outcome}: {reason}")

    def _smoke(self, endpoint: str) -> SmokeTestResult:
        return self.smoke_test.run(lambda body: self.parts.send(endpoint, body, "text/csv", "text/csv", PROBE_ID))

    def _discard(self, candidate: str, config: str) -> None:
        found = self.parts.find(candidate)
        if found and is_ours(found.tags):
            self.parts.delete_endpoint(candidate, self.host.start_timeout_seconds, self.log)
        self.parts.delete("endpoint_config", config)
