"""Removing everything that the deployment has created: in its own environment, and nothing that merely looks like it.

What is removed: endpoints with their configurations and models, model packages and groups, feature groups, running
jobs, results of steps, references, evidence of checks, generated data. What stays: source files and the landing place,
logs in CloudWatch, Dagster's history, records in MLflow.
"""

import json
from typing import Any

import dagster as dg
from pydantic import Field

from housing_assets.maintenance.inventory import RESOURCES, CleanUp, Removable
from housing_assets.runs.executor import BUSY
from resources.compute.base import table
from resources.inventory import KINDS, ItemKind
from step_scripts.runner.wording import counted


class TeardownConfig(dg.Config):
    """What goes, and whether it is only listed."""

    dry_run: bool = Field(default=True, description="Only list what would be removed.")
    confirm: str = Field(
        default="", description="For a removal: the root of the deployment, word for word (the dry run shows it)."
    )
    kinds: list[str] = Field(
        default_factory=lambda: list(KINDS), description=f"What to remove: any of {', '.join(KINDS)}."
    )


@dg.op(required_resource_keys=set(RESOURCES))
def remove_everything(context: dg.OpExecutionContext, config: TeardownConfig) -> None:
    """List, and unless it is a dry run remove, what the deployment has created."""
    resources: Any = context.resources
    root = resources.io_manager.root.removesuffix("/references")
    kinds = _check(context, config, root)
    clean_up = CleanUp(context.log, dry_run=config.dry_run)
    kept = clean_up.remove_owned(resources, kinds)
    if config.dry_run:
        context.log.info(f"to remove it, launch teardown with dry_run: false and confirm: {json.dumps(root)}")
    else:
        clean_up.problems.clear()
        for one in clean_up.look(resources, RESOURCES, kinds):
            if one.place not in kept:
                clean_up.left.setdefault(one.place, (one, "it is still there"))
    metadata = {
        "dry_run": config.dry_run,
        "root": root,
        "items": len(clean_up.gone),
        "would_remove" if config.dry_run else "removed": table([_shown(one) for one in clean_up.gone]),
        "left": table([{**_shown(one), "why": why} for one, why in clean_up.left.values()]),
        "kept": dg.MetadataValue.json(kept),
    }
    clean_up.finish(context, f"removed: {counted(len(clean_up.gone), 'item')}; not removed", metadata)


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


def _shown(one: Removable) -> dict[str, str]:
    row = {"kind": one.kind, "name": one.name, "where": one.place, "detail": one.detail}
    if one.item is not None:
        row["created"] = one.item.created_at.isoformat(timespec="seconds") if one.item.created_at else ""
        row["run"] = one.item.run_id or ""
    return row


@dg.job
def teardown() -> None:
    """Remove everything that this deployment has created, in order; it may be repeated. Source files stay.

    A dry run by default: it lists what it would remove.
    """
    remove_everything()
