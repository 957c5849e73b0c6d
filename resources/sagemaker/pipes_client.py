"""`PipesSageMakerClient`: runs SageMaker training and processing jobs through Dagster Pipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster._core.definitions.resource_annotation import TreatAsResourceParam  # has no public name

from resources.pipes_session import pipes_session
from resources.sagemaker.job_files import SHORT_RETRY_SECONDS, JobInputs, JobPolling, JobSettings
from resources.sagemaker.job_kinds import PROCESSING, TRAINING, JobKind
from resources.sagemaker.job_logs import JobLogs
from resources.sagemaker.job_names import JobName, Work, given_name, job_name
from resources.sagemaker.job_reports import StatusLog, job_failure, job_metadata
from resources.sagemaker.job_run import Context, JobRun
from resources.waiting import wait_until

if TYPE_CHECKING:
    from resources.sagemaker.pipes_io import JobMessageReader

_CRASHED_DRAIN_SECONDS = 3.0  # a job that failed may never have closed its session; what it wrote before is there


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
        name_prefix (str): First part of the names of jobs.
        detach (bool): Leave a running job alone when the Dagster process is interrupted or fails.
        forward_logs (bool): Forward the log lines of all hosts to the run's log.
        price_per_hour (Optional[float]): Price of one instance, for the cost estimate in the metadata.
        polling (Optional[JobPolling]): Intervals and time limits.
    """

    def __init__(
        self,
        job_root: str,
        *,
        region_name: str | None = None,
        name_prefix: str = "dagster",
        detach: bool = False,
        forward_logs: bool = True,
        price_per_hour: float | None = None,
        polling: JobPolling | None = None,
    ) -> None:
        if not job_root.startswith("s3://") or not job_root.removeprefix("s3://").strip("/"):
            raise ValueError(f"job_root must be s3://bucket or s3://bucket/prefix, not {job_root!r}")
        self.settings = JobSettings(job_root, region_name, detach, polling or JobPolling())
        self.name_prefix = name_prefix
        self.forward_logs = forward_logs
        self.price_per_hour = price_per_hour

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
        """Run a job to its end: training if `params` has an `AlgorithmSpecification`, processing if an
        `AppSpecification`.

        Args:
            context: The context of the executing op or asset.
            params: Parameters of `create_training_job` or `create_processing_job`; they are not changed. The job's name
                is optional.
            extras: Passed to the script in the Pipes context.
            inputs: Small files for the job, and where to put the bootstrap parameters.
            completed_after: A job of another run of the same root that has completed earlier is not reused.
            price_per_hour: Used instead of the client's.

        Raises:
            JobFailure: The job failed, was stopped, or ended without closing its Pipes session.
            InvalidJobRequest: SageMaker would refuse the request.
        """
        from resources.sagemaker.pipes_io import JobContextInjector, JobMessageReader

        kinds = [k for k, m in ((TRAINING, "AlgorithmSpecification"), (PROCESSING, "AppSpecification")) if m in params]
        if len(kinds) != 1:
            raise ValueError(
                "params must have either AlgorithmSpecification (training) or AppSpecification (processing)"
            )
        [kind] = kinds

        def name_of(work: Work, root_run_id: str) -> JobName:
            chosen = params.get(kind.name_member)
            return given_name(chosen) if chosen else job_name(self.name_prefix, work, root_run_id)

        job = JobRun(self.settings, kind, context, params, inputs or JobInputs(), name_of)
        job.find(completed_after)
        is_new = job.description is None
        if is_new:
            job.prefix.clear_messages()
        reader = JobMessageReader(self.settings.prefix(job.name, SHORT_RETRY_SECONDS))
        injector = JobContextInjector(job.prefix, write=is_new)
        logs = JobLogs(self.settings.client("logs", SHORT_RETRY_SECONDS), kind.log_group, job.name, context.log.info)
        statuses = StatusLog(kind, context.log.info)

        def look() -> None:
            reader.check()
            if self.forward_logs:
                logs.poll()

        with (
            pipes_session(context, context_injector=injector, message_reader=reader, extras=extras) as session,
            job.leased(),
        ):
            if is_new:
                job.start(session.get_bootstrap_env_vars())
            session.report_launched({"extras": {"job_name": job.name}})
            description = job.wait(statuses.see, look)
            self._drain(context, kind, description, reader, logs)
            price = self.price_per_hour if price_per_hour is None else price_per_hour
            metadata = job_metadata(kind, job.name, description, price, statuses)
            if (why := _problem(kind, description, reader)) is not None:
                messages: Sequence[Any] = session.get_custom_messages()
                raise job_failure(kind, job.name, description, logs, metadata, why=why, messages=messages)
        context.log.info(f"{kind.noun} {job.name} completed")
        return dg.PipesClientCompletedInvocation(session, metadata=metadata)

    def _drain(
        self, context: Context, kind: JobKind, description: Mapping[str, Any], reader: JobMessageReader, logs: JobLogs
    ) -> None:
        """Wait for the last messages and log lines of a job that has ended."""
        polling, completed = self.settings.polling, description[kind.status_member] == "Completed"

        def closed() -> bool:
            reader.check()
            return reader.closed is not None

        with suppress(TimeoutError):
            seconds = polling.drain if completed else min(_CRASHED_DRAIN_SECONDS, polling.drain)
            wait_until(closed, timeout=seconds, interval=0.1, longest_interval=1.0, what="the job's last message")
        if not self.forward_logs and completed:
            return
        expect_lines = kind.started in description
        if not logs.drain(polling.drain, quiet_seconds=polling.quiet, expect_lines=expect_lines):
            place = kind.links(description[kind.arn_member], description[kind.name_member]).get("logs", "CloudWatch")
            context.log.warning(
                f"not all log lines were delivered within {polling.drain:.0f} s; the rest is at {place}"
            )


def _problem(kind: JobKind, description: Mapping[str, Any], reader: JobMessageReader) -> str | None:
    """What was wrong with a job that SageMaker calls Completed; empty for any other, None if nothing was."""
    if description[kind.status_member] != "Completed":
        return ""
    if reader.closed is None:
        return "it never closed its Pipes session, so its messages may be incomplete"
    if exception := reader.closed.get("exception"):
        return f"its Pipes session was closed by {exception.get('name')}: {exception.get('message')}"
    return None
