"""The trials of `tune_model` as a SageMaker tuning job: collected as if Ray Tune had run them.

The records are written where an interrupted search keeps its finished trials. The step then finds nothing left to
search, and goes straight to the final fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from resources.sagemaker.job_kinds import TRAINING, TUNING
from resources.sagemaker.job_requests import JobConfig
from resources.sagemaker.pipes_client import Context, PipesSageMakerClient
from resources.sagemaker.tuning_client import TuningJobs, TuningResult, tuning_failure
from resources.sagemaker.tuning_requests import NativeTuningConfig, tuning_request
from step_scripts.parameters import TuneModelParams, TuneModelSettings
from step_scripts.runner.contract import StepRequest
from step_scripts.runner.wording import counted
from step_scripts.training.trials import OBJECTIVE, TRIAL_MODULE, TUNED, TrialRecord, TrialStore, fingerprint


class NativeTuning:
    """Runs the trials that a request of `tune_model` still needs."""

    def __init__(
        self,
        client: PipesSageMakerClient,
        config: NativeTuningConfig,
        job: JobConfig,
        *,
        image: str,
        channels: Mapping[str, str],
    ) -> None:
        self._client = client
        self._config = config
        self._job = job
        self._image = image
        self._channels = channels

    def create_request(self, search: TuneModelSettings, trials: int, finished: int) -> dict[str, Any]:
        """Parameters of the tuning job, without its name."""
        return tuning_request(
            self._job,
            self._config,
            search,
            trials=trials,
            finished=finished,
            image=self._image,
            output_uri=self._client.job_root,
            channels=self._channels,
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
        files = {"request.json": request.model_dump_json().encode()}
        digest = f"{request.digest} {len(finished)}"
        result = TuningJobs(self._client).run(context, params_of_job, files, digest, request.not_before)
        completed = result.description[TUNING.status_member] == "Completed"
        for record in trial_records(result, params.resolved()["num_boost_round"], {r.trial for r in finished}):
            if completed or record.status == "completed":  # the others are to be run again
                store.save(record)
            context.log.info(record.describe())
        if not completed:
            raise tuning_failure(result)
        return _metadata(result)


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
