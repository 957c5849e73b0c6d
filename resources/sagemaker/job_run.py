"""One piece of work as one job of any kind: found again instead of started twice, polled, stopped if the run ends."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import dagster as dg

from resources.aws.calls import error_code, error_message, is_missing, is_transient
from resources.aws.ownership import creation_tags, tags_of
from resources.aws.request_validation import check_request
from resources.aws.tags import RUN_TAG, WORK_TAG, asset_names, run_tags, tag_list
from resources.sagemaker.job_files import (
    BOOTSTRAP,
    LEASE,
    SHORT_RETRY_SECONDS,
    JobInputs,
    JobLease,
    JobPrefix,
    JobSettings,
)
from resources.sagemaker.job_kinds import TERMINAL, TUNING, JobKind
from resources.sagemaker.job_names import JobName, Work, request_digest
from resources.sagemaker.job_reports import start_failure
from resources.waiting import wait_until

Context = dg.OpExecutionContext | dg.AssetExecutionContext
_APPEARANCE_SECONDS = 2.0


class JobRun:
    """The job that does a piece of work for a step of a Dagster run.

    Call `find` first. Then, within `leased`: `start` if `description` is None, and `wait`.
    Raises `InvalidJobRequest` at once if SageMaker would refuse the request.
    """

    def __init__(
        self,
        settings: JobSettings,
        kind: JobKind,
        context: Context,
        params: Mapping[str, Any],
        inputs: JobInputs,
        name_of: Callable[[Work, str], JobName],
    ) -> None:
        self.kind, self.settings = kind, settings
        self._context, self._params, self._inputs = context, params, inputs
        partition = context.partition_key if context.has_partition_key else None
        assets = asset_names(context) or [str(context.op_handle)]
        work = Work(assets, partition, inputs.digest or request_digest(params))
        self._work = work.digest
        self._names = name_of(work, context.run.root_run_id or context.run_id)
        self._client = settings.client("sagemaker")
        self.name = self._names.base
        self.description: dict[str, Any] | None = None
        self._exists = self._ended = False
        check_request(kind.create_operation, self._request({}))

    @property
    def prefix(self) -> JobPrefix:
        """The S3 prefix of the job's small files."""
        return self.settings.prefix(self.name)

    def find(self, completed_after: datetime | None = None, *, reports_by_pipes: bool = True) -> None:
        """Choose the job's name, and describe the job if it is there: see `_attempt` and `_orphan`."""
        self.name, self.description = self._attempt(completed_after, reports_by_pipes)
        if self.description is None and self._names.root_run:
            self.name, self.description = self._orphan() or (self.name, None)

    @contextmanager
    def leased(self) -> Iterator[None]:
        """Hold the lease. If an error ends the block before the job has ended, the job is stopped, unless `detach`."""
        try:
            self._exists = self.description is not None
            if self.description is not None:
                state = self.description[self.kind.status_member]
                self._context.log.info(f"Attached to {self.kind.noun} {self.name}, which is {state}")
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
            answer = self.kind.method(self._client, "create")(**self._request(bootstrap or {}))
        except ClientError as error:
            found = self.kind.describe(self._client, self.name) if error_code(error) == "ResourceInUse" else None
            if found is None or self._tags(found).get(WORK_TAG) != self._work:
                self._exists = False
                raise start_failure(self.kind, self.name, error) from error
            answer = found
        self._context.log.info(self.kind.started_text(answer[self.kind.arn_member], self.name))

    def wait(
        self, see: Callable[[Mapping[str, Any]], object], each: Callable[[], object] | None = None
    ) -> dict[str, Any]:
        """The description of the ended job. `see` gets each description before; `each` is called at each poll.

        The lease is renewed at each poll. Calls have few retries here, so that an outage does not keep the lease from
        being renewed: the next poll tries again, until `polling.retry` seconds have passed without an answer.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.settings.client("sagemaker", SHORT_RETRY_SECONDS)
        describe, which = self.kind.method(client, "describe"), {self.kind.name_member: self.name}
        lease, polling, answered = self._lease(self.name, SHORT_RETRY_SECONDS), self.settings.polling, time.monotonic()

        def ended() -> dict[str, Any] | None:
            nonlocal answered
            if each is not None:
                each()
            lease.renew()
            try:
                description = describe(**which)
            except (ClientError, BotoCoreError) as error:
                if is_transient(error) and time.monotonic() - answered < polling.retry:
                    return None
                raise
            answered = time.monotonic()
            see(description)
            return description if description[self.kind.status_member] in TERMINAL else None

        description = wait_until(
            ended,
            timeout=float("inf"),
            interval=polling.interval,
            longest_interval=polling.longest_interval,
            what=f"the end of {self.name}",
        )
        self._ended = True
        return description

    def _attempt(self, completed_after: datetime | None, reports_by_pipes: bool) -> tuple[str, dict[str, Any] | None]:
        """The first attempt of this run, or of its retries, that is running or has completed; or the first free name.

        A completed job counts if it was started by this run (a retry of the step) or ended after `completed_after`, and
        closed its Pipes session in order.
        """
        for name in self._names.attempts():
            description = self.kind.describe(self._client, name)
            if description is None:
                return name, None
            tags, status = self._tags(description), description[self.kind.status_member]
            if tags.get(WORK_TAG) != self._work:
                continue
            if status == "InProgress":
                return name, description
            if status == "Completed":
                ended = description.get(self.kind.ended) or description["LastModifiedTime"]
                fresh = completed_after is None or ended >= completed_after or tags.get(RUN_TAG) == self._context.run_id
                if fresh and (not reports_by_pipes or self.settings.prefix(name).has_closed()):
                    return name, description
        raise RuntimeError(f"no name is left for another attempt of {self._names.base}")

    def _orphan(self) -> tuple[str, dict[str, Any]] | None:
        """A running job of another run that does the same work, and whose lease is not renewed."""
        from botocore.exceptions import ClientError

        kind, log = self.kind, self._context.log
        try:
            found = getattr(self._client, kind.list_operation)(
                NameContains=self._names.work, StatusEquals="InProgress", MaxResults=20
            )
        except ClientError as error:
            if error_code(error) not in ("AccessDeniedException", "AccessDenied"):
                raise
            log.info(f"{error}; jobs that killed runs left behind are not looked for")
            return None
        for summary in found[kind.summaries_member]:
            name = summary[kind.name_member]
            description = kind.describe(self._client, name)
            if description is None or self._tags(description).get(WORK_TAG) != self._work:
                continue
            log.info(f"{kind.noun} {name} of another run does the same work; waiting for its lease to be renewed")
            if self._lease(name).adopt():
                return name, description
        return None

    def _tags(self, description: Mapping[str, Any]) -> dict[str, str]:
        return tags_of(self._client, description[self.kind.arn_member])

    def _lease(self, name: str, retry_seconds: float | None = None) -> JobLease:
        prefix = self.settings.prefix(name, retry_seconds)
        return JobLease(prefix, self._context.run_id, interval_seconds=self.settings.polling.lease)

    def _request(self, bootstrap: Mapping[str, str]) -> dict[str, Any]:
        """A copy of the caller's parameters with name, tags and environment added."""
        request = copy.deepcopy(dict(self._params))
        request[self.kind.name_member] = self.name
        given = {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}
        ours = {WORK_TAG: self._work, **creation_tags(self.settings.job_root)}
        request["Tags"] = tag_list(ours, given, run_tags(self._context))
        environment = {}
        if self._inputs.uri_variable:
            environment[self._inputs.uri_variable] = self.prefix.uri
        else:
            environment |= bootstrap
        if self._inputs.name_variable:
            environment[self._inputs.name_variable] = self.name
        if environment:
            holder = request["TrainingJobDefinition"] if self.kind is TUNING else request
            holder["Environment"] = {**holder.get("Environment", {}), **environment}
        return request

    def _stop(self) -> None:
        if self.settings.detach:
            self._context.log.warning(f"Detached from {self.kind.noun} {self.name}; it goes on running")
        else:
            client = self.settings.client("sagemaker", SHORT_RETRY_SECONDS)
            stop_job(self.kind, client, self.name, self._context.log, self.settings.polling.stop)

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


def stop_job(kind: JobKind, client: Any, name: str, log: dg.DagsterLogManager | logging.Logger, seconds: float) -> None:
    """Stop the job and wait until it is `Stopping` or has ended, for at most `seconds`.

    Never raises an AWS error: this runs while another error is on its way. A job that does not exist is waited for a
    moment, because an interrupted create request may still take effect.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    log.warning(f"Stopping {kind.noun} {name}")
    which: dict[str, Any] = {kind.name_member: name}
    start = time.monotonic()

    def stopping() -> bool:
        try:
            state = kind.method(client, "describe")(**which)[kind.status_member]
            if state in (*TERMINAL, "Stopping"):
                log.warning(f"{kind.noun} {name} is {state}")
                return True
            kind.method(client, "stop")(**which)
        except (ClientError, BotoCoreError) as error:
            if is_missing(error):
                return time.monotonic() - start > _APPEARANCE_SECONDS
            log.error(f"{kind.noun} {name}: {error_message(error)}; trying again to stop it")
        return False

    try:
        wait_until(stopping, timeout=seconds, interval=0.25, what=f"the end of {name}")
    except TimeoutError:
        log.error(f"{kind.noun} {name} could not be stopped; stop it by hand: it costs money until then")
