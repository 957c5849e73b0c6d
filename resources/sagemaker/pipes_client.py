"""`PipesSageMakerClient`: runs SageMaker training and processing jobs through Dagster Pipes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster._core.definitions.resource_annotation import TreatAsResourceParam  # has no public name

from resources.aws.calls import is_transient
from resources.pipes_session import pipes_session
from resources.sagemaker.job_files import CONTEXT, MESSAGES, SHORT_RETRY_SECONDS, JobInputs, JobSettings
from resources.sagemaker.job_reports import JobLogs, job_failure, job_metadata
from resources.sagemaker.job_run import Context, JobRun
from resources.sagemaker.jobs import PROCESSING, TRAINING, Job
from resources.waiting import wait_until
from step_scripts.runner import storage

if TYPE_CHECKING:
    from dagster_pipes import PipesContextData, PipesParams

_CRASHED_DRAIN_SECONDS = 3.0  # a job that failed may never have closed its session; what it wrote before is there


class JobPipes(dg.PipesContextInjector, dg.PipesMessageReader):
    """Pipes context and messages of a job on S3, under keys that depend on the job alone.

    dagster-aws's classes choose random keys, so a second Dagster process could not find them; and they read messages in
    a thread, one chunk an interval: a run that attaches to a job has to catch up with it, and a message that cannot be
    handled has to end the run. `closed` holds what the job's Pipes session was closed with.
    """

    _handler: dg.PipesMessageHandler

    def __init__(self, run: JobRun) -> None:
        self._run, self._prefix = run, run.settings.prefix(run.name, SHORT_RETRY_SECONDS)
        self._chunk = 1  # the next to be read; each is read once
        self.closed: dict[str, Any] | None = None

    @contextmanager
    def inject_context(self, context_data: PipesContextData) -> Iterator[PipesParams]:
        """Yields bucket and key for `PipesS3ContextLoader`. What a job was started with stays, as a record."""
        if self._run.job is None:
            self._run.prefix.put(CONTEXT, json.dumps(context_data).encode())
        yield {"bucket": self._prefix.bucket, "key": self._prefix.path(CONTEXT)}

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[PipesParams]:
        """Yields bucket and key prefix for `PipesS3MessageWriter`."""
        self._handler = handler
        yield {"bucket": self._prefix.bucket, "key_prefix": self._prefix.path(MESSAGES)}

    def poll(self) -> bool:
        """Hand on what has arrived; whether the session is closed. That S3 does not answer is left to the next poll."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            for messages in self._prefix.message_chunks(self._chunk):
                self._chunk += 1
                for message in messages:
                    self._handler.handle_message(message)  # pyright: ignore[reportArgumentType]  # parsed JSON
                    if message["method"] == "closed":
                        self.closed = message.get("params") or {}
        except (ClientError, BotoCoreError) as error:
            if not is_transient(error):
                raise
        return self.closed is not None

    def no_messages_debug_text(self) -> str:
        """Advice where messages are missing."""
        return "open_dagster_pipes in the job needs PipesS3ContextLoader and PipesS3MessageWriter"


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
        kinds = [k for k, m in ((TRAINING, "AlgorithmSpecification"), (PROCESSING, "AppSpecification")) if m in params]
        if len(kinds) != 1:
            raise ValueError(
                "params must have either AlgorithmSpecification (training) or AppSpecification (processing)"
            )
        run = JobRun(self.settings, kinds[0], context, params, inputs or JobInputs(), completed_after)
        if run.job is None:
            storage.delete(run.prefix.uri + MESSAGES)  # of an earlier use of the same prefix
        pipes = JobPipes(run)
        client = self.settings.client("logs", SHORT_RETRY_SECONDS)
        logs = JobLogs(client, kinds[0].log_group, run.name, context.log.info)

        def look() -> None:
            pipes.poll()
            if self.settings.forward_logs:
                logs.poll()

        with (
            pipes_session(context, context_injector=pipes, message_reader=pipes, extras=extras) as session,
            run.leased(),
        ):
            if run.job is None:
                run.start(session.get_bootstrap_env_vars())
            session.report_launched({"extras": {"job_name": run.name}})
            job = run.wait(look)
            self._drain(context, job, pipes, logs)
            metadata = job_metadata(job, self.settings.price_per_hour if price_per_hour is None else price_per_hour)
            if (why := _problem(job, pipes)) is not None:
                raise job_failure(job, logs, metadata, why=why, messages=session.get_custom_messages())
        context.log.info(f"{job} completed")
        return dg.PipesClientCompletedInvocation(session, metadata=metadata)

    def _drain(self, context: Context, job: Job, pipes: JobPipes, logs: JobLogs) -> None:
        """Wait for the last messages and log lines of a job that has ended."""
        polling, completed = self.settings.polling, job.status == "Completed"
        with suppress(TimeoutError):
            seconds = polling.drain if completed else min(_CRASHED_DRAIN_SECONDS, polling.drain)
            wait_until(pipes.poll, timeout=seconds, interval=0.1, longest_interval=1.0, what="the job's last message")
        if not self.settings.forward_logs and completed:
            return
        expect_lines = job.kind.started in job.facts
        if not logs.drain(polling.drain, quiet_seconds=polling.quiet, expect_lines=expect_lines):
            place = job.links().get("logs", "CloudWatch")
            context.log.warning(
                f"not all log lines were delivered within {polling.drain:.0f} s; the rest is at {place}"
            )


def _problem(job: Job, pipes: JobPipes) -> str | None:
    """What was wrong with a job that SageMaker calls Completed; empty for any other, None if nothing was."""
    if job.status != "Completed":
        return ""
    if pipes.closed is None:
        return "it never closed its Pipes session, so its messages may be incomplete"
    if exception := pipes.closed.get("exception"):
        return f"its Pipes session was closed by {exception.get('name')}: {exception.get('message')}"
    return None
