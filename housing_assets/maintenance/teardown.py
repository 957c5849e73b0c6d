"""Removing everything that the deployment has created: in its own environment, and nothing that merely looks like it.

What is removed: endpoints with their configurations and models, model packages and groups, feature groups, running
jobs, results of steps, references, evidence of checks, generated data. What stays: source files and the landing place,
logs in CloudWatch, Dagster's history, records in MLflow.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import dagster as dg
from pydantic import Field

from housing_assets.deployments import SourceLocation
from resources.compute.base import table
from resources.inventory import KINDS, ItemKind, OwnedItem, remove_empty, remove_file
from resources.references.files import asset_folder, reference_files
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.wording import counted, megabytes

RESOURCES = ("endpoint_host", "model_registry", "compute", "feature_store", "evidence")
_SAMPLE = re.compile(r"house_sales_\d+\.csv")
_WILDCARD = re.compile(r"[*?\[]")
BUSY = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


class TeardownConfig(dg.Config):
    """What goes, and whether it is only listed."""

    dry_run: bool = Field(default=True, description="Only list what would be removed.")
    confirm: str = Field(
        default="", description="For a removal: the root of the deployment, word for word (the dry run shows it)."
    )
    kinds: list[str] = Field(
        default_factory=lambda: list(KINDS), description=f"What to remove: any of {', '.join(KINDS)}."
    )


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


def expected_errors() -> tuple[type[Exception], ...]:
    """What a removal may fail with without being a fault of the program."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:  # the local deployment needs no boto3
        return (OSError, RuntimeError, ValueError, LookupError, StepError)
    return (OSError, RuntimeError, ValueError, LookupError, StepError, BotoCoreError, ClientError)


def asset_keys() -> list[dg.AssetKey]:
    """All assets of the code location."""
    from housing_assets.definitions import defs  # which imports this module

    return sorted(defs.resolve_asset_graph().get_all_asset_keys())


def owners_of(resources: Any, assets: Sequence[dg.AssetKey]) -> list[Owner]:
    """The deployment's resources, and the references and generated data that it keeps itself."""
    owners = [Owner(name, getattr(resources, name).inventory, getattr(resources, name).remove) for name in RESOURCES]
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


@dg.op(required_resource_keys={*RESOURCES, "io_manager", "source_location"})
def remove_everything(context: dg.OpExecutionContext, config: TeardownConfig) -> None:
    """List, and unless it is a dry run remove, what the deployment has created."""
    resources: Any = context.resources
    root = resources.io_manager.root.removesuffix("/references")
    kinds = _check(context, config, root)
    owners = owners_of(resources, asset_keys())
    protected = protected_places(resources.source_location)
    findings = look(owners, kinds)
    if config.dry_run:
        for _, item in findings.items:
            context.log.info(f"would remove {item.kind} {item.name} ({item.location}): {item.detail}")
        context.log.info(f"to remove it, launch teardown with dry_run: false and confirm: {json.dumps(root)}")
        context.add_output_metadata(
            {
                "dry_run": True,
                "root": root,
                "items": len(findings.items),
                "would_remove": table([_shown(item) for _, item in findings.items]),
                "could_not_be_listed": dg.MetadataValue.json(findings.problems),
            }
        )
        return
    removed, failed, kept = remove_all(findings, protected, context.log)
    after = look(owners, kinds)
    there = {item.location: item for _, item in after.items if item.location not in kept}
    # What could not be removed whole may be found under another place, or not at all: it counts in any case.
    there |= {item.location: item for _, item in findings.items if item.location in failed}
    left = [{**_shown(item), "why": failed.get(place, "it is still there")} for place, item in there.items()]
    metadata = {
        "dry_run": False,
        "root": root,
        "items": len(removed),
        "removed": table([_shown(item) for item in removed]),
        "left": table(left),
        "kept": dg.MetadataValue.json(kept),
        "could_not_be_listed": dg.MetadataValue.json(after.problems),
    }
    if left or after.problems:
        names = [f"{row['kind']} {row['name']}: {row['why']}" for row in left]
        names += [f"{owner}: {problem}" for owner, problem in after.problems.items()]
        raise dg.Failure(
            f"removed: {counted(len(removed), 'item')}; not removed: {'; '.join(names)}. Remove the reason, then run "
            "teardown again",
            metadata=metadata,
            allow_retries=False,
        )
    context.add_output_metadata(metadata)


def _check(context: dg.OpExecutionContext, config: TeardownConfig, root: str) -> list[ItemKind]:
    """The kinds to remove. Raises `dagster.Failure` for a removal that is not confirmed, or while other runs write."""
    if unknown := sorted(set(config.kinds) - set(KINDS)):
        raise dg.Failure(f"teardown.kinds: {', '.join(unknown)}; choose any of {', '.join(KINDS)}", allow_retries=False)
    if not config.dry_run:
        if config.confirm.rstrip("/") != root.rstrip("/"):
            raise dg.Failure(
                f"nothing was removed: confirm must be {root!r}, not {config.confirm!r}", allow_retries=False
            )
        busy = context.instance.get_runs(dg.RunsFilter(statuses=BUSY), limit=20)
        if others := [run.run_id[:8] for run in busy if run.run_id != context.run_id]:
            raise dg.Failure(
                f"nothing was removed: runs {', '.join(others)} are in progress and would create things anew. "
                "Terminate them, or wait",
                allow_retries=False,
            )
    return [kind for kind in KINDS if kind in config.kinds]


def _shown(item: OwnedItem) -> dict[str, str]:
    created = item.created_at.isoformat(timespec="seconds") if item.created_at else ""
    return {
        "kind": item.kind,
        "name": item.name,
        "where": item.location,
        "created": created,
        "run": item.run_id or "",
        "detail": item.detail,
    }


@dg.job
def teardown() -> None:
    """Remove everything that this deployment has created, in order; it may be repeated. Source files stay.

    A dry run by default: it lists what it would remove.
    """
    remove_everything()
