"""The jobs in progress that a deployment has started, and how they are stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import dagster as dg

from resources.aws.ownership import RUN_TAG, belongs_to, created_here, tags_of
from resources.inventory import NotOwned, OwnedItem
from resources.sagemaker.job_files import LEASE, JobSettings
from resources.sagemaker.job_kinds import PROCESSING, TERMINAL, TRAINING, TUNING
from resources.sagemaker.job_run import stop_job
from resources.waiting import wait_until

_LEASE_SECONDS = 120.0  # several intervals of renewal
_STOP_SECONDS = 300.0


def jobs_in_progress(settings: JobSettings) -> Iterator[OwnedItem]:
    """Those with the tag of the settings' `job_root`. Tuning jobs first, because their training jobs end with them."""
    client = settings.client("sagemaker")
    for kind in (TUNING, TRAINING, PROCESSING):
        name, arn = kind.member("Name"), kind.member("Arn")
        listing = (f"list_{kind.method_name}s", kind.member("Summaries"), arn)
        for found, tags in created_here(client, *listing, settings.job_root, StatusEquals="InProgress"):
            holder = _lease_holder(settings, found[name])
            yield OwnedItem(
                kind="job",
                name=found[name],
                location=found[arn],
                created_at=found["CreationTime"],
                run_id=tags.get(RUN_TAG),
                temporary=holder is None,
                detail=f"{kind.noun} in progress, lease held by {holder or 'nobody'}",
            )


def remove_job(settings: JobSettings, item: OwnedItem) -> None:
    """Stop the job and wait for its end. Raises `NotOwned`; `TimeoutError` if it does not end."""
    client = settings.client("sagemaker")
    kind = next(k for k in (TUNING, TRAINING, PROCESSING) if f":{k.method_name.replace('_', '-')}/" in item.location)
    if not belongs_to(tags_of(client, item.location), settings.job_root):
        raise NotOwned(f"{kind.noun} {item.name} was not started by this deployment; it is left alone")
    stop_job(kind, client, item.name, dg.get_dagster_logger(), 60.0)

    def ended() -> bool:
        job = kind.describe(client, item.name)
        return job is None or job.status in TERMINAL

    wait_until(ended, timeout=_STOP_SECONDS, interval=1.0, what=f"the end of {kind.noun} {item.name}")


def _lease_holder(settings: JobSettings, name: str) -> str | None:
    """The run that has renewed its lease on the job in the last two minutes."""
    found = settings.prefix(name).get(LEASE)
    if found is None:
        return None
    claim = json.loads(found[0])
    age = datetime.now(UTC) - datetime.fromisoformat(claim["renewed_at"])
    return f"run {claim['run_id']}" if age.total_seconds() < _LEASE_SECONDS else None
