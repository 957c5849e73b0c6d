"""Tuning jobs that really run their training jobs."""

from typing import Any

import pytest

from tests.sagemaker_emulator.testing import Aws
from tests.waiting import until

SCRIPT = """
import json
given = json.load(open("/opt/ml/input/config/hyperparameters.json"))
if given.get("fail") == "yes": raise SystemExit(1)
print("objective=%s;" % abs(float(given["eta"]) - 0.3))
"""


def request(aws: Aws, name: str, ranges: dict[str, Any], script: str = SCRIPT, **config: Any) -> dict[str, Any]:
    training = aws.training_request(name, script)
    algorithm = training["AlgorithmSpecification"]
    # Tuning jobs have no container entry point: the image's own command gets the argument `train`.
    entrypoint = algorithm.pop("ContainerEntrypoint")
    assert entrypoint[0] == "python3"
    algorithm["TrainingImage"] = "tuning-image"
    algorithm["MetricDefinitions"] = [{"Name": "objective", "Regex": "objective=(.*?);"}]
    members = ("AlgorithmSpecification", "RoleArn", "InputDataConfig", "OutputDataConfig", "ResourceConfig")
    return {
        "HyperParameterTuningJobName": name,
        "HyperParameterTuningJobConfig": {
            "Strategy": "Random",
            "HyperParameterTuningJobObjective": {"Type": "Minimize", "MetricName": "objective"},
            "ResourceLimits": {"MaxNumberOfTrainingJobs": 4, "MaxParallelTrainingJobs": 2},
            "ParameterRanges": ranges,
            "RandomSeed": 7,
            **config,
        },
        "TrainingJobDefinition": {
            "StaticHyperParameters": {"rounds": "10"},
            "StoppingCondition": training["StoppingCondition"],
            **{member: training[member] for member in members},
        },
    }


CONTINUOUS = {"ContinuousParameterRanges": [{"Name": "eta", "MinValue": "0.1", "MaxValue": "0.9"}]}


def await_tuning(aws: Aws, name: str) -> dict[str, Any]:
    def describe() -> dict[str, Any]:
        return aws.sagemaker.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)

    until(lambda: describe()["HyperParameterTuningJobStatus"] in ("Completed", "Failed", "Stopped"))
    return describe()


def children(aws: Aws, name: str, **options: Any) -> list[dict[str, Any]]:
    listed = aws.sagemaker.list_training_jobs_for_hyper_parameter_tuning_job(
        HyperParameterTuningJobName=name, **options
    )
    return listed["TrainingJobSummaries"]


def test_random_search_finds_the_best_training_job(aws: Aws) -> None:
    aws.sagemaker.create_hyper_parameter_tuning_job(**request(aws, "tune", CONTINUOUS))
    done = await_tuning(aws, "tune")
    assert done["HyperParameterTuningJobStatus"] == "Completed"
    assert done["TrainingJobStatusCounters"]["Completed"] == 4
    ranked = children(aws, "tune", SortBy="FinalObjectiveMetricValue", SortOrder="Ascending")
    values = [c["FinalHyperParameterTuningJobObjectiveMetric"]["Value"] for c in ranked]
    assert values == sorted(values)
    assert len(set(values)) == 4
    best = done["BestTrainingJob"]
    assert best["TrainingJobName"] == ranked[0]["TrainingJobName"]
    assert values[0] == pytest.approx(abs(float(best["TunedHyperParameters"]["eta"]) - 0.3), abs=1e-6)
    job = aws.describe_training(best["TrainingJobName"])
    assert job["TuningJobArn"] == done["HyperParameterTuningJobArn"]
    assert job["HyperParameters"]["rounds"] == "10"


def test_grid_with_failures_and_all_failing(aws: Aws) -> None:
    ranges = {"CategoricalParameterRanges": [
        {"Name": "eta", "Values": ["0.1", "0.2"]}, {"Name": "fail", "Values": ["no", "yes"]},
    ]}  # fmt: skip
    limits = {"MaxParallelTrainingJobs": 4}
    aws.sagemaker.create_hyper_parameter_tuning_job(
        **request(aws, "grid", ranges, Strategy="Grid", ResourceLimits=limits)
    )
    done = await_tuning(aws, "grid")
    assert done["ObjectiveStatusCounters"] == {"Succeeded": 2, "Pending": 0, "Failed": 2}
    assert done["BestTrainingJob"]["TunedHyperParameters"] == {"eta": "0.2", "fail": "no"}
    aws.sagemaker.create_hyper_parameter_tuning_job(**request(aws, "hopeless", CONTINUOUS, "raise SystemExit(2)"))
    done = await_tuning(aws, "hopeless")
    assert done["HyperParameterTuningJobStatus"] == "Failed"
    assert "All training jobs failed" in done["FailureReason"]


def test_stop_ends_the_training_jobs(aws: Aws) -> None:
    script = "import time\nprint('up', flush=True)\ntime.sleep(60)"
    aws.sagemaker.create_hyper_parameter_tuning_job(**request(aws, "halt", CONTINUOUS, script))
    until(lambda: sum(c["TrainingJobStatus"] == "InProgress" for c in children(aws, "halt")) == 2)
    aws.sagemaker.stop_hyper_parameter_tuning_job(HyperParameterTuningJobName="halt")
    done = await_tuning(aws, "halt")
    assert done["HyperParameterTuningJobStatus"] == "Stopped"
    assert [c["TrainingJobStatus"] for c in children(aws, "halt")] == ["Stopped", "Stopped"]


def test_refusals(aws: Aws) -> None:
    create = aws.sagemaker.create_hyper_parameter_tuning_job
    error = aws.sagemaker.exceptions.ClientError
    with pytest.raises(error, match="does not emulate the Hyperband strategy"):
        create(**request(aws, "band", CONTINUOUS, Strategy="Hyperband"))
    with pytest.raises(error, match=r"at 'hyperParameterTuningJobName'.*less than or equal to 32"):
        create(**request(aws, "x" * 33, CONTINUOUS))
    bad = request(aws, "metric", CONTINUOUS)
    bad["HyperParameterTuningJobConfig"]["HyperParameterTuningJobObjective"]["MetricName"] = "other"
    with pytest.raises(error, match="isn't valid"):
        create(**bad)
