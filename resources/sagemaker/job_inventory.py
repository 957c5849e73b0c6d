"""The jobs in progress that a deployment has started, whoever attends to them, and how they are ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from resources.aws.ownership import belongs_to, is_absent, pages, tags_of
from resources.aws.tags import RUN_TAG
from resources.inventory import NotOwned, OwnedItem
from resources.sagemaker.job_files import JobPrefix
from resources.sagemaker.job_kinds import PROCESSING, TERMINAL, TRAINING, TUNING, JobKind
from resources.sagemaker.job_lease import LEASE
from resources.sagemaker.job_stop import stop_job

_LEASE_SECONDS = 120.0  # several intervals of renewal
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class JobInventory:
    """Jobs that carry the tag of `job_root`. `stop_seconds`: how long one may take to end."""

    client: Any
    s3: Any
    call: Callable[..., Any]
    job_root: str
    stop_seconds: float = 300.0

    def items(self) -> Iterator[OwnedItem]:
        """All in progress; tuning jobs first, because their training jobs end with them."""
        for kind in (TUNING, TRAINING, PROCESSING):
            listed = pages(
                self.call, kind.method(self.client, "list"), self._summaries(kind),
                StatusEquals="InProgress", MaxResults=100,
            )  # fmt: skip
            for found in list(listed):
                tags = tags_of(self.client, self.call, found[kind.arn_member])
                if belongs_to(tags, self.job_root):
                    holder = self._attended_by(found[kind.name_member])
                    yield OwnedItem(
                        kind="job",
                        name=found[kind.name_member],
                        location=found[kind.arn_member],
                        created_at=found["CreationTime"],
                        run_id=tags.get(RUN_TAG),
                        temporary=holder is None,
                        detail=f"{kind.noun} in progress, attended to by {holder or 'nobody'}",
                    )

    def remove(self, item: OwnedItem) -> None:
        """Stop the job and wait for its end. Raises `NotOwned`; `TimeoutError` if it does not end."""
        from botocore.exceptions import ClientError

        kind = next(k for k in (TUNING, TRAINING, PROCESSING) if f":{_resource(k)}/" in item.location)
        if not belongs_to(tags_of(self.client, self.call, item.location), self.job_root):
            raise NotOwned(f"{kind.noun} {item.name} was not started by this deployment; it is left alone")
        stop_job(kind, self.client, item.name, dg.get_dagster_logger(), min(60.0, self.stop_seconds))
        which: dict[str, Any] = {kind.name_member: item.name}
        deadline = time.monotonic() + self.stop_seconds
        while True:
            try:
                status = self.call(kind.method(self.client, "describe"), **which)[kind.status_member]
            except ClientError as error:
                if is_absent(error):
                    return
                raise
            if status in TERMINAL:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{kind.noun} {item.name} is still {status} after {self.stop_seconds:g} s")
            time.sleep(_POLL_SECONDS)

    @staticmethod
    def _summaries(kind: JobKind) -> str:
        return f"{kind.operation}Summaries"

    def _attended_by(self, name: str) -> str | None:
        """The run whose process has claimed the job in the last two minutes."""
        found = JobPrefix.of(self.s3, self.call, self.job_root, name).get(LEASE)
        if found is None:
            return None
        claim = json.loads(found[0])
        age = datetime.now(UTC) - datetime.fromisoformat(claim["renewed_at"])
        return f"run {claim['run_id']}" if age < timedelta(seconds=_LEASE_SECONDS) else None


def _resource(kind: JobKind) -> str:
    """How an ARN names the kind."""
    return {TUNING: "hyper-parameter-tuning-job", TRAINING: "training-job", PROCESSING: "processing-job"}[kind]
