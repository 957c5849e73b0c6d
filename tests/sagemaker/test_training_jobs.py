"""Step `tune_model` as a training job that is interrupted, stopped, or loses a host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import xgboost as xgb

from step_scripts.training.boosting import SegmentedBoosting, finished, quantile_matrices, xgboost_parameters
from tests.sagemaker.tuning_runs import TRAIN, TuningRun, inputs_on_s3, kept_trials
from tests.sagemaker_emulator.probe import abilities
from tests.split_files import splits_of
from tests.waiting import until

if TYPE_CHECKING:
    from tests.sagemaker_emulator.testing import Aws

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not abilities().namespaces, reason=f"needs hosts of their own: {abilities().reason}"),
]
# Trials of some seconds each, one after the other.
SLOW_TRIALS = {
    "num_boost_round": 1500,
    "early_stopping_rounds": 1500,
    "num_trials": 3,
    "max_concurrent_trials": 1,
    "scheduler": "none",
    "max_depth_min": 6,
    "max_depth_max": 8,
}


def trials_left(aws: Aws) -> list[dict[str, Any]]:
    """The records that are kept."""
    return [json.loads(aws.get(key)) for key in kept_trials(aws)]


def test_spot_interruption_in_mid_tuning_loses_no_finished_trial(
    aws: Aws, aws_environment: object, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []

    def interrupt() -> None:
        until(lambda: kept_trials(aws))
        aws.faults.interrupt_spot("housing-tuned-*")
        until(lambda: [s for s in statuses(aws) if "Interrupted" in s])
        seen.extend(trials_left(aws))

    run = TuningRun(
        aws.uri(), inputs_on_s3(aws, tmp_path), SLOW_TRIALS, hosts=2, meanwhile=interrupt, job={"use_spot": True}
    )
    assert run.success, run.error
    assert seen, run.log
    assert "Interrupted" in run.secondary_statuses
    assert run.secondary_statuses.count("Training") == 2
    assert len(run.trials) == 3
    for record in seen:
        assert record in run.trials, "not run again"
    assert f"not run again, finished before: {len(seen)} of 3 trials" in run.log
    assert run.metadata["spot_savings_percent"] > 0
    assert run.metadata["billable_seconds"] > 0
    assert len(run.result.nodes) == 2
    assert kept_trials(aws) == [], "removed after the success"


def statuses(aws: Aws) -> list[list[str]]:
    """Secondary statuses of this test's training jobs."""
    listed = aws.sagemaker.list_training_jobs(NameContains="housing-tuned", MaxResults=100)["TrainingJobSummaries"]
    jobs = [aws.describe_training(job["TrainingJobName"]) for job in listed]
    own = [job for job in jobs if aws.bucket in job["OutputDataConfig"]["S3OutputPath"]]
    return [[item["Status"] for item in job["SecondaryStatusTransitions"]] for job in own]


def test_after_a_stopped_job_the_next_run_goes_on_with_the_finished_trials(
    aws: Aws, aws_environment: object, tmp_path: Path
) -> None:
    inputs = inputs_on_s3(aws, tmp_path)

    def stop() -> None:
        until(lambda: kept_trials(aws))
        [name] = {key.split("/")[1] for key in aws.keys("jobs/housing-tuned-")}
        aws.sagemaker.stop_training_job(TrainingJobName=name)

    first = TuningRun(aws.uri(), inputs, SLOW_TRIALS, meanwhile=stop)
    assert not first.success
    assert "ended as Stopped" in first.error
    assert aws.keys("artifacts/") == []
    kept = trials_left(aws)
    assert 0 < len(kept) < 3
    second = TuningRun(aws.uri(), inputs, SLOW_TRIALS)
    assert second.success, second.error
    assert len(second.result.nodes) == 1
    for record in kept:
        assert record in second.trials
    assert f"not run again, finished before: {len(kept)} of 3 trials" in second.log
    assert kept_trials(aws) == []


def test_the_final_fit_survives_the_loss_of_a_host(aws: Aws, aws_environment: object, tmp_path: Path) -> None:
    inputs = inputs_on_s3(aws, tmp_path)
    rounds = 250
    params = {
        "num_boost_round": rounds,
        "early_stopping_rounds": rounds,
        "num_trials": 1,
        "scheduler": "none",
        # Which rows are left out depends on the number of workers.
        "subsample_min": 1.0,
        "subsample_max": 1.0,
    }

    seen: set[str] = set()

    def second_checkpoint() -> bool:
        # While the second is written, the first is known to be one.
        seen.update(key for key in aws.keys("jobs/checkpoints/") if key.endswith(".checkpoint"))
        return len(seen) > 1

    def lose_host() -> None:
        until(second_checkpoint)
        aws.faults.kill_host("housing-tuned-*", "algo-2", noticed=False)

    run = TuningRun(aws.uri(), inputs, params, hosts=3, meanwhile=lose_host)
    assert run.success, run.error
    assert "host algo-2" in run.log
    details = run.result.details
    assert details["num_workers"] == 2
    assert 0 < details["fit_resumed_at_round"] < rounds
    assert len(details["nodes"]) == 2
    assert details["nodes"] == run.result.nodes
    # Bins are made from the workers' summaries of their rows, and so differ a little from those of one process.
    train, validation = splits_of(inputs, TRAIN)
    matrices = quantile_matrices(train.load(), validation.load(), 1)
    alone = xgb.train(
        xgboost_parameters(details["best_parameters"], seed=run.result.params["seed"] or 0),
        matrices[0],
        rounds,
        evals=[(matrices[0], "train"), (matrices[1], "validation")],
        verbose_eval=False,
        callbacks=[SegmentedBoosting(rounds, rounds)],
    )
    _, history = finished(alone, train.scaler.features)
    assert run.result.metrics["validation_rmse"] == pytest.approx(min(history.validation), rel=0.05)
    left = [key for key in aws.keys("jobs/checkpoints/") if not key.endswith("/")]
    assert left == []
