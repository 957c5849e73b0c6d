"""`PipesSageMakerClient`: runs SageMaker training and processing jobs through Dagster Pipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster._core.definitions.resource_annotation import TreatAsResourceParam  # has no public name

from resources.pipes_session import pipes_session
from resources.sagemaker.job_files import MESSAGES, SHORT_RETRY_SECONDS, JobInputs, JobSettings
from resources.sagemaker.job_reports import JobLogs, job_failure, job_metadata
from resources.sagemaker.job_run import Context, JobRun
from resources.sagemaker.jobs import PROCESSING, TRAINING, Job
from resources.waiting import wait_until
from step_scripts.runner import storage

if TYPE_CHECKING:
    from resources.sagemaker.pipes_io import JobMessageReader

_CRASHED_DRAIN_SECONDS = 3.0  # a job that failed may never have closed its session; what it wrote before is there


class PipesSageMakerClient(dg.PipesClient, TreatAsResourceParam):
    """A Pipes client for SageMaker training and processing jobs; `settings` are those of `JobSettings`.

    The job's name is derived from the assets, the partition, the request and the root run. So a retry, a re-execution,
    or the next run after the Dagster process was killed finds the job that is running and attaches to it instead of
    starting another one. The job is stopped when the invocation ends in any other way than by the job's success.

    Context and messages go through S3 below `<job_root>/<job name>/`: the script uses `PipesS3ContextLoader` and
    `PipesS3MessageWriter`.
    """

    def __init__(self, job_root: str, **settings: Any) -> None:
        if not job_root.startswith("s3://") or not job_root.removeprefix("s3://").strip("/"):
            raise ValueError(f"job_root must be s3://bucket or s3://bucket/prefix, not {job_root!r}")
        self.settings = JobSettings(job_root, **settings)

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
            params: Parameters of `create_training_job` or `create_processing_job`, without a name; they are not
                changed.
            extras: Passed to the script in the Pipes context.
            inputs: Small files for the job, and where to put the bootstrap parameters.
            completed_after: A job of another run of the same root that has completed earlier is not reused.
            price_per_hour: Used instead of the settings'.

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
        run = JobRun(self.settings, kinds[0], context, params, inputs or JobInputs(), completed_after)
        if run.job is None:
            storage.delete_folder(run.prefix.uri + MESSAGES)  # of an earlier use of the same prefix
        injector = JobContextInjector(run.prefix, write=run.job is None)
        reader = JobMessageReader(self.settings.prefix(run.name, SHORT_RETRY_SECONDS))
        client = self.settings.client("logs", SHORT_RETRY_SECONDS)
        logs = JobLogs(client, kinds[0].log_group, run.name, context.log.info)

        def look() -> None:
            reader.poll()
            if self.settings.forward_logs:
                logs.poll()

        with (
            pipes_session(context, context_injector=injector, message_reader=reader, extras=extras) as session,
            run.leased(),
        ):
            if run.job is None:
                run.start(session.get_bootstrap_env_vars())
            session.report_launched({"extras": {"job_name": run.name}})
            job = run.wait(look)
            self._drain(context, job, reader, logs)
            metadata = job_metadata(job, self.settings.price_per_hour if price_per_hour is None else price_per_hour)
            if (why := _problem(job, reader)) is not None:
                messages: Sequence[Any] = session.get_custom_messages()
                raise job_failure(job, logs, metadata, why=why, messages=messages)
        context.log.info(f"{job} completed")
        return dg.PipesClientCompletedInvocation(session, metadata=metadata)

    def _drain(self, context: Context, job: Job, reader: JobMessageReader, logs: JobLogs) -> None:
        """Wait for the last messages and log lines of a job that has ended."""
        polling, completed = self.settings.polling, job.status == "Completed"
        with suppress(TimeoutError):
            seconds = polling.drain if completed else min(_CRASHED_DRAIN_SECONDS, polling.drain)
            wait_until(reader.poll, timeout=seconds, interval=0.1, longest_interval=1.0, what="the job's last message")
        if not self.settings.forward_logs and completed:
            return
        expect_lines = job.kind.started in job.facts
        if not logs.drain(polling.drain, quiet_seconds=polling.quiet, expect_lines=expect_lines):
            place = job.links().get("logs", "CloudWatch")
            context.log.warning(
                f"not all log lines were delivered within {polling.drain:.0f} s; the rest is at {place}"
            )


def _problem(job: Job, reader: JobMessageReader) -> str | None:
    """What was wrong with a job that SageMaker calls Completed; empty for any other, None if nothing was."""
    if job.status != "Completed":
        return ""
    if reader.closed is None:
        return "it never closed its Pipes session, so its messages may be incomplete"
    if exception := reader.closed.get("exception"):
        return f"its Pipes session was closed by {exception.get('name')}: {exception.get('message')}"
    return None
