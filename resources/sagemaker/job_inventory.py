"""The jobs in progress that a deployment has started, and how they are stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import dagster as dg

from resources.aws.ownership import belongs_to, created_here, tags_of
from resources.aws.tags import RUN_TAG
from resources.inventory import NotOwned, OwnedItem
from resources.sagemaker.job_files import LEASE, JobSettings
from resources.sagemaker.job_kinds import PROCESSING, TERMINAL, TRAINING, TUNING
from resources.sagemaker.job_run import stop_job
from resources.waiting import wait_until

_LEASE_SECONDS = 120.0  # several intervals of renewal


@dataclass(frozen=True)
class JobInventory:
    """Jobs that carry the tag of the settings' `job_root`. `stop_seconds`: how long one may take to end."""

    settings: JobSettings
    stop_seconds: float = 300.0

    def items(self) -> Iterator[OwnedItem]:
        """All in progress; tuning jobs first, because their training jobs end with them."""
        client = self.settings.client("sagemaker")
        for kind in (TUNING, TRAINING, PROCESSING):
            for found, tags in created_here(
                client,
                kind.list_operation,
                kind.summaries_member,
                kind.arn_member,
                self.settings.job_root,
                StatusEquals="InProgress",
            ):
                holder = self._lease_holder(found[kind.name_member])
                yield OwnedItem(
                    kind="job",
                    name=found[kind.name_member],
                    location=found[kind.arn_member],
                    created_at=found["CreationTime"],
                    run_id=tags.get(RUN_TAG),
                    temporary=holder is None,
                    detail=f"{kind.noun} in progress, lease held by {holder or 'nobody'}",
                )

    def remove(self, item: OwnedItem) -> None:
        """Stop the job and wait for its end. Raises `NotOwned`; `TimeoutError` if it does not end."""
        client = self.settings.client("sagemaker")
        kind = next(k for k in (TUNING, TRAINING, PROCESSING) if f":{k.resource}/" in item.location)
        if not belongs_to(tags_of(client, item.location), self.settings.job_root):
            raise NotOwned(f"{kind.noun} {item.name} was not started by this deployment; it is left alone")
        stop_job(kind, client, item.name, dg.get_dagster_logger(), min(60.0, self.stop_seconds))

        def ended() -> bool:
            description = kind.describe(client, item.name)
            return description is None or description[kind.status_member] in TERMINAL

        wait_until(ended, timeout=self.stop_seconds, interval=1.0, what=f"the end of {kind.noun} {item.name}")

    def _lease_holder(self, name: str) -> str | None:
        """The run that has renewed its lease on the job in the last two minutes."""
        found = self.settings.prefix(name).get(LEASE)
        if found is None:
            return None
        claim = json.loads(found[0])
        age = datetime.now(UTC) - datetime.fromisoformat(claim["renewed_at"])
        return f"run {claim['run_id']}" if age < timedelta(seconds=_LEASE_SECONDS) else None
