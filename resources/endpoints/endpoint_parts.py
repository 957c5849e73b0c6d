"""Endpoints, endpoint configurations and models on SageMaker, as far as this project created them."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from resources.aws.calls import already_exists, error_code, error_message, if_found, pages
from resources.aws.ownership import belongs_to, created_here, is_ours, tags_of
from resources.aws.request_validation import check_request
from resources.endpoints.base import EndpointDeploymentFailed, EndpointNotFound, InvocationFailed
from resources.endpoints.endpoint_requests import CANDIDATE, Tag, name_prefix
from resources.inventory import ItemKind, NotOwned, OwnedItem
from resources.model_registry.base import ModelVersion
from resources.model_registry.model_packages import find_package
from resources.waiting import wait_until

MOVING = ("Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting")
BROKEN = ("Failed", "OutOfService")
MEMBERS: dict[ItemKind, str] = {"endpoint": "Endpoint", "endpoint_config": "EndpointConfig", "model": "Model"}
_PART = re.compile(r".+-[0-9a-f]{12}")  # names that `part_name` makes; only of these the tags are asked for
_LOG_LINES = 15
_SHOWN = 2000  # characters of an answer in an error
_CONSISTENCY_SECONDS = 30.0  # SageMaker may not find for a moment what has just been created


@dataclass(frozen=True)
class FoundEndpoint:
    """An endpoint as DescribeEndpoint has it, its tags, and those of the configuration that it serves with."""

    status: str
    config: str
    description: Mapping[str, Any]
    tags: Mapping[str, str]
    config_tags: Mapping[str, str]


@dataclass(frozen=True)
class EndpointParts:
    """Calls on endpoints and what they are made of. `poll_seconds`: shortest interval between two polls."""

    client: Any
    logs: Any
    runtime: Any
    poll_seconds: float

    def describe(self, kind: ItemKind, name: str) -> dict[str, Any] | None:
        """What has that name, whoever created it; None if there is nothing."""
        return if_found(getattr(self.client, f"describe_{kind}"), **{f"{MEMBERS[kind]}Name": name})

    def tags(self, kind: ItemKind, name: str) -> dict[str, str]:
        """The tags of what has that name; none if there is nothing."""
        described = self.describe(kind, name)
        return tags_of(self.client, described[f"{MEMBERS[kind]}Arn"]) if described else {}

    def find(self, name: str) -> FoundEndpoint | None:
        """The endpoint, whoever created it; None if there is none."""
        described = self.describe("endpoint", name)
        if described is None:
            return None
        tags, config = tags_of(self.client, described["EndpointArn"]), described["EndpointConfigName"]
        config_tags = self.tags("endpoint_config", config) if is_ours(tags) else {}
        return FoundEndpoint(described["EndpointStatus"], config, described, tags, config_tags)

    def find_ours(self, name: str) -> FoundEndpoint | None:
        """The endpoint, if this project created it and it is no candidate."""
        found = self.find(name)
        return found if found and is_ours(found.tags) and found.tags.get(Tag.ROLE) != CANDIDATE else None

    def container(self, version: ModelVersion, image: str | None) -> dict[str, Any]:
        """The container that serves the version. Raises `EndpointDeploymentFailed` if SageMaker does not know it."""
        package = find_package(self.client, version.group, version.version)
        if package is None:
            region = self.client.meta.region_name
            raise EndpointDeploymentFailed(
                f"SageMaker's model registry has no {version.reference} in {region}: register it there"
            )
        if not image:
            return {"ModelPackageName": package["ModelPackageArn"]}
        archive = package["InferenceSpecification"]["Containers"][0]["ModelDataUrl"]
        return {"Image": image, "ModelDataUrl": archive}

    def create(self, kind: ItemKind, request: Mapping[str, Any]) -> str:
        """Create it; what has that name and was created by this project is used as it is. Returns the name."""
        from botocore.exceptions import ClientError

        member = MEMBERS[kind]
        name = request[f"{member}Name"]
        check_request(f"Create{member}", request)
        try:
            self.with_new_parts(getattr(self.client, f"create_{kind}"), **request)
        except ClientError as error:
            if not already_exists(error):
                raise
            if not is_ours(self.tags(kind, name)):
                raise EndpointDeploymentFailed(
                    f"{name} exists and was not created by this project; it is left alone. Choose another endpoint name"
                ) from error
        return name

    def with_new_parts(self, function: Callable[..., Any], **params: Any) -> Any:
        """A call that names what may have been created a moment ago: not found is waited out for some seconds."""
        with contextlib.suppress(TimeoutError):
            found = partial(if_found, function, **params)
            return wait_until(found, timeout=_CONSISTENCY_SECONDS, interval=1.0, what="the appearance of the parts")
        return function(**params)

    def settled(self, name: str, seconds: float, log: logging.Logger, *, is_new: bool = False) -> FoundEndpoint | None:
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

    def delete(self, kind: ItemKind, name: str) -> None:
        """Remove it, which must be this project's. Nothing happens if it is gone."""
        if_found(getattr(self.client, f"delete_{kind}"), **{f"{MEMBERS[kind]}Name": name})

    def delete_endpoint(self, name: str, seconds: float, log: logging.Logger) -> None:
        """Remove the endpoint, which must be this project's, and wait until it is gone."""
        if self.settled(name, seconds, log) is not None:
            self.delete("endpoint", name)
            self.settled(name, seconds, log)

    def delete_parts(self, endpoint: str, keep_configs: set[str], *, candidates: bool = False) -> list[str]:
        """Remove the configurations and models that were created for the endpoint and are not needed any more.

        Kept are `keep_configs`, and the models that they name. Configurations of candidates are left to those who
        test them, unless `candidates`. Returns what was removed.
        """
        configs, needed = [], set[str]()
        for name, tags in self.made_for(endpoint, "endpoint_config"):
            if name in keep_configs or (tags.get(Tag.ROLE) == CANDIDATE and not candidates):
                described = self.describe("endpoint_config", name) or {}
                needed |= {v["ModelName"] for v in described.get("ProductionVariants", []) if "ModelName" in v}
            else:
                configs.append(name)
                self.delete("endpoint_config", name)
        models = [name for name, _ in self.made_for(endpoint, "model") if name not in needed]
        for name in models:
            self.delete("model", name)
        return configs + models

    def delete_candidates(self, endpoint: str, seconds: float, log: logging.Logger, *, older_than: float) -> None:
        """Remove candidates of the endpoint that interrupted deployments left, if they are `older_than` seconds."""
        for name, tags in self.made_for(endpoint, "endpoint"):
            found = self.find(name) if tags.get(Tag.ROLE) == CANDIDATE else None
            if found is not None and time.time() - found.description["CreationTime"].timestamp() >= older_than:
                log.info(f"Removing endpoint {name}, which an earlier deployment left.")
                self.delete_endpoint(name, seconds, log)
                self.delete("endpoint_config", found.config)

    def made_for(self, endpoint: str, kind: ItemKind) -> Iterator[tuple[str, dict[str, str]]]:
        """Names and tags of what this project created for the endpoint."""
        member = MEMBERS[kind]
        # All are listed before anything is removed, which would shift the pages. Others' names may begin like these.
        for item in [*pages(self.client, f"list_{kind}s", f"{member}s", NameContains=name_prefix(endpoint))]:
            tags = tags_of(self.client, item[f"{member}Arn"])
            if is_ours(tags) and tags.get(Tag.ENDPOINT) == endpoint:
                yield item[f"{member}Name"], tags

    def items(self, kind: ItemKind, root: str) -> Iterator[OwnedItem]:
        """Everything of the kind that carries the tag of `root`, candidates too."""
        member, is_endpoint = MEMBERS[kind], kind == "endpoint"

        def may_be_ours(found: Mapping[str, Any]) -> bool:
            return is_endpoint or _PART.fullmatch(found[f"{member}Name"]) is not None

        listed = created_here(self.client, f"list_{kind}s", f"{member}s", f"{member}Arn", root, may_be_ours)
        for found, tags in listed:
            endpoint, version = tags.get(Tag.ENDPOINT), tags.get(Tag.VERSION, "")
            temporary = is_endpoint and tags.get(Tag.ROLE) == CANDIDATE
            what = f"candidate for {endpoint}" if temporary else "serves"
            yield OwnedItem(
                kind=kind,
                name=found[f"{member}Name"],
                location=found[f"{member}Arn"],
                created_at=found["CreationTime"],
                temporary=temporary,
                detail=f"{found['EndpointStatus']}, {what} {version}" if is_endpoint else f"of {endpoint}, {version}",
            )

    def remove(self, item: OwnedItem, root: str, seconds: float, log: logging.Logger) -> None:
        """Remove what `items` has listed. Raises `NotOwned` if what has that name is another's."""
        kind = item.kind
        if self.describe(kind, item.name) is None:
            return
        if not belongs_to(self.tags(kind, item.name), root):
            raise NotOwned(f"{kind} {item.name} was not created by this deployment; it is left alone")
        if kind == "endpoint":
            self.delete_endpoint(item.name, seconds, log)
        else:
            self.delete(kind, item.name)

    def send(self, name: str, body: bytes, content_type: str, accept: str, inference_id: str) -> bytes:
        """The answer of the endpoint, whoever created it.

        Raises `EndpointNotFound`, or `InvocationFailed` with the container's answer.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        given: dict[str, Any] = {"EndpointName": name, "Body": body, "ContentType": content_type, "Accept": accept}
        if inference_id:
            given["InferenceId"] = inference_id
        try:
            return self.runtime.invoke_endpoint(**given)["Body"].read()
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

    def log_tail(self, name: str, since: datetime) -> str:
        """The last lines of the containers that started after `since`, for an error; empty if there are none."""
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
        shown = "\n".join(lines[-_LOG_LINES:])
        return f"\nEnd of the containers' log ({group}):\n{shown}" if shown else ""
