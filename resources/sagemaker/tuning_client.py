"""Runs a SageMaker tuning job to its end: found again after a restart, stopped if nobody waits for it any more."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import dagster as dg

from resources.aws.calls import AwsCaller, error_code
from resources.aws.ownership import creation_tags
from resources.aws.request_validation import check_request
from resources.aws.tags import WORK_TAG, asset_names, run_tags, tag_list
from resources.sagemaker.job_failures import JobFailure, start_failure
from resources.sagemaker.job_kinds import TERMINAL, TRAINING, TUNING
from resources.sagemaker.job_lease import LEASE, JobLease
from resources.sagemaker.job_names import Work, digest_of, request_digest, tuning_job_name
from resources.sagemaker.job_search import FoundJob, JobSearch
from resources.sagemaker.job_stop import stop_job
from resources.sagemaker.pipes_client import Context, PipesSageMakerClient
from step_scripts.runner.wording import counted, number

_LONGEST = "x" * 32
URI_VARIABLE = "HOUSING_JOB_URI"


@dataclass(frozen=True)
class TuningResult:
    """An ended tuning job: its description, and those of its training jobs in the order of their creation."""

    description: dict[str, Any]
    trials: list[dict[str, Any]] = field(default_factory=list)


class TuningJobs:
    """Tuning jobs beside the jobs of a `PipesSageMakerClient`, whose clients, intervals and S3 prefix they use.

    There is no Pipes session: SageMaker starts the training jobs, and they report by metrics.
    """

    def __init__(self, client: PipesSageMakerClient) -> None:
        self._client = client
        self._polling = client.polling

    def run(
        self,
        context: Context,
        params: Mapping[str, Any],
        files: Mapping[str, bytes],
        digest: str,
        completed_after: datetime | None,
    ) -> TuningResult:
        """Run the tuning job that `params` (a create request without a name) describe, to whatever end.

        `files` are put below the job's prefix, which its training jobs find in the variable `HOUSING_JOB_URI`.
        `digest` identifies the work. Raises `JobFailure` if SageMaker does not start it, and `InvalidJobRequest`.
        """
        call = AwsCaller(self._polling.patience, warn=context.log.warning)
        client = self._client.client("sagemaker")
        partition = context.partition_key if context.has_partition_key else None
        work = Work(
            asset_names(context) or [str(context.op_handle)], partition, digest_of([digest, request_digest(params)])
        )
        names = tuning_job_name(work, context.run.root_run_id or context.run_id)
        check_request(TUNING.create_operation, self._enriched(context, params, work, _LONGEST))
        search = JobSearch(TUNING, client, call, work.digest)
        found = search.of_run(names, context.run_id, completed_after, lambda name: True)
        if found.description is None and self._client.adopt_orphans:
            adopt = search.orphan(names, lambda name: self._lease(name, context, call), context.log.info)
            found = adopt or found
        lease = self._lease(found.name, context, call)
        ended = False
        try:
            lease.take()
            self._start(context, call, found, files, self._enriched(context, params, work, found.name), search)
            try:
                description = self._wait(context, call, found.name, lease)
            except BaseException:
                self._stop(context, found.name)
                raise
            ended = True
        finally:
            self._give_up(context, found.name, ended)
        return TuningResult(description, list(self._trials(call, found.name)))

    def _enriched(self, context: Context, params: Mapping[str, Any], work: Work, name: str) -> dict[str, Any]:
        request = copy.deepcopy(dict(params))
        request[TUNING.name_member] = name
        given = {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}
        ours = {WORK_TAG: work.digest, **creation_tags(self._client.job_root)}
        request["Tags"] = tag_list(ours, given, run_tags(context))
        definition = request["TrainingJobDefinition"]
        definition["Environment"] = {**definition.get("Environment", {}), URI_VARIABLE: self._client.prefix(name).uri}
        return request

    def _lease(self, name: str, context: Context, call: AwsCaller) -> JobLease:
        return JobLease(self._client.prefix(name, call), context.run_id, interval_seconds=self._polling.lease)

    def _start(
        self,
        context: Context,
        call: AwsCaller,
        found: FoundJob,
        files: Mapping[str, bytes],
        request: Mapping[str, Any],
        search: JobSearch,
    ) -> None:
        from botocore.exceptions import ClientError

        if found.description is not None:
            state = found.description[TUNING.status_member]
            context.log.info(f"Attached to tuning job {found.name}, which is {state}")
            return
        prefix = self._client.prefix(found.name, call)
        for name, content in files.items():
            prefix.put(name, content)
        try:
            answer = call(TUNING.method(self._client.client("sagemaker"), "create"), **request)
            arn = answer[TUNING.arn_member]
        except ClientError as error:
            # A request whose answer was lost is sent again, and then finds the job in use: that is this one.
            existing = search.describe(found.name) if error_code(error) == "ResourceInUse" else None
            if existing is None or not search.is_ours(existing):
                raise start_failure(TUNING, found.name, error) from error
            arn = existing[TUNING.arn_member]
        except BaseException:
            self._stop(context, found.name)  # there may be one
            raise
        context.log.info(TUNING.started_text(arn, found.name))

    def _wait(self, context: Context, call: AwsCaller, name: str, lease: JobLease) -> dict[str, Any]:
        describe = TUNING.method(self._client.client("sagemaker"), "describe")
        which: dict[str, Any] = {TUNING.name_member: name}
        interval, said = self._polling.interval, ""
        while True:
            lease.renew()
            description = call(describe, **which)
            if (progress := _progress(description)) != said:
                said, interval = progress, self._polling.interval
                context.log.info(f"tuning job {name}: {progress}")
            if description[TUNING.status_member] in TERMINAL:
                return description
            time.sleep(interval)
            # The lease must be renewed in time, or another run takes the job over.
            interval = min(1.3 * interval, self._polling.longest_interval, self._polling.lease)

    def _stop(self, context: Context, name: str) -> None:
        if self._client.detach:
            context.log.warning(f"Detached from tuning job {name}; it goes on running")
        else:
            stop_job(TUNING, self._client.client("sagemaker"), name, context.log, self._polling.stop)

    def _trials(self, call: AwsCaller, name: str) -> Iterator[dict[str, Any]]:
        """Descriptions of the training jobs, each with the member `TunedHyperParameters`."""
        client = self._client.client("sagemaker")
        token: dict[str, Any] = {}
        while True:
            answer = call(
                client.list_training_jobs_for_hyper_parameter_tuning_job,
                HyperParameterTuningJobName=name,
                SortBy="CreationTime",
                SortOrder="Ascending",
                MaxResults=100,
                **token,
            )
            for summary in answer["TrainingJobSummaries"]:
                job = call(client.describe_training_job, TrainingJobName=summary["TrainingJobName"])
                yield {**job, "TunedHyperParameters": summary["TunedHyperParameters"]}
            if not answer.get("NextToken"):
                return
            token = {"NextToken": answer["NextToken"]}

    def _give_up(self, context: Context, name: str, ended: bool) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        if not ended and self._client.detach:
            return
        prefix = self._client.prefix(name, AwsCaller(min(self._polling.stop, self._polling.patience)))
        try:
            prefix.delete(LEASE)
        except (ClientError, BotoCoreError) as error:
            context.log.warning(f"{prefix.uri} could not be cleaned up: {error}")


def _progress(description: Mapping[str, Any]) -> str:
    counters = description.get("TrainingJobStatusCounters", {})
    failed = counters.get("NonRetryableError", 0)
    done = counters.get("Completed", 0) + counters.get("Stopped", 0) + failed
    most = description["HyperParameterTuningJobConfig"]["ResourceLimits"].get("MaxNumberOfTrainingJobs")
    text = f"{description[TUNING.status_member]}, {done} of {counted(most, 'trial')} finished"
    if failed:
        text += f", {failed} of them failed"
    metric = description.get("BestTrainingJob", {}).get("FinalHyperParameterTuningJobObjectiveMetric")
    return text + (f", best so far {metric['MetricName']} {number(metric['Value'])}" if metric else "")


def tuning_failure(result: TuningResult) -> JobFailure:
    """The failure for a tuning job that did not complete, with the first failure of its training jobs."""
    description = result.description
    name, status, arn = (
        description[member] for member in (TUNING.name_member, TUNING.status_member, TUNING.arn_member)
    )
    reason = description.get("FailureReason") or "no reason was given"
    parts = [f"tuning job {name} ended as {status}: {reason}"]
    failed = next((trial for trial in result.trials if trial.get("FailureReason")), None)
    if failed is not None:
        job = failed["TrainingJobName"]
        parts += [
            f"The first training job that failed, {job}: {failed['FailureReason']}",
        ]
        if log := TRAINING.links(failed["TrainingJobArn"], job).get("logs"):
            parts.append(f"Its log: {log}")
    remedy = (
        "start the run again if stopping it was wrong: trials that have finished are not run again"
        if status == "Stopped"
        else "mend what the training jobs' logs show, or go back to Ray Tune (no native_tuning)"
    )
    url = TUNING.links(arn, name).get("console")
    text = "\n".join([*parts, f"What to do: {remedy}.", *([f"Job: {url}"] if url else [])])
    metadata = {"tuning_job": name, "failure_reason": reason}
    if url:
        metadata["tuning_console"] = dg.MetadataValue.url(url)
    return JobFailure(text, metadata, allow_retries=False, job_name="", reason=(failed or {}).get("FailureReason", ""))
