"""One deployment of a model version to a SageMaker endpoint: create or change, test, go back, clean up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from resources.aws.calls import already_exists
from resources.aws.ownership import is_ours, owned
from resources.aws.request_validation import check_request
from resources.endpoints.base import (
    DeploymentLog,
    EndpointDeploymentFailed,
    InvocationFailed,
    SmokeTestFailed,
    SmokeTestResult,
)
from resources.endpoints.endpoint_parts import BROKEN, MOVING, EndpointParts, FoundEndpoint
from resources.endpoints.endpoint_requests import (
    CANDIDATE,
    CONFIG_TAG,
    DEPLOYED_TAG,
    ENDPOINT_TAG,
    PREVIOUS_CONFIG_TAG,
    PREVIOUS_VERSION_TAG,
    ROLE_TAG,
    SERVING,
    VERSION_TAG,
    name_prefix,
    part_name,
    part_tags,
)
from resources.model_registry.base import ModelVersion
from step_scripts.runner.wording import counted

_FAILURES = (EndpointDeploymentFailed, SmokeTestFailed, InvocationFailed)


@dataclass(frozen=True)
class Rollout:
    """Brings `version` to endpoint `name`.

    `model` holds the parameters of `create_model`; `config` gives those of `create_endpoint_config` for a model's
    name, for a candidate or not; `deployment` is the `DeploymentConfig` of updates. `smoke` tests the endpoint with the
    name that it is given.
    """

    parts: EndpointParts
    name: str
    version: ModelVersion
    model: Mapping[str, Any]
    config: Callable[[str, bool], Mapping[str, Any]]
    deployment: Mapping[str, Any] | None
    tags: Mapping[str, str]
    smoke_test_on_candidate: bool
    start_seconds: float
    update_seconds: float
    smoke: Callable[[str], SmokeTestResult]
    log: DeploymentLog

    def run(self) -> tuple[FoundEndpoint, SmokeTestResult]:
        """The endpoint that serves the version, and its smoke test.

        Raises `EndpointDeploymentFailed`, `SmokeTestFailed` or `InvocationFailed` when what served before still does,
        and nothing that was created is left. An interrupt leaves a change that SageMaker has begun to SageMaker.
        """
        current = self.parts.settled(self.name, self.update_seconds, self.log)
        if current and current.status in BROKEN:
            reason = current.description.get("FailureReason", "no reason given")
            self.log.warning(f"Endpoint {self.name} is {current.status} ({reason}): it is created again.")
            self.parts.remove_endpoint(self.name, self.update_seconds, self.log)
            current = None
        remove_candidates(self.parts, self.name, self.start_seconds, self.log, older_than=self.start_seconds)
        keep = {current.config, current.tags.get(PREVIOUS_CONFIG_TAG, "")} if current else set[str]()
        try:
            model = self.parts.create("CreateModel", "ModelName", self.model)
            config = self._config(model, candidate=False)
            if current is None:
                return self._create(config)
            if current.config == config:
                self.log.info(f"Endpoint {self.name} serves {self.version.reference} already.")
                result = self.smoke(self.name)
                before = current.tags.get(CONFIG_TAG, config)
                # They differ if the run that changed the endpoint did not live to see it.
                return current if before == config else self._record(current, config, before), result
            if self.smoke_test_on_candidate:
                self._smoke_test_on_candidate(model)
            return self._change(current, config)
        except Exception:
            self._clean_up(keep)
            raise

    def _clean_up(self, keep: set[str]) -> None:
        """Remove what a failed deployment created; nothing while SageMaker may still be using it."""
        found = self.parts.find(self.name)
        if found is None or found.status not in MOVING:
            self.parts.remove_parts(self.name, keep | ({found.config} if found else set()))

    def _config(self, model: str, *, candidate: bool) -> str:
        request = self.config(model, candidate)
        return self.parts.create("CreateEndpointConfig", "EndpointConfigName", request)

    def _create(self, config: str) -> tuple[FoundEndpoint, SmokeTestResult]:
        name = self.name
        self.log.info(f"Creating endpoint {name} for {self.version.reference}.")
        own = {ENDPOINT_TAG: name, ROLE_TAG: SERVING, CONFIG_TAG: config, DEPLOYED_TAG: datetime.now(UTC).isoformat()}
        tags = owned(own, self.tags)
        request = {"EndpointName": name, "EndpointConfigName": config, "Tags": tags}
        check_request("CreateEndpoint", request)
        self.parts.with_new_parts(self.parts.client.create_endpoint, **request)
        try:
            found = self._in_service(name, config, self.start_seconds)
            result = self.smoke(name)
        except _FAILURES:
            self.parts.remove_endpoint(name, self.update_seconds, self.log)
            raise
        self.parts.remove_parts(name, {config})
        return found, result

    def _smoke_test_on_candidate(self, model: str) -> None:
        """Run the smoke test on an endpoint of its own, and remove that."""
        from botocore.exceptions import ClientError

        config = self._config(model, candidate=True)
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
                f"again takes it up; any deployment to {self.name} after {self.start_seconds:g} s removes it."
            )
            raise
        self._discard(candidate, config)
        figures = f"largest difference {result.largest_difference:g}, {result.median_ms:g} ms a row"
        self.log.info(f"Smoke test of {self.version.reference}: {counted(result.rows, 'row')}, {figures}.")

    def _tested(self, candidate: str, config: str) -> SmokeTestResult:
        from botocore.exceptions import ClientError

        since = datetime.now(UTC)
        tags = owned(part_tags(self.name, self.version, CANDIDATE), self.tags)
        request = {"EndpointName": candidate, "EndpointConfigName": config, "Tags": tags}
        check_request("CreateEndpoint", request)
        try:
            self.parts.with_new_parts(self.parts.client.create_endpoint, **request)
        except ClientError as error:
            existing = self.parts.find(candidate) if already_exists(error) else None
            if existing is None or not is_ours(existing.tags):  # else an interrupted deployment left it
                raise
        try:
            self._in_service(candidate, config, self.start_seconds)
            return self.smoke(candidate)
        except _FAILURES as error:
            tail = self.parts.log_tail(candidate, since)
            shown = f"\nEnd of the log of {candidate}:\n{tail}" if tail else ""
            raise EndpointDeploymentFailed(f"{error}{shown}") from error

    def _change(self, current: FoundEndpoint, config: str) -> tuple[FoundEndpoint, SmokeTestResult]:
        """Have SageMaker change over, test, and go back if the test fails."""
        name, served = self.name, current.config_tags.get(VERSION_TAG, "")
        self.log.info(f"Changing endpoint {name} from {served} to {self.version.reference}.")
        self.parts.update(name, config, self.deployment)
        found = self._in_service(name, config, self.update_seconds)
        try:
            result = self.smoke(name)
        except BaseException as error:
            self.log.warning(f"Going back to {served}.")
            self.parts.update(name, current.config, None)
            if isinstance(error, Exception):
                self._in_service(name, current.config, self.update_seconds)
            raise
        return self._record(found, config, current.config), result

    def _record(self, found: FoundEndpoint, config: str, before: str) -> FoundEndpoint:
        """Note on the endpoint what it serves and what it served before; remove what is older."""
        served = self.parts.config_tags(before).get(VERSION_TAG, "")
        previous = {tag: found.tags.get(tag, "") for tag in (PREVIOUS_VERSION_TAG, PREVIOUS_CONFIG_TAG)}
        if served != self.version.reference:
            previous = {PREVIOUS_VERSION_TAG: served, PREVIOUS_CONFIG_TAG: before}
        tags = {**previous, CONFIG_TAG: config, DEPLOYED_TAG: datetime.now(UTC).isoformat()}
        self.parts.tag(found.description["EndpointArn"], tags)
        if removed := self.parts.remove_parts(self.name, {config, previous[PREVIOUS_CONFIG_TAG]}):
            self.log.info(f"Removed what endpoint {self.name} needs no more: {', '.join(removed)}.")
        return self.parts.find(self.name) or found

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

    def _discard(self, candidate: str, config: str) -> None:
        found = self.parts.find(candidate)
        if found and is_ours(found.tags):
            self.parts.remove_endpoint(candidate, self.start_seconds, self.log)
        self.parts.remove_config(config)


def remove_candidates(
    parts: EndpointParts, name: str, seconds: float, log: DeploymentLog, *, older_than: float
) -> None:
    """Remove candidates of the endpoint that interrupted deployments left, if they are `older_than` seconds."""
    for candidate in parts.names(f"{name_prefix(name)}candidate-"):
        found = parts.find(candidate)
        if found is None or not is_ours(found.tags) or found.tags.get(ENDPOINT_TAG) != name:
            continue
        age = datetime.now(UTC) - found.description["CreationTime"]
        if found.tags.get(ROLE_TAG) == CANDIDATE and age.total_seconds() >= older_than:
            log.info(f"Removing endpoint {candidate}, which an earlier deployment left.")
            parts.remove_endpoint(candidate, seconds, log)
            parts.remove_config(found.config)
