"""Finds what costs money or memory although the run that needs it is gone: jobs, candidates of endpoints, processes.

Each finding is reported once, and again if it changes or is still there after `repeat_hours`. What was reported is kept
with the findings, in one observation of `abandoned` a sweep; so the UI also plots their number over time.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
from pydantic import Field

from housing_assets.checks.alerts import NOTIFIED, send
from housing_assets.maintenance.inventory import CleanUp
from housing_assets.runs.executor import BUSY
from housing_assets.settings import Settings
from resources.compute.base import table
from resources.inventory import OwnedItem

_OWNERS = ("compute", "endpoint_host")
_KINDS = ("job", "endpoint")
_SETTINGS = Settings.load()
_FINDINGS = dg.AssetKey("abandoned")
_LOOK_BACK = 20  # observations; deployments that share an instance have theirs among them
_CANDIDATE_AGE = timedelta(hours=1)  # a deployment waits that long for an endpoint to start, and more


class SweepConfig(dg.Config):
    """What is abandoned, and what happens to it."""

    stop: bool = Field(default=False, description="Stop and remove what is abandoned. Off: only report it.")
    minutes: float = Field(default=10.0, ge=0, description="What is younger than this is left to its run; minutes.")
    repeat_hours: float = Field(
        default=_SETTINGS.repeat_hours, ge=0, description="What is still there after so many hours is reported again."
    )


def abandoned(
    items: Sequence[OwnedItem], instance: dg.DagsterInstance, before: datetime, own: Sequence[str] = ()
) -> list[tuple[OwnedItem, str]]:
    """Those temporary items, made `before`, whose run is gone or has ended; with the reason.

    Something that names no run (the candidate of an endpoint) may be that of any run in progress, also of another
    Dagster instance: it is abandoned if there is none here, and it is an hour old.
    """
    found = []
    busy = instance.get_runs_count(dg.RunsFilter(statuses=[*BUSY])) > len(own)
    for item in items:
        if not item.temporary or (item.created_at is not None and item.created_at > before):
            continue
        if item.run_id is None:
            if not busy and (item.created_at is None or item.created_at <= before - _CANDIDATE_AGE):
                found.append((item, "no run is in progress that could need it"))
            continue
        run = instance.get_run_by_id(item.run_id)
        if run is None:
            found.append((item, f"run {item.run_id} is not known here"))
        elif run.is_finished:
            found.append((item, f"run {item.run_id} is {run.status.value}"))
    return found


def unreported(
    lines: Mapping[str, str], reported: Mapping[str, tuple[str, datetime]], before: datetime
) -> dict[str, str]:
    """Those findings (place → what is said of it) that are new, have changed, or were reported `before` that time.

    `reported`: what was said of each place, and when.
    """
    known = {place: what for place, (what, at) in reported.items() if at > before}
    return {place: what for place, what in lines.items() if known.get(place) != what}


@dg.op(required_resource_keys={*_OWNERS, "io_manager", "notifier"})
def sweep_abandoned(context: dg.OpExecutionContext, config: SweepConfig) -> None:
    """Report, and if configured stop, jobs and endpoints whose run is gone. Notify about new findings."""
    clean_up = CleanUp(context.log)
    found = clean_up.look(context.resources, _OWNERS, _KINDS)
    before = datetime.now(UTC) - timedelta(minutes=config.minutes)
    chosen = abandoned([one.item for one in found if one.item], context.instance, before, [context.run_id])
    if config.stop:
        places = {item.location for item, _ in chosen}
        clean_up.remove([one for one in found if one.place in places])
    rows: list[dict[str, Any]] = []
    lines: dict[str, str] = {}
    for item, why in chosen:
        _, failed = clean_up.left.get(item.location, (None, None))
        outcome = f"could not be stopped: {failed}" if failed else "stopped" if config.stop else "reported"
        row = {"kind": item.kind, "name": item.name, "where": item.location, "detail": item.detail, "why": why}
        rows.append({**row, "outcome": outcome})
        lines[item.location] = f"{item.kind} {item.name} ({item.detail}): {why}; {outcome}"
        context.log.warning(lines[item.location])
    lines |= {name: f"{name} could not be asked: {reason}" for name, reason in clean_up.problems.items()}
    metadata = {
        "looked_at": len(found),
        "abandoned": len(rows),
        "found": table(rows),
        NOTIFIED: _notify(context, config, rows, lines, all_known=not clean_up.problems),
    }
    clean_up.finish(context, "the sweep is incomplete", metadata)


def _notify(
    context: dg.OpExecutionContext, config: SweepConfig, rows: list[Any], lines: dict[str, str], *, all_known: bool
) -> int:
    """Send one message of what is new, if anything is, and record it. Returns the number of its lines."""
    now, root = datetime.now(UTC), context.resources.io_manager.root
    known = _remembered(context.instance, root)
    fresh = unreported(lines, known, now - timedelta(hours=config.repeat_hours))
    title = f"{len(rows)} abandoned jobs or endpoints, {len(fresh)} new or changed"
    if fresh and send(context.resources.notifier, title, list(fresh.values()), context.log):
        fresh = {}
    # What could not be listed this time may still be there.
    reported = {place: known[place] for place in known if place in lines or not all_known}
    reported |= {place: (what, now) for place, what in fresh.items()}
    context.log_event(
        dg.AssetObservation(
            _FINDINGS,
            description="What the sweep found; each finding is reported once.",
            metadata={
                "root": root,
                "abandoned": len(rows),
                "found": table(rows),
                "reported": dg.MetadataValue.json(
                    {place: {"what": what, "at": at.isoformat()} for place, (what, at) in reported.items()}
                ),
            },
        )
    )
    return len(fresh)


def _remembered(instance: dg.DagsterInstance, root: str) -> dict[str, tuple[str, datetime]]:
    """What was reported by the last sweep of the deployment at `root`, and when."""
    for record in instance.fetch_observations(_FINDINGS, limit=_LOOK_BACK).records:
        observation = record.asset_observation
        if observation is not None and observation.metadata.get("root") == dg.MetadataValue.text(root):
            try:
                stored: Any = observation.metadata["reported"].value
                return {place: (r["what"], datetime.fromisoformat(r["at"])) for place, r in stored.items()}
            except (AttributeError, LookupError, TypeError, ValueError):  # of another version: reported once more
                continue
    return {}


@dg.job
def sweep() -> None:
    """Find jobs, candidates of endpoints and processes whose run is gone. They are stopped only if `stop` says so."""
    sweep_abandoned()


hourly_sweep = dg.ScheduleDefinition(
    name="hourly_sweep",
    job=sweep,
    cron_schedule="17 * * * *",
    execution_timezone=_SETTINGS.timezone,
    description="Looks every hour for jobs and endpoints whose run is gone, and reports each once a day at most.",
)
