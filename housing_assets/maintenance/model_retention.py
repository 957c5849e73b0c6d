"""Which registered model versions may go: old ones that are not served, rolled back to, compared with or waiting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from resources.endpoints.base import EndpointHost
from resources.inventory import OwnedItem, expected_errors
from resources.model_registry.base import ModelRegistry, ModelVersion, champion_of


@dataclass
class VersionsFound:
    """Versions beyond the newest ones: those that may go, with the registry's item, and those that stay, with why.

    `problems`: groups and versions that cannot be read, with the reason.
    """

    surplus: list[tuple[ModelVersion, OwnedItem]] = field(default_factory=list)
    kept: list[tuple[ModelVersion, str]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


def find_versions(
    registry: ModelRegistry,
    endpoint_host: EndpointHost,
    referenced: set[str],
    *,
    newest: int,
    pending_since: datetime,
) -> VersionsFound:
    """Look through all groups of the registry. `referenced`: URIs that assets refer to.

    Beyond the `newest` versions of a group stay: the latest approved one, the champion that it is compared with, what
    an endpoint serves or would go back to, what an asset refers to, and what waits for a decision `pending_since`
    that time or later. Raises what registry and host do if they cannot be asked.
    """
    listed = (item for item in registry.inventory() if item.kind == "model_package" and not item.discarded)
    items = {item.name: item for item in listed}
    served = served_versions(endpoint_host)
    found = VersionsFound()
    for group in sorted({name.rpartition("/")[0] for name in items}):
        try:
            versions = registry.list(group, damaged=found.problems)
        except expected_errors() as error:
            found.problems[group] = f"{type(error).__name__}: {error}"
            continue
        reasons = {**_pending(versions, pending_since), **_referenced(versions, referenced), **_compared(versions)}
        reasons |= served
        for version in [v for v in versions if v.reference in items][:-newest]:
            if version.reference in reasons:
                found.kept.append((version, reasons[version.reference]))
            else:
                found.surplus.append((version, items[version.reference]))
    return found


def registered_versions(registry: ModelRegistry) -> list[ModelVersion]:
    """All versions of all groups. Raises what the registry does if one cannot be read."""
    groups = {item.name for item in registry.inventory() if item.kind == "model_package_group"}
    return [version for group in sorted(groups) for version in registry.list(group)]


def served_versions(endpoint_host: EndpointHost) -> dict[str, str]:
    """Versions that endpoints serve, or would go back to, with the reason to keep them."""
    endpoints = endpoint_host.list()
    back = {s.previous_version: f"endpoint {s.name} goes back to it" for s in endpoints if s.previous_version}
    return {**back, **{s.version: f"endpoint {s.name} serves it" for s in endpoints}}


def _compared(versions: Sequence[ModelVersion]) -> Mapping[str, str]:
    champion = champion_of(versions, "")
    if champion is None:
        return {}
    before = champion_of(versions, champion.artifact.digest)
    others = {before.reference: "the latest approved version is compared with it"} if before else {}
    return {**others, champion.reference: "it is the latest approved version"}


def _referenced(versions: Sequence[ModelVersion], referenced: set[str]) -> Mapping[str, str]:
    return {
        version.reference: "an asset refers to it"
        for version in versions
        if any((uri + "/").startswith(version.artifact.uri + "/") for uri in referenced)
    }


def _pending(versions: Sequence[ModelVersion], since: datetime) -> Mapping[str, str]:
    return {
        version.reference: "it waits for a decision"
        for version in versions
        if version.status == "PendingManualApproval" and version.created_at >= since
    }
