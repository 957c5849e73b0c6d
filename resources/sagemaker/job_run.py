"""One piece of work as one job of any kind: found again instead of started twice, polled, stopped if the run ends."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import dagster as dg

from resources.aws.calls import error_code, is_transient
from resources.aws.ownership import RUN_TAG, WORK_TAG, asset_names, owned, root_tags, run_tags, tags_of
from resources.aws.request_validation import check_request
from resources.sagemaker import jobs
from resources.sagemaker.job_files import (
    BOOTSTRAP,
    LEASE,
    SHORT_RETRY_SECONDS,
    JobInputs,
    JobLease,
    JobPrefix,
    JobSettings,
)
from resources.sagemaker.job_reports import start_failure, status_lines
from resources.sagemaker.jobs import TERMINAL, TUNING, Job, JobKind
from resources.waiting import wait_until

Context = dg.OpExecutionContext | dg.AssetExecutionContext


class JobRun:
    """The job that does a piece of work for a step of a Dagster run: `job` is the one that was found, if any.

    Within `leased`: `start` if `job` is None, and `wait`. What has completed earlier than `completed_after` is not
    found; see `_attempt`. Raises `InvalidJobRequest` at once if SageMaker would refuse the request.
    """

    def __init__(
        self,
        settings: JobSettings,
        kind: JobKind,
        context: Context,
        params: Mapping[str, Any],
        inputs: JobInputs,
        completed_after: datetime | None = None,
    ) -> None:
        self.kind, self.settings = kind, settings
        self._context, self._params, self._inputs = context, params, inputs
        partition = context.partition_key if context.has_partition_key else None
        assets = asset_names(context) or [str(context.op_handle)]
        # What the job is for: the same in every run that does it.
        self._work = jobs.digest_of([assets, partition, inputs.digest or jobs.request_digest(params)])
        root_run = context.run.root_run_id or context.run_id
        # Names of tuning jobs have at most 32 characters.
        prefix, shown = ("tune", []) if kind is TUNING else (settings.name_prefix, assets)
        self.name = first_name = jobs.job_name(prefix, shown, self._work, root_run)
        check_request(f"Create{kind.operation}", self._request({}))
        self._client = settings.client("sagemaker")
        self.job = self._attempt(first_name, completed_after) or self._orphan(first_name)
        self._exists, self._ended = self.job is not None, False

    @property
    def prefix(self) -> JobPrefix:
        """The S3 prefix of the job's small files."""
        return self.settings.prefix(self.name)

    @contextmanager
    def leased(self) -> Iterator[None]:
        """Hold the lease. If an error ends the block before the job has ended, the job is stopped, unless `detach`."""
        try:
            if self.job is not None:
                self._context.log.info(f"Attached to {self.job}, which is {self.job.status}")
            self._lease(self.name).take()
            yield
        except BaseException:
            if self._exists and not self._ended:
                self._stop()
            raise
        finally:
            self._clean_up()

    def start(self, bootstrap: Mapping[str, str] | None = None) -> None:
        """Upload the inputs, then create the job. `bootstrap`: the environment variables of Dagster Pipes.

        A create request whose answer was lost is sent again and then finds the job in use: that is this one. Raises
        `JobFailure` if SageMaker refuses it.
        """
        from botocore.exceptions import ClientError

        prefix = self.prefix
        for name, content in {**self._inputs.files, **self._inputs.secrets}.items():
            prefix.put(name, content)
        if bootstrap and self._inputs.uri_variable:
            prefix.put(BOOTSTRAP, json.dumps(dict(bootstrap)).encode())
        self._exists = True  # from here on there may be a job
        try:
            arn = self.kind.method(self._client, "create")(**self._request(bootstrap or {}))[self.kind.member("Arn")]
            job = Job(self.kind, self.name, arn, "InProgress", {})
        except ClientError as error:
            job = self.kind.describe(self._client, self.name) if error_code(error) == "ResourceInUse" else None
            if job is None or tags_of(self._client, job.arn).get(WORK_TAG) != self._work:
                self._exists = False
                raise start_failure(self.kind, self.name, error) from error
        self._context.log.info(job.started_text())

    def wait(self, each: Callable[[], object] = lambda: None) -> Job:
        """The job when it has ended. Its statuses are logged, and `each` is called at each poll.

        The lease is renewed at each poll. Calls have few retries here, so that an outage does not keep the lease from
        being renewed: the next poll tries again, until `polling.retry` seconds have passed without an answer.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.settings.client("sagemaker", SHORT_RETRY_SECONDS)
        describe, which = self.kind.method(client, "describe"), {self.kind.member("Name"): self.name}
        lease, polling, answered = self._lease(self.name, SHORT_RETRY_SECONDS), self.settings.polling, time.monotonic()
        said = set[tuple[int, str]]()

        def ended() -> Job | None:
            nonlocal answered
            each()
            lease.renew()
            try:
                job = self.kind.job(describe(**which))
            except (ClientError, BotoCoreError) as error:
                if is_transient(error) and time.monotonic() - answered < polling.retry:
                    return None
                raise
            answered = time.monotonic()
            for line in enumerate(status_lines(job)):
                if line not in said:
                    said.add(line)
                    self._context.log.info(line[1])
            return job if job.status in TERMINAL else None

        job = wait_until(
            ended,
            timeout=float("inf"),
            interval=polling.interval,
            longest_interval=polling.longest_interval,
            what=f"the end of {self.name}",
        )
        self._ended = True
        return job

    def _attempt(self, first_name: str, completed_after: datetime | None) -> Job | None:
        """The first attempt of this run, or of its retries, that is running or has completed; else `name` is free.

        A completed job counts if it was started by this run (a retry of the step) or ended after `completed_after`, and
        closed its Pipes session in order. Tuning jobs have none.
        """
        for name in jobs.attempts_of(first_name):
            self.name = name
            if (job := self.kind.describe(self._client, name)) is None:
                return None
            tags = tags_of(self._client, job.arn)
            if tags.get(WORK_TAG) != self._work:
                continue
            if job.status == "InProgress":
                return job
            if job.status == "Completed":
                ended = job.facts.get(self.kind.ended) or job.facts["LastModifiedTime"]
                fresh = completed_after is None or ended >= completed_after or tags.get(RUN_TAG) == self._context.run_id
                if fresh and (self.kind is TUNING or self.prefix.has_closed()):
                    return job
        raise RuntimeError(f"no name is left for another attempt of {first_name}")

    def _orphan(self, first_name: str) -> Job | None:
        """A running job of another run that does the same work, and whose lease is not renewed."""
        from botocore.exceptions import ClientError

        kind, log = self.kind, self._context.log
        work = first_name.rpartition("-")[0]  # the part that the names of all runs share
        try:
            found = getattr(self._client, f"list_{kind.method_name}s")(
                NameContains=work, StatusEquals="InProgress", MaxResults=20
            )
        except ClientError as error:
            if error_code(error) not in ("AccessDeniedException", "AccessDenied"):
                raise
            log.info(f"{error}; jobs that killed runs left behind are not looked for")
            return None
        for summary in found[kind.member("Summaries")]:
            job = kind.describe(self._client, summary[kind.member("Name")])
            if job is None or tags_of(self._client, job.arn).get(WORK_TAG) != self._work:
                continue
            log.info(f"{job} of another run does the same work; waiting for its lease to be renewed")
            if self._lease(job.name).adopt():
                self.name = job.name
                return job
        return None

    def _lease(self, name: str, retry_seconds: float | None = None) -> JobLease:
        prefix = self.settings.prefix(name, retry_seconds)
        return JobLease(prefix, self._context.run_id, interval_seconds=self.settings.polling.lease)

    def _request(self, bootstrap: Mapping[str, str]) -> dict[str, Any]:
        """A copy of the caller's parameters with name, tags and environment added."""
        request = copy.deepcopy(dict(self._params))
        request[self.kind.member("Name")] = self.name
        given = {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}
        ours = {WORK_TAG: self._work, **root_tags(self.settings.job_root)}
        request["Tags"] = owned(ours, given, run_tags(self._context))
        inputs = self._inputs
        environment = {inputs.uri_variable: self.prefix.uri} if inputs.uri_variable else dict(bootstrap)
        if inputs.name_variable:
            environment[inputs.name_variable] = self.name
        if environment:
            holder = request["TrainingJobDefinition"] if self.kind is TUNING else request
            holder["Environment"] = {**holder.get("Environment", {}), **environment}
        return request

    def _stop(self) -> None:
        if self.settings.detach:
            self._context.log.warning(f"Detached from {self.kind.noun} {self.name}; it goes on running")
        else:
            client = self.settings.client("sagemaker", SHORT_RETRY_SECONDS)
            jobs.stop_job(self.kind, client, self.name, self._context.log, self.settings.polling.stop)

    def _clean_up(self) -> None:
        """Remove secrets and lease, unless the job was left running."""
        from botocore.exceptions import BotoCoreError, ClientError

        if self._exists and not self._ended and self.settings.detach:
            return
        prefix = self.settings.prefix(self.name, min(self.settings.polling.stop, self.settings.polling.retry))
        try:
            for name in (*self._inputs.secrets, LEASE):
                prefix.delete(name)
        except (ClientError, BotoCoreError) as error:
            self._context.log.warning(f"{prefix.uri} could not be cleaned up: {error}")
