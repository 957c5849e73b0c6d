"""What lists and removes what the deployment has created: the list for teardown, sweep, prune and `make clean-data`.

Each resource has an inventory of what it made; the references of assets and generated data have one here.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from housing_assets.deployments import SourceLocation
from resources.inventory import KINDS, OwnedItem, expected_errors, remove_empty, remove_file
from resources.references.files import asset_folder, reference_files
from step_scripts.runner import storage
from step_scripts.runner.wording import counted, megabytes

RESOURCES = ("endpoint_host", "model_registry", "compute", "feature_store", "evidence")
_SAMPLE = re.compile(r"house_sales_\d+\.csv")
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Owner:
    """A part of the deployment that lists and removes what it has created."""

    name: str
    inventory: Callable[[], Sequence[OwnedItem]]
    remove: Callable[[OwnedItem], None]


@dataclass
class Findings:
    """What the owners have listed, and what could not be listed, with the reason."""

    items: list[tuple[Owner, OwnedItem]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


def resource_owners(resources: Any, names: Sequence[str]) -> list[Owner]:
    """Those of the deployment's resources, in this order."""
    return [Owner(name, getattr(resources, name).inventory, getattr(resources, name).remove) for name in names]


def owners_of(resources: Any, assets: Sequence[dg.AssetKey]) -> list[Owner]:
    """The deployment's resources, and the references and generated data that it keeps itself."""
    owners = resource_owners(resources, RESOURCES)
    references, location = resources.io_manager.root, resources.source_location
    owners.append(
        Owner(
            "references",
            lambda: _reference_items(references, assets),
            lambda item: _remove_references(references, item),
        )
    )
    owners.append(Owner("generated data", lambda: _samples(location), lambda item: _remove_sample(location, item)))
    return owners


def look(owners: Sequence[Owner], kinds: Sequence[str]) -> Findings:
    """Everything of these kinds, in the order of removal. An owner that cannot be asked does not hide the others."""
    findings = Findings()
    for owner in owners:
        try:
            findings.items += [(owner, item) for item in owner.inventory() if item.kind in kinds]
        except expected_errors() as error:
            findings.problems[owner.name] = f"{type(error).__name__}: {error}"
    findings.items.sort(key=lambda found: KINDS.index(found[1].kind))
    return findings


def protected_places(location: SourceLocation) -> list[str]:
    """Places of people's own files: the landing place, and the configured source up to its first wildcard."""
    places = [location.landing, location.source]
    return [_plain(_WILDCARD.split(place)[0]) for place in places if place]


def holds_protected(item: OwnedItem, protected: Sequence[str]) -> str | None:
    """The place of people's own files that the item is, or that lies in it."""
    own = _plain(item.location)
    return next((place for place in protected if (place + "/").startswith(own + "/")), None)


def _plain(uri: str) -> str:
    text = uri if storage.is_remote(uri) else str(storage.local_path(uri).absolute())
    return text.rstrip("/")


def _reference_items(root: str, assets: Sequence[dg.AssetKey]) -> list[OwnedItem]:
    """An item an asset: its reference files."""
    items = []
    for key, files in reference_files(root, assets).items():
        if files:
            detail = counted(len(files), "file")
            name, place = f"references of {key.to_user_string()}", asset_folder(root, key)
            created = datetime.fromtimestamp(min(files.values()), UTC)
            items.append(OwnedItem(kind="files", name=name, location=place, created_at=created, detail=detail))
    return items


def _remove_references(root: str, item: OwnedItem) -> None:
    key = dg.AssetKey(item.location.removeprefix(root.rstrip("/") + "/").split("/"))
    for uri in reference_files(root, [key])[key]:
        remove_file(uri)
    remove_empty(item.location, root)


def _samples(location: SourceLocation) -> list[OwnedItem]:
    """Files that the sample generator has written; not one that the configuration names as the source."""
    protected = protected_places(location)
    items = []
    for path, size, _ in storage.list_details(location.sample_folder):
        uri = storage.join(location.sample_folder, path)
        if _SAMPLE.fullmatch(path) and not any((_plain(uri) + "/").startswith(place + "/") for place in protected):
            items.append(OwnedItem(kind="files", name=path, location=uri, detail=f"generated, {megabytes(size)}"))
    return items


def _remove_sample(location: SourceLocation, item: OwnedItem) -> None:
    remove_file(item.location)
    remove_empty(location.sample_folder)


def remove_all(
    findings: Findings, protected: Sequence[str], log: Any
) -> tuple[list[OwnedItem], dict[str, str], dict[str, str]]:
    """Remove the items one after the other, whatever happens to one of them.

    Returns what was removed, what failed (location → reason), and what was kept because it holds people's own files.
    """
    removed: list[OwnedItem] = []
    failed: dict[str, str] = {}
    kept: dict[str, str] = {}
    for owner, item in findings.items:
        if place := holds_protected(item, protected):
            kept[item.location] = f"{place}, where your own files are, is in it"
            continue
        try:
            owner.remove(item)
        except expected_errors() as error:
            failed[item.location] = f"{type(error).__name__}: {error}"
            log.error(f"{item.kind} {item.name} could not be removed: {failed[item.location]}")
        else:
            removed.append(item)
            log.info(f"removed {item.kind} {item.name} ({item.location})")
    return removed, failed, kept
