"""The trials of `tune_model` as a SageMaker tuning job: collected as if Ray Tune had run them.

The records are written where an interrupted search keeps its finished trials. The step then finds nothing left to
search, and goes straight to the final fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import dagster as dg

from resources.aws.calls import pages
from resources.sagemaker.job_files import JobInputs, JobSettings
from resources.sagemaker.job_kinds import TRAINING, TUNING
from resources.sagemaker.job_names import digest_of, request_digest, tuning_job_name
from resources.sagemaker.job_reports import JobFailure
from resources.sagemaker.job_requests import JobConfig
from resources.sagemaker.job_run import Context, JobRun
from resources.sagemaker.tuning_requests import NativeTuningConfig, tuning_request
from step_scripts.parameters import TuneModelParams, TuneModelSettings
from step_scripts.runner.contract import StepRequest
from step_scripts.runner.wording import counted, number
from step_scripts.training.trials import OBJECTIVE, TRIAL_MODULE, TUNED, TrialRecord, TrialStore, fingerprint

URI_VARIABLE = "HOUSING_JOB_URI"


@dataclass(frozen=True)
class TuningResult:
    """An ended tuning job: its description, and those of its training jobs in the order of their creation."""

    description: dict[str, Any]
    trials: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class NativeTuning:
    """Runs the trials that a request of `tune_model` still needs, as a tuning job. `channels`: s3:// prefixes by name.

    There is no Pipes session: SageMaker starts the training jobs, and they report by metrics.
    """

    settings: JobSettings
    config: NativeTuningConfig
    job: JobConfig
    image: str
    channels: Mapping[str, str]

    def create_request(self, search: TuneModelSettings, trials: int, finished: int) -> dict[str, Any]:
        """Parameters of the tuning job, without its name."""
        return tuning_request(
            self.job,
            self.config,
            search,
            trials=trials,
            finished=finished,
            image=self.image,
            output_uri=self.settings.job_root,
            channels=self.channels,
            environment={"HOUSING_TRAIN_MODULE": TRIAL_MODULE},
        )

    def run(self, context: Context, request: StepRequest) -> dict[str, Any]:
        """Run the trials that are not in the request's checkpoints yet, and put them there; metadata about the job.

        Raises `JobFailure` unless the tuning job completes; what it has finished is kept all the same.
        """
        params = TuneModelParams.model_validate(request.params)
        store = TrialStore(request.shared_checkpoint_uri, fingerprint(params, request.origins))
        finished = store.load()
        wanted = params.resolved()["num_trials"]
        if len(finished) >= wanted:
            context.log.info(f"{len(finished)} of {counted(wanted, 'trial')} finished before; no tuning job is needed")
            return {}
        params_of_job = self.create_request(params, wanted - len(finished), len(finished))
        inputs = JobInputs(
            files={"request.json": request.model_dump_json().encode()},
            uri_variable=URI_VARIABLE,
            digest=digest_of([f"{request.digest} {len(finished)}", request_digest(params_of_job)]),
        )
        result = self._run_job(context, params_of_job, inputs, request.not_before)
        completed = result.description[TUNING.status_member] == "Completed"
        for record in trial_records(result, params.resolved()["num_boost_round"], {r.trial for r in finished}):
            if completed or record.status == "completed":  # the others are to be run again
                store.save(record)
            context.log.info(record.describe())
        if not completed:
            raise tuning_failure(result)
        return _metadata(result)

    def _run_job(
        self, context: Context, params: Mapping[str, Any], inputs: JobInputs, completed_after: datetime | None
    ) -> TuningResult:
        """Run the tuning job to whatever end."""
        job = JobRun(self.settings, TUNING, context, params, inputs, tuning_job_name)
        job.find(completed_after, reports_by_pipes=False)
        said = ""

        def see(description: Mapping[str, Any]) -> None:
            nonlocal said
            if (progress := _progress(description)) != said:
                said = progress
                context.log.info(f"tuning job {job.name}: {progress}")

        with job.leased():
            if job.description is None:
                job.start()
            description = job.wait(see)
        client, listing = self.settings.client("sagemaker"), "list_training_jobs_for_hyper_parameter_tuning_job"
        which: dict[str, Any] = {TUNING.name_member: job.name}
        trials = []
        for summary in pages(
            client, listing, "TrainingJobSummaries", SortBy="CreationTime", SortOrder="Ascending", **which
        ):
            trial = client.describe_training_job(TrainingJobName=summary["TrainingJobName"])
            trials.append({**trial, "TunedHyperParameters": summary["TunedHyperParameters"]})
        return TuningResult(description, trials)


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


def trial_records(result: TuningResult, num_boost_round: int, taken: set[int]) -> list[TrialRecord]:
    """The training jobs of a tuning job as records of trials, with the free numbers from 1 on."""
    numbers = (number for number in range(1, len(taken) + len(result.trials) + 1) if number not in taken)
    return [_record(next(numbers), trial, num_boost_round) for trial in result.trials]


def _record(number: int, trial: Mapping[str, Any], num_boost_round: int) -> TrialRecord:
    given = {**trial.get("HyperParameters", {}), **trial["TunedHyperParameters"]}
    parameters = {name: kind(float(given[name])) for name, kind in TUNED.items()}
    metrics = {metric["MetricName"]: metric["Value"] for metric in trial.get("FinalMetricDataList", [])}
    seconds = float(trial.get("TrainingTimeInSeconds") or TRAINING.running_seconds(trial) or 0.0)
    if trial["TrainingJobStatus"] != "Completed" or OBJECTIVE not in metrics:
        error = trial.get("FailureReason") or f"the training job ended as {trial['TrainingJobStatus']}"
        return TrialRecord(
            trial=number, parameters=parameters, rmse=None, rounds=0, best_rounds=0, seconds=seconds, status="failed",
            stopped_by="error", error=error,
        )  # fmt: skip
    rounds = int(metrics.get("trial:rounds", num_boost_round))
    return TrialRecord(
        trial=number,
        parameters=parameters,
        rmse=float(metrics[OBJECTIVE]),
        rounds=rounds,
        best_rounds=int(metrics.get("trial:best_rounds", rounds)),
        seconds=seconds,
        status="completed",
        stopped_by="all_rounds" if rounds >= num_boost_round else "early_stopping",
    )


def _metadata(result: TuningResult) -> dict[str, Any]:
    description = result.description
    name, arn = description[TUNING.name_member], description[TUNING.arn_member]
    started, ended = description[TUNING.started], description.get(TUNING.ended)
    links = TUNING.links(arn, name)
    metadata: dict[str, Any] = {
        "tuning_job": name,
        "tuning_job_arn": arn,
        **({"tuning_console": dg.MetadataValue.url(links["console"])} if links else {}),
        "tuning_trials": len(result.trials),
        "tuning_billable_seconds": sum(int(trial.get("BillableTimeInSeconds", 0)) for trial in result.trials),
    }
    if ended is not None:
        metadata["tuning_job_seconds"] = round((ended - started).total_seconds(), 1)
    return metadata
