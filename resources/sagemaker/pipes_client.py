"""`PipesSageMakerClient`: runs SageMaker training and processing jobs through Dagster Pipes."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster._core.definitions.resource_annotation import TreatAsResourceParam  # has no public name

from resources.aws.calls import AwsCaller, aws_client, error_code
from resources.aws.ownership import creation_tags
from resources.aws.request_validation import check_request
from resources.aws.tags import WORK_TAG, asset_names, run_tags, tag_list
from resources.pipes_session import pipes_session
from resources.sagemaker.job_failures import job_failure, start_failure
from resources.sagemaker.job_files import BOOTSTRAP, JobInputs, JobPrefix
from resources.sagemaker.job_kinds import PROCESSING, TERMINAL, TRAINING, JobKind
from resources.sagemaker.job_lease import LEASE, JobLease
from resources.sagemaker.job_logs import JobLogs
from resources.sagemaker.job_metadata import job_metadata
from resources.sagemaker.job_names import JobName, Work, given_name, job_name, request_digest
from resources.sagemaker.job_polling import JobPolling
from resources.sagemaker.job_search import JobSearch
from resources.sagemaker.job_stop import stop_job
from resources.sagemaker.job_watch import JobWatch
from resources.sagemaker.pipes_io import JobContextInjector, JobMessageReader

if TYPE_CHECKING:
    from resources.sagemaker.job_metadata import StatusChange

Context = dg.OpExecutionContext | dg.AssetExecutionContext


@dataclass
class _Run:
    """One invocation: the job, and what looks after it."""

    kind: JobKind
    name: str
    prefix: JobPrefix
    logs: JobLogs
    lease: JobLease
    started: bool = False
    done: bool = False
    history: list[StatusChange] = field(default_factory=list)


class PipesSageMakerClient(dg.PipesClient, TreatAsResourceParam):
    """A Pipes client for SageMaker training and processing jobs.

    The job's name is derived from the assets, the partition, the request and the root run. So a retry, a re-execution,
    or the next run after the Dagster process was killed finds the job that is running and attaches to it instead of
    starting another one. The job is stopped when the invocation ends in any other way than by the job's success.

    Context and messages go through S3 below `<job_root>/<job name>/`: the script uses `PipesS3ContextLoader` and
    `PipesS3MessageWriter`.

    Args:
        job_root (str): `s3://bucket/prefix` for context, messages and inputs of jobs.
        region_name (Optional[str]): AWS region. Defaults to boto3's.
        sagemaker_client, s3_client, logs_client (Optional[boto3.client]): Clients to use instead of new ones. New ones
            do not retry by themselves, because this class does.
        name_prefix (str): First part of the names of jobs.
        detach (bool): Leave a running job alone when the Dagster process is interrupted or fails.
        adopt_orphans (bool): Take over a running job that does the same work for a run whose process was killed.
        forward_logs (bool): Forward the log lines of all hosts to the run's log.
        price_per_hour (Optional[float]): Price of one instance, for the cost estimate in the metadata.
        polling (Optional[JobPolling]): Intervals and time limits.
    """

    def __init__(
        self,
        job_root: str,
        *,
        region_name: str | None = None,
        sagemaker_client: Any = None,
        s3_client: Any = None,
        logs_client: Any = None,
        name_prefix: str = "dagster",
        detach: bool = False,
        adopt_orphans: bool = True,
        forward_logs: bool = True,
        price_per_hour: float | None = None,
        polling: JobPolling | None = None,
    ) -> None:
        if not job_root.startswith("s3://") or not job_root.removeprefix("s3://").strip("/"):
            raise ValueError(f"job_root must be s3://bucket or s3://bucket/prefix, not {job_root!r}")
        self.job_root = job_root
        self.region_name = region_name
        self.name_prefix = name_prefix
        self.detach = detach
        self.adopt_orphans = adopt_orphans
        self.forward_logs = forward_logs
        self.price_per_hour = price_per_hour
        self.polling = polling or JobPolling()
        self._clients: dict[str, Any] = {"sagemaker": sagemaker_client, "s3": s3_client, "logs": logs_client}
        self._lock = threading.Lock()

    def run(  # pyright: ignore[reportIncompatibleMethodOverride]  # as in dagster-aws: named arguments of its own
        self,
        *,
        context: Context,
        params: Mapping[str, Any],
        extras: dict[str, Any] | None = None,
        inputs: JobInputs | None = None,
        completed_after: datetime | None = None,
        price_per_hour: float | None = None,
    ) -> dg.PipesClientCompletedInvocation:
        """Run a training job if `params` has an `AlgorithmSpecification`, a processing job if an `AppSpecification`.

        See `run_training_job` and `run_processing_job`. `price_per_hour` is used instead of the client's.
        """
        kinds = [k for k, m in ((TRAINING, "AlgorithmSpecification"), (PROCESSING, "AppSpecification")) if m in params]
        if len(kinds) != 1:
            raise ValueError(
                "params must have either AlgorithmSpecification (training) or AppSpecification (processing)"
            )
        return self._run(kinds[0], context, params, extras, inputs or JobInputs(), completed_after, price_per_hour)

    def run_training_job(
        self,
        *,
        context: Context,
        params: Mapping[str, Any],
        extras: dict[str, Any] | None = None,
        inputs: JobInputs | None = None,
        completed_after: datetime | None = None,
    ) -> dg.PipesClientCompletedInvocation:
        """Run a training job to its end.

        Args:
            context: The context of the executing op or asset.
            params: Parameters of `create_training_job`; they are not changed. `TrainingJobName` is optional.
            extras: Passed to the script in the Pipes context.
            inputs: Small files for the job, and where to put the bootstrap parameters.
            completed_after: A job of another run of the same root that has completed earlier is not reused.

        Raises:
            JobFailure: The job failed, was stopped, or ended without closing its Pipes session.
            InvalidJobRequest: SageMaker would refuse the request.
        """
        return self._run(TRAINING, context, params, extras, inputs or JobInputs(), completed_after)

    def run_processing_job(
        self,
        *,
        context: Context,
        params: Mapping[str, Any],
        extras: dict[str, Any] | None = None,
        inputs: JobInputs | None = None,
        completed_after: datetime | None = None,
    ) -> dg.PipesClientCompletedInvocation:
        """Run a processing job to its end. As `run_training_job`, with parameters of `create_processing_job`."""
        return self._run(PROCESSING, context, params, extras, inputs or JobInputs(), completed_after)

    def client(self, service: str) -> Any:
        """The boto3 client for `sagemaker`, `s3` or `logs`; made at the first use."""
        with self._lock:
            if self._clients.get(service) is None:
                self._clients[service] = aws_client(service, self.region_name)
            return self._clients[service]

    def prefix(self, name: str, call: AwsCaller | None = None) -> JobPrefix:
        """The S3 prefix of a job's small files."""
        return JobPrefix.of(self.client("s3"), call or AwsCaller(self.polling.patience), self.job_root, name)

    def _run(
        self,
        kind: JobKind,
        context: Context,
        params: Mapping[str, Any],
        extras: dict[str, Any] | None,
        inputs: JobInputs,
        completed_after: datetime | None,
        price_per_hour: float | None = None,
    ) -> dg.PipesClientCompletedInvocation:
        call = AwsCaller(self.polling.patience, warn=context.log.warning)
        work = Work(asset_names(context) or [str(context.op_handle)],
                    context.partition_key if context.has_partition_key else None,
                    inputs.digest or request_digest(params))  # fmt: skip
        names = self._names(kind, context, params, work)
        # Before anything is looked up or uploaded: with the longest values that the parts added here can have.
        check_request(kind.create_operation, self._enrich_params(kind, context, params, inputs, work, names.base, {}))
        search = JobSearch(kind, self.client("sagemaker"), call, work.digest)
        found = search.of_run(names, context.run_id, completed_after, lambda name: self.prefix(name, call).has_closed())
        if found.description is None and self.adopt_orphans and names.root_run:
            found = search.orphan(names, lambda name: self._lease(name, context, call), context.log.info) or found
        prefix = self.prefix(found.name, call)
        logs = JobLogs(self.client("logs"), kind.log_group, found.name, context.log.info, self.polling.logs)
        run = _Run(kind, found.name, prefix, logs, self._lease(found.name, context, call))
        reader = JobMessageReader(prefix, interval_seconds=self.polling.message_interval)
        injector = JobContextInjector(prefix, write=found.description is None)
        if found.description is None:
            prefix.clear_messages()
        try:
            with pipes_session(context, context_injector=injector, message_reader=reader, extras=extras) as session:
                try:
                    run.lease.take()
                    if found.description is None:
                        bootstrap = session.get_bootstrap_env_vars()
                        request = self._enrich_params(kind, context, params, inputs, work, run.name, bootstrap)
                        check_request(kind.create_operation, request)
                        arn = self._start(run, call, request, inputs, bootstrap, search)
                        context.log.info(
                            ": ".join(
                                [f"Started {kind.noun} {run.name}", *list(kind.links(arn, run.name).values())[:1]]
                            )
                        )
                    else:
                        run.started = True
                        state = found.description[kind.status_member]
                        context.log.info(f"Attached to {kind.noun} {run.name}, which is {state}")
                    session.report_launched({"extras": {"job_name": run.name}})
                    description = self._wait_for_completion(context, run, call, reader)
                    metadata = self._extract_dagster_metadata(run, description, price_per_hour)
                    self._check_success(run, description, reader, metadata, session.get_custom_messages())
                except BaseException:
                    if run.started and not run.done:
                        self._terminate(context, run)
                    raise
        finally:
            self._clean_up(context, run, inputs)
        context.log.info(f"{kind.noun} {run.name} completed")
        return dg.PipesClientCompletedInvocation(session, metadata=metadata)

    def _names(self, kind: JobKind, context: Context, params: Mapping[str, Any], work: Work) -> JobName:
        if chosen := params.get(kind.name_member):
            return given_name(chosen)
        return job_name(self.name_prefix, work, context.run.root_run_id or context.run_id)

    def _lease(self, name: str, context: Context, call: AwsCaller) -> JobLease:
        return JobLease(self.prefix(name, call), context.run_id, interval_seconds=self.polling.lease)

    def _enrich_params(
        self,
        kind: JobKind,
        context: Context,
        params: Mapping[str, Any],
        inputs: JobInputs,
        work: Work,
        name: str,
        bootstrap: Mapping[str, str],
    ) -> dict[str, Any]:
        """A copy of the caller's parameters with name, tags and environment added."""
        request = copy.deepcopy(dict(params))
        request[kind.name_member] = name
        given = {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}
        ours = {WORK_TAG: work.digest, **creation_tags(self.job_root)}
        request["Tags"] = tag_list(ours, given, run_tags(context))
        environment = dict(request.get("Environment", {}))
        if inputs.uri_variable:
            environment[inputs.uri_variable] = self.prefix(name).uri
        else:
            environment |= bootstrap
        if inputs.name_variable:
            environment[inputs.name_variable] = name
        if environment:
            request["Environment"] = environment
        return request

    def _start(
        self,
        run: _Run,
        call: AwsCaller,
        request: Mapping[str, Any],
        inputs: JobInputs,
        bootstrap: Mapping[str, str],
        search: JobSearch,
    ) -> str:
        """Upload the inputs, then create the job; returns its ARN.

        A create request whose answer was lost is sent again and then finds the job in use: that is this one.
        """
        from botocore.exceptions import ClientError

        for name, content in {**inputs.files, **inputs.secrets}.items():
            run.prefix.put(name, content)
        if inputs.uri_variable:
            run.prefix.put(BOOTSTRAP, json.dumps(dict(bootstrap)).encode())
        run.started = True  # from here on there may be a job
        try:
            return call(run.kind.method(self.client("sagemaker"), "create"), **request)[run.kind.arn_member]
        except ClientError as error:
            found = search.describe(run.name) if error_code(error) == "ResourceInUse" else None
            if found is not None and search.is_ours(found):
                return found[run.kind.arn_member]
            run.started = False
            raise start_failure(run.kind, run.name, error) from error

    def _wait_for_completion(
        self, context: Context, run: _Run, call: AwsCaller, reader: JobMessageReader
    ) -> dict[str, Any]:
        """The description of the ended job. Forwards log lines, reports status changes, renews the lease meanwhile."""
        describe = run.kind.method(self.client("sagemaker"), "describe")
        which: dict[str, Any] = {run.kind.name_member: run.name}
        watch = JobWatch(run.kind, context.log.info, run.history)
        interval, due = self.polling.interval, 0.0
        while True:
            reader.check()
            if self.forward_logs:
                run.logs.poll()
            run.lease.renew()
            if time.monotonic() >= due:
                description = call(describe, **which)
                changed = watch.see(description)
                if description[run.kind.status_member] in TERMINAL:
                    break
                interval = self.polling.interval if changed else min(1.3 * interval, self.polling.longest_interval)
                due = time.monotonic() + interval
            time.sleep(min(self.polling.interval, max(0.05, due - time.monotonic())))
        run.done = True  # there is nothing left to stop
        deadline = time.monotonic() + self.polling.drain
        completed = description[run.kind.status_member] == "Completed"
        # A job that failed may never have closed its session; what it wrote before is there.
        reader.drain(self.polling.drain if completed else min(3.0, self.polling.drain))
        if self.forward_logs or not completed:
            left = max(self.polling.drain / 2, deadline - time.monotonic())
            if not run.logs.drain(left, expect_lines=run.kind.started in description):
                place = run.kind.links(description[run.kind.arn_member], run.name).get("logs", "CloudWatch")
                context.log.warning(f"not all log lines were delivered within {left:.0f} s; the rest is at {place}")
        return description

    def _check_success(
        self,
        run: _Run,
        description: Mapping[str, Any],
        reader: JobMessageReader,
        metadata: Mapping[str, Any],
        messages: Sequence[Any],
    ) -> None:
        """Raise `JobFailure` unless the job completed and closed its Pipes session in order."""
        why = ""
        if description[run.kind.status_member] == "Completed":
            if not reader.received_closed:
                why = "it never closed its Pipes session, so its messages may be incomplete"
            elif (exception := reader.exception) is not None:
                why = f"its Pipes session was closed by {exception.get('name')}: {exception.get('message')}"
            else:
                return
        raise job_failure(run.kind, run.name, description, run.logs, metadata, why=why, messages=messages)

    def _extract_dagster_metadata(
        self, run: _Run, description: Mapping[str, Any], price_per_hour: float | None
    ) -> dict[str, Any]:
        price = self.price_per_hour if price_per_hour is None else price_per_hour
        return job_metadata(run.kind, run.name, description, price, run.history)

    def _terminate(self, context: Context, run: _Run) -> None:
        """Stop the job, unless it is to be left running."""
        if self.detach:
            context.log.warning(f"Detached from {run.kind.noun} {run.name}; it goes on running")
        else:
            stop_job(run.kind, self.client("sagemaker"), run.name, context.log, self.polling.stop)

    def _clean_up(self, context: Context, run: _Run, inputs: JobInputs) -> None:
        """Remove secrets and lease, unless the job was left running."""
        from botocore.exceptions import BotoCoreError, ClientError

        if run.started and not run.done and self.detach:
            return
        prefix = self.prefix(run.name, AwsCaller(min(self.polling.stop, self.polling.patience)))
        try:
            for name in (*inputs.secrets, LEASE):
                prefix.delete(name)
        except (ClientError, BotoCoreError) as error:
            context.log.warning(f"{run.prefix.uri} could not be cleaned up: {error}")
