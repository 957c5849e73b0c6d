"""Finds the job that does a piece of work already: by its name, or among those that other runs have left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from resources.aws.calls import error_code, is_missing
from resources.aws.tags import RUN_TAG, WORK_TAG
from resources.sagemaker.job_kinds import JobKind
from resources.sagemaker.job_lease import JobLease
from resources.sagemaker.job_names import JobName


@dataclass(frozen=True)
class FoundJob:
    """The name to use, and the description of the job that has it; `None` if it is to be started."""

    name: str
    description: dict[str, Any] | None = None


class JobSearch:
    """Looks for jobs of one kind that do the work with the digest `work`."""

    def __init__(self, kind: JobKind, client: Any, call: Callable[..., Any], work: str) -> None:
        self._kind = kind
        self._client = client
        self._call = call
        self._work = work

    def describe(self, name: str) -> dict[str, Any] | None:
        """The job's description; `None` if there is no such job."""
        from botocore.exceptions import ClientError

        try:
            which: dict[str, Any] = {self._kind.name_member: name}
            return self._call(self._kind.method(self._client, "describe"), **which)
        except ClientError as error:
            if is_missing(error):
                return None
            raise

    def tags(self, description: Mapping[str, Any]) -> dict[str, str]:
        """The job's tags."""
        found: dict[str, str] = {}
        token: str | None = None
        while True:
            params: dict[str, Any] = {"NextToken": token} if token else {}
            answer = self._call(self._client.list_tags, ResourceArn=description[self._kind.arn_member], **params)
            found |= {tag["Key"]: tag["Value"] for tag in answer["Tags"]}
            token = answer.get("NextToken")
            if not token:
                return found

    def is_ours(self, description: Mapping[str, Any] | None) -> bool:
        """Whether the job exists and does this work."""
        return description is not None and self.tags(description).get(WORK_TAG) == self._work

    def of_run(
        self, names: JobName, run_id: str, completed_after: datetime | None, has_closed: Callable[[str], bool]
    ) -> FoundJob:
        """The first attempt that is running or has completed, or the first free name.

        A completed job counts if it closed its Pipes session in order, and was started by this run (a retry of the
        step) or ended after `completed_after`.
        """
        for name in names.attempts():
            description = self.describe(name)
            if description is None:
                return FoundJob(name)
            tags = self.tags(description)
            status = description[self._kind.status_member]
            if tags.get(WORK_TAG) != self._work:
                continue
            if status == "InProgress":
                return FoundJob(name, description)
            if status == "Completed":
                ended = description.get(self._kind.ended) or description["LastModifiedTime"]
                fresh = completed_after is None or ended >= completed_after
                if (fresh or tags.get(RUN_TAG) == run_id) and has_closed(name):
                    return FoundJob(name, description)
        raise RuntimeError(f"no name is left for another attempt of {names.base}")

    def orphan(self, names: JobName, lease: Callable[[str], JobLease], say: Callable[[str], None]) -> FoundJob | None:
        """A running job of another run that does the same work and whose Dagster process is gone."""
        from botocore.exceptions import ClientError

        try:
            answer = self._call(
                self._kind.method(self._client, "list"),
                NameContains=names.work,
                StatusEquals="InProgress",
                MaxResults=20,
            )
        except ClientError as error:
            if error_code(error) not in ("AccessDeniedException", "AccessDenied"):
                raise
            say(f"{error}; jobs that killed runs left behind are not looked for")
            return None
        for summary in answer[f"{self._kind.operation}Summaries"]:
            name = summary[self._kind.name_member]
            description = self.describe(name)
            if description is None or not self.is_ours(description):
                continue
            say(f"{self._kind.noun} {name} of another run does the same work; finding out whether it is attended to")
            if lease(name).adopt():
                return FoundJob(name, description)
        return None
