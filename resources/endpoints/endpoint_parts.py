"""Endpoints, endpoint configurations and models on SageMaker, as far as this project created them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from resources.aws.calls import already_exists, error_code, error_message, if_found, is_missing, pages
from resources.aws.ownership import is_ours, tags_of
from resources.aws.request_validation import check_request
from resources.endpoints.base import DeploymentLog, EndpointDeploymentFailed
from resources.endpoints.endpoint_requests import CANDIDATE, ENDPOINT_TAG, ROLE_TAG, name_prefix
from resources.waiting import wait_until

MOVING = ("Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting")
BROKEN = ("Failed", "OutOfService")
_LOG_LINES = 15
_CONSISTENCY_SECONDS = 30.0  # SageMaker may not find for a moment what has just been created


@dataclass(frozen=True)
class FoundEndpoint:
    """An endpoint as DescribeEndpoint has it, its tags, and those of the configuration that it serves with."""

    description: Mapping[str, Any]
    tags: Mapping[str, str]
    config_tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """SageMaker's status."""
        return self.description["EndpointStatus"]

    @property
    def config(self) -> str:
        """Name of the configuration."""
        return self.description["EndpointConfigName"]


@dataclass(frozen=True)
class EndpointParts:
    """Calls on endpoints and what they are made of. `poll_seconds`: shortest interval between two polls."""

    client: Any
    logs: Any
    poll_seconds: float

    def find(self, name: str) -> FoundEndpoint | None:
        """The endpoint, whoever created it; None if there is none."""
        described = if_found(self.client.describe_endpoint, EndpointName=name)
        if described is None:
            return None
        tags = tags_of(self.client, described["EndpointArn"])
        if not is_ours(tags):
            return FoundEndpoint(described, tags)
        return FoundEndpoint(described, tags, self.config_tags(described["EndpointConfigName"]))

    def find_ours(self, name: str) -> FoundEndpoint | None:
        """The endpoint, if this project created it and it is no candidate."""
        found = self.find(name)
        return found if found and is_ours(found.tags) and found.tags.get(ROLE_TAG) != CANDIDATE else None

    def names(self, contains: str = "") -> list[str]:
        """Names of all endpoints, whoever created them."""
        wanted = {"NameContains": contains} if contains else {}
        found = pages(self.client, "list_endpoints", "Endpoints", SortBy="Name", **wanted)
        return sorted(item["EndpointName"] for item in found)

    def create(self, operation: str, name_member: str, request: Mapping[str, Any]) -> str:
        """Create a model or a configuration; one with that name that this project created is used as it is."""
        from botocore.exceptions import ClientError

        check_request(operation, request)
        name = request[name_member]
        functions = {
            "CreateModel": (self.client.create_model, self.client.describe_model, "ModelArn"),
            "CreateEndpointConfig": (
                self.client.create_endpoint_config,
                self.client.describe_endpoint_config,
                "EndpointConfigArn",
            ),
        }
        create, describe, arn = functions[operation]
        try:
            if operation == "CreateModel":
                create(**request)
            else:
                self.with_new_parts(create, **request)
        except ClientError as error:
            if not already_exists(error):
                raise
            existing = describe(**{name_member: name})
            if not is_ours(tags_of(self.client, existing[arn])):
                raise EndpointDeploymentFailed(
                    f"{name} exists and was not created by this project; it is left alone. Choose another endpoint name"
                ) from error
        return name

    def with_new_parts(self, function: Callable[..., Any], **params: Any) -> Any:
        """A call that names what may have been created a moment ago: not found is waited out for some seconds."""
        from botocore.exceptions import ClientError

        start = time.monotonic()

        def answer() -> tuple[Any] | None:
            try:
                return (function(**params),)
            except ClientError as error:
                if is_missing(error) and time.monotonic() < start + _CONSISTENCY_SECONDS:
                    return None
                raise

        return wait_until(answer, timeout=2 * _CONSISTENCY_SECONDS, interval=1.0, what="the answer")[0]

    def settled(self, name: str, seconds: float, log: DeploymentLog, *, is_new: bool = False) -> FoundEndpoint | None:
        """The endpoint when nothing is in progress; None if it is gone, or for a new one still not there.

        Raises `EndpointDeploymentFailed` after `seconds`. Reports every change of its status.
        """
        start, found, shown = time.monotonic(), None, ""

        def is_settled() -> bool:
            nonlocal found, shown
            found = self.find(name)
            if found is None:
                return not is_new or time.monotonic() >= start + _CONSISTENCY_SECONDS
            if found.status in MOVING and found.status != shown:
                shown = found.status
                log.info(f"Endpoint {name} is {shown}.")
            return found.status not in MOVING

        try:
            wait_until(
                is_settled,
                timeout=seconds,
                interval=self.poll_seconds,
                longest_interval=8 * self.poll_seconds,
                what=f"the last change of endpoint {name}",
            )
        except TimeoutError:
            raise EndpointDeploymentFailed(
                f"endpoint {name} is still {shown} after {seconds:g} s. See it in the SageMaker console; "
                "materialize again when it has settled"
            ) from None
        return found

    def remove_endpoint(self, name: str, seconds: float, log: DeploymentLog) -> None:
        """Delete the endpoint, which must be this project's, and wait until it is gone."""
        found = self.settled(name, seconds, log)
        if found is None:
            return
        if_found(self.client.delete_endpoint, EndpointName=name)
        self.settled(name, seconds, log)

    def remove_parts(self, endpoint: str, keep_configs: set[str], *, candidates: bool = False) -> list[str]:
        """Remove the configurations and models that were created for the endpoint and are not needed any more.

        Kept are `keep_configs`, and the models that they name. Configurations of candidates are left to those who
        prove them, unless `candidates`. Returns what was removed.
        """
        removed, needed = [], set()
        for name, arn in self._listed("list_endpoint_configs", "EndpointConfig", endpoint):
            tags = tags_of(self.client, arn)
            if not is_ours(tags) or tags.get(ENDPOINT_TAG) != endpoint:
                continue
            if name in keep_configs or (tags.get(ROLE_TAG) == CANDIDATE and not candidates):
                needed |= self.models_of(name)
            else:
                self.remove_config(name)
                removed.append(name)
        for name, arn in self._listed("list_models", "Model", endpoint):
            tags = tags_of(self.client, arn)
            if name not in needed and is_ours(tags) and tags.get(ENDPOINT_TAG) == endpoint:
                if_found(self.client.delete_model, ModelName=name)
                removed.append(name)
        return removed

    def remove_config(self, name: str) -> None:
        """Remove a configuration, which must be this project's."""
        if_found(self.client.delete_endpoint_config, EndpointConfigName=name)

    def models_of(self, config: str) -> set[str]:
        """Names of the models that a configuration serves."""
        found = if_found(self.client.describe_endpoint_config, EndpointConfigName=config) or {}
        return {variant["ModelName"] for variant in found.get("ProductionVariants", []) if "ModelName" in variant}

    def log_tail(self, name: str, since: datetime) -> str:
        """The last lines of the containers that started after `since`; empty if there are none."""
        from botocore.exceptions import BotoCoreError, ClientError

        group, lines = f"/aws/sagemaker/Endpoints/{name}", []
        # The log is a help; without it, or without the right to read it, the reason is still shown.
        with contextlib.suppress(ClientError, BotoCoreError):
            streams = self.logs.describe_log_streams(logGroupName=group)["logStreams"]
            started = [s for s in streams if s.get("creationTime", 0) >= since.timestamp() * 1000]
            for stream in sorted(started, key=lambda s: s.get("creationTime", 0))[-2:]:
                events = self.logs.get_log_events(
                    logGroupName=group, logStreamName=stream["logStreamName"], limit=_LOG_LINES
                )["events"]
                lines += [event["message"].rstrip() for event in events]
        return "\n".join(lines[-_LOG_LINES:])

    def tag(self, arn: str, tags: Mapping[str, str]) -> None:
        """Set tags of an endpoint."""
        self.client.add_tags(ResourceArn=arn, Tags=[{"Key": k, "Value": v} for k, v in tags.items()])

    def update(self, name: str, config: str, deployment: Mapping[str, Any] | None) -> None:
        """UpdateEndpoint. Raises `EndpointDeploymentFailed` if another change is in progress."""
        from botocore.exceptions import ClientError

        request: dict[str, Any] = {"EndpointName": name, "EndpointConfigName": config}
        if deployment:
            request["DeploymentConfig"] = dict(deployment)
        check_request("UpdateEndpoint", request)
        try:
            self.with_new_parts(self.client.update_endpoint, **request)
        except ClientError as error:
            if error_code(error) == "ValidationException" and "in-progress" in error_message(error):
                raise EndpointDeploymentFailed(f"endpoint {name} is being changed by somebody else") from error
            raise

    def config_tags(self, config: str) -> dict[str, str]:
        """Tags of a configuration; none if it does not exist."""
        found = if_found(self.client.describe_endpoint_config, EndpointConfigName=config)
        return tags_of(self.client, found["EndpointConfigArn"]) if found else {}

    def _listed(self, operation: str, kind: str, endpoint: str) -> Iterator[tuple[str, str]]:
        """Names and ARNs of all parts that may be the endpoint's; their tags decide."""
        found = pages(self.client, operation, f"{kind}s", NameContains=name_prefix(endpoint))
        for item in list(found):  # before anything is removed, which would shift the pages
            yield item[f"{kind}Name"], item[f"{kind}Arn"]
