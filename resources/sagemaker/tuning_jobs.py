"""The trials of `tune_model` as a SageMaker tuning job: collected as if Ray Tune had run them.

The records are written where an interrupted search keeps its finished trials. The step then finds nothing left to
search, and goes straight to the final fit.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from resources.aws.calls import pages
from resources.sagemaker.job_files import JobInputs, JobSettings
from resources.sagemaker.job_requests import JobConfig, training_request
from resources.sagemaker.job_run import Context, JobRun
from resources.sagemaker.jobs import TRAINING, TUNING, Job, digest_of, request_digest
from step_scripts.parameters import TUNED, TuneModelParams, TuneModelSettings
from step_scripts.runner.contract import StepRequest
from step_scripts.runner.wording import counted
from step_scripts.training.trials import METRICS, OBJECTIVE, TRIAL_MODULE, TrialRecord, TrialStore, fingerprint

URI_VARIABLE = "HOUSING_JOB_URI"
_LARGEST_SEED = 2**31 - 1


class NativeTuningConfig(dg.Config):
    """Trials as training jobs of a SageMaker tuning job, instead of Ray Tune inside the training job."""

    strategy: Literal["Bayesian", "Random"] = Field(default="Bayesian", description="How SageMaker chooses trials.")
    max_parallel_jobs: int = Field(default=2, ge=1, le=100, description="Trials at a time, each on one host.")
    instance_type: str | None = Field(default=None, description="Of the trials. Empty: that of tune_model's job.")
    max_run_seconds: int | None = Field(
        default=None, ge=1, description="Longest running time of a trial; seconds. Empty: that of tune_model's job."
    )


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
        """Parameters of `create_hyper_parameter_tuning_job` without a name, for `trials` after `finished` others.

        The ranges are those of `search`; what has only one value is static. The image must answer the argument `train`.
        """
        changes = {
            "instance_count": 1,
            "instance_groups": [],
            "keep_alive_seconds": 0,
            "checkpoint_uri": None,
            "instance_type": self.config.instance_type or self.job.instance_type,
            "max_run_seconds": self.config.max_run_seconds or self.job.max_run_seconds,
            "environment": {**self.job.environment, "HOUSING_TRAIN_MODULE": TRIAL_MODULE},
        }
        trial = training_request(
            JobConfig(**{**self.job.model_dump(), **changes}),
            image=self.image,
            entrypoint=[],
            channels=self.channels,
            output_uri=self.settings.job_root,
        )
        metrics = [{"Name": name, "Regex": pattern} for name, pattern in METRICS.items()]
        trial["AlgorithmSpecification"]["MetricDefinitions"] = metrics
        tags = {"Tags": trial.pop("Tags")} if "Tags" in trial else {}
        ranges, static = _ranges(search)
        return {
            "HyperParameterTuningJobConfig": {
                "Strategy": self.config.strategy,
                "HyperParameterTuningJobObjective": {"Type": "Minimize", "MetricName": OBJECTIVE},
                "ResourceLimits": {
                    "MaxNumberOfTrainingJobs": trials,
                    "MaxParallelTrainingJobs": min(self.config.max_parallel_jobs, trials),
                },
                "ParameterRanges": ranges,
                # Another seed after an interruption: the same one would propose the finished trials again.
                "RandomSeed": (search.resolved()["seed"] + finished) % _LARGEST_SEED,
            },
            "TrainingJobDefinition": trial | ({"StaticHyperParameters": static} if static else {}),
            **tags,
        }

    def run(self, context: Context, request: StepRequest) -> dict[str, Any]:
        """Run the trials that are not in the request's checkpoints yet, and put them there; metadata about the job.

        Raises `dagster.Failure` unless the tuning job completes; what it has finished is kept all the same.
        """
        search = TuneModelParams.model_validate(request.params)
        store = TrialStore(request.shared_checkpoint_uri, fingerprint(search, request.origins))
        finished = store.load()
        wanted = search.resolved()["num_trials"]
        if len(finished) >= wanted:
            context.log.info(f"{len(finished)} of {counted(wanted, 'trial')} finished before; no tuning job is needed")
            return {}
        params = self.create_request(search, wanted - len(finished), len(finished))
        inputs = JobInputs(
            files={"request.json": request.model_dump_json().encode()},
            uri_variable=URI_VARIABLE,
            digest=digest_of([f"{request.digest} {len(finished)}", request_digest(params)]),
        )
        run = JobRun(self.settings, TUNING, context, params, inputs, request.not_before)
        with run.leased():
            if run.job is None:
                run.start()
            job = run.wait()
        trials, taken = self._trials(job), {record.trial for record in finished}
        numbers = (number for number in itertools.count(1) if number not in taken)
        for trial in trials:
            record = _record(next(numbers), trial, search.resolved()["num_boost_round"])
            if job.status == "Completed" or record.status == "completed":  # the others are to be run again
                store.save(record)
            context.log.info(record.describe())
        if job.status != "Completed":
            raise _failure(job, trials)
        return _metadata(job, trials)

    def _trials(self, job: Job) -> list[Job]:
        """The training jobs of a tuning job, in the order of their creation."""
        client, listing = self.settings.client("sagemaker"), "list_training_jobs_for_hyper_parameter_tuning_job"
        which = {TUNING.member("Name"): job.name, "SortBy": "CreationTime", "SortOrder": "Ascending"}
        return [
            TRAINING.job(summary | client.describe_training_job(TrainingJobName=summary["TrainingJobName"]))
            for summary in pages(client, listing, "TrainingJobSummaries", **which)
        ]


def _ranges(search: TuneModelSettings) -> tuple[dict[str, list[dict[str, str]]], dict[str, str]]:
    """Ranges as the API takes them, and the values of what has only one."""
    ranges: dict[str, list[dict[str, str]]] = {}
    static: dict[str, str] = {}
    for name, (low, high) in search.ranges().items():
        if low == high:
            static[name] = str(low)
            continue
        member = "IntegerParameterRanges" if TUNED[name].kind is int else "ContinuousParameterRanges"
        scaling = "Logarithmic" if TUNED[name].logarithmic else "Linear"
        entry = {"Name": name, "MinValue": str(low), "MaxValue": str(high), "ScalingType": scaling}
        ranges.setdefault(member, []).append(entry)
    if not ranges:
        raise ValueError("native tuning needs at least one hyperparameter whose range has more than one value")
    return ranges, static


def _failure(job: Job, trials: Sequence[Job]) -> dg.Failure:
    """The failure for a tuning job that did not complete, with the first failure of its training jobs."""
    reason = job.facts.get("FailureReason") or "no reason was given"
    parts = [f"{job} ended as {job.status}: {reason}"]
    if failed := next((trial for trial in trials if trial.facts.get("FailureReason")), None):
        parts.append(f"The first training job that failed, {failed.name}: {failed.facts['FailureReason']}")
        parts += [f"Its log: {url}" for what, url in failed.links().items() if what == "logs"]
    remedy = (
        "start the run again if stopping it was wrong: trials that have finished are not run again"
        if job.status == "Stopped"
        else "mend what the training jobs' logs show, or go back to Ray Tune (no native_tuning)"
    )
    page = job.links().get("console")
    text = "\n".join([*parts, f"What to do: {remedy}.", *([f"Job: {page}"] if page else [])])
    metadata = {"tuning_job": job.name, "failure_reason": reason, **_console(job)}
    return dg.Failure(text, metadata, allow_retries=False)


def _record(number: int, trial: Job, num_boost_round: int) -> TrialRecord:
    given = {**trial.facts.get("HyperParameters", {}), **trial.facts["TunedHyperParameters"]}
    parameters = {name: parameter.kind(float(given[name])) for name, parameter in TUNED.items()}
    metrics = {metric["MetricName"]: metric["Value"] for metric in trial.facts.get("FinalMetricDataList", [])}
    seconds = float(trial.facts.get("TrainingTimeInSeconds") or trial.running_seconds() or 0.0)
    record = functools.partial(TrialRecord, trial=number, parameters=parameters, seconds=seconds)
    if trial.status != "Completed" or OBJECTIVE not in metrics:
        error = trial.facts.get("FailureReason") or f"the training job ended as {trial.status}"
        return record(rmse=None, rounds=0, best_rounds=0, status="failed", stopped_by="error", error=error)
    rounds = int(metrics.get("trial:rounds", num_boost_round))
    return record(
        rmse=float(metrics[OBJECTIVE]),
        rounds=rounds,
        best_rounds=int(metrics.get("trial:best_rounds", rounds)),
        status="completed",
        stopped_by="all_rounds" if rounds >= num_boost_round else "early_stopping",
    )


def _metadata(job: Job, trials: Sequence[Job]) -> dict[str, Any]:
    seconds = job.running_seconds()
    return {
        "tuning_job": job.name,
        "tuning_job_arn": job.arn,
        **_console(job),
        "tuning_trials": len(trials),
        "tuning_billable_seconds": sum(int(trial.facts.get("BillableTimeInSeconds", 0)) for trial in trials),
        **({} if seconds is None else {"tuning_job_seconds": seconds}),
    }


def _console(job: Job) -> dict[str, Any]:
    links = job.links()
    return {"tuning_console": dg.MetadataValue.url(links["console"])} if links else {}
