"""Which endpoints, endpoint configurations and models of an account a host has created, and their removal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from resources.aws.calls import if_found
from resources.aws.ownership import belongs_to, created_here, tags_of
from resources.endpoints.base import DeploymentLog
from resources.endpoints.endpoint_parts import EndpointParts
from resources.endpoints.endpoint_requests import CANDIDATE, ENDPOINT_TAG, ROLE_TAG, VERSION_TAG
from resources.inventory import NotOwned, OwnedItem

_PART = re.compile(r".+-[0-9a-f]{12}")  # names that `part_name` makes; only of these the tags are asked for


@dataclass(frozen=True)
class EndpointInventory:
    """What carries the tag of `root`."""

    parts: EndpointParts
    root: str
    removal_seconds: float

    def items(self) -> Iterator[OwnedItem]:
        """Endpoints with their candidates, configurations, models."""
        client = self.parts.client
        for found, tags in created_here(client, "list_endpoints", "Endpoints", "EndpointArn", self.root):
            temporary = tags.get(ROLE_TAG) == CANDIDATE
            what = f"candidate for {tags.get(ENDPOINT_TAG)}" if temporary else "serves"
            yield OwnedItem(
                kind="endpoint",
                name=found["EndpointName"],
                location=found["EndpointArn"],
                created_at=found["CreationTime"],
                temporary=temporary,
                detail=f"{found['EndpointStatus']}, {what} {tags.get(VERSION_TAG, '')}",
            )
        yield from self._parts_of("endpoint_config", "list_endpoint_configs", "EndpointConfig")
        yield from self._parts_of("model", "list_models", "Model")

    def remove(self, item: OwnedItem, log: DeploymentLog) -> None:
        """Remove one of them. Raises `NotOwned` if what has that name is another's."""
        client = self.parts.client
        describe, member = {
            "endpoint": (client.describe_endpoint, "Endpoint"),
            "endpoint_config": (client.describe_endpoint_config, "EndpointConfig"),
            "model": (client.describe_model, "Model"),
        }[item.kind]
        described = if_found(describe, **{f"{member}Name": item.name})
        if described is None:
            return
        if not belongs_to(tags_of(client, described[f"{member}Arn"]), self.root):
            raise NotOwned(f"{item.kind} {item.name} was not created by this deployment; it is left alone")
        if item.kind == "endpoint":
            self.parts.remove_endpoint(item.name, self.removal_seconds, log)
        elif item.kind == "endpoint_config":
            self.parts.remove_config(item.name)
        else:
            if_found(client.delete_model, ModelName=item.name)

    def _parts_of(self, kind: Any, operation: str, member: str) -> Iterator[OwnedItem]:
        def is_part(summary: Mapping[str, Any]) -> bool:
            return _PART.fullmatch(summary[f"{member}Name"]) is not None

        client = self.parts.client
        for found, tags in created_here(client, operation, f"{member}s", f"{member}Arn", self.root, is_part):
            yield OwnedItem(
                kind=kind,
                name=found[f"{member}Name"],
                location=found[f"{member}Arn"],
                created_at=found["CreationTime"],
                detail=f"of endpoint {tags.get(ENDPOINT_TAG)}, {tags.get(VERSION_TAG)}",
            )
