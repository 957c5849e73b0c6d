"""Configuration of native tuning jobs, and the create request made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from resources.sagemaker.job_requests import JobConfig, training_request
from step_scripts.parameters import TuneModelSettings
from step_scripts.training.trials import METRICS, OBJECTIVE, TUNED

_DEFINITION = (
    "RoleArn", "InputDataConfig", "OutputDataConfig", "ResourceConfig", "StoppingCondition", "VpcConfig",
    "EnableNetworkIsolation", "EnableInterContainerTrafficEncryption", "EnableManagedSpotTraining", "RetryStrategy",
    "Environment",
)  # fmt: skip
_LARGEST_SEED = 2**31 - 1
_LOGARITHMIC = {"eta"}


class NativeTuningConfig(dg.Config):
    """Trials as training jobs of a SageMaker tuning job, instead of Ray Tune inside the training job."""

    strategy: Literal["Bayesian", "Random"] = Field(default="Bayesian", description="How SageMaker chooses trials.")
    max_parallel_jobs: int = Field(default=2, ge=1, le=100, description="Trials at a time, each on one host.")
    instance_type: str | None = Field(default=None, description="Of the trials. Empty: that of tune_model's job.")
    max_run_seconds: int | None = Field(
        default=None, ge=1, description="Longest running time of a trial; seconds. Empty: that of tune_model's job."
    )


def tuning_request(
    config: JobConfig,
    tuning: NativeTuningConfig,
    search: TuneModelSettings,
    *,
    trials: int,
    finished: int,
    image: str,
    output_uri: str,
    channels: Mapping[str, str],
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Parameters of `create_hyper_parameter_tuning_job` without a name, for `trials` trials after `finished` others.

    The ranges are those of `search`; what has only one value is static. The image must answer the argument `train`.
    """
    changes = {
        "instance_count": 1,
        "instance_groups": [],
        "keep_alive_seconds": 0,
        "checkpoint_uri": None,
        "instance_type": tuning.instance_type or config.instance_type,
        "max_run_seconds": tuning.max_run_seconds or config.max_run_seconds,
        "environment": {**config.environment, **environment},
    }
    trial = training_request(
        JobConfig(**{**config.model_dump(), **changes}),
        image=image,
        entrypoint=[],
        output_uri=output_uri,
        channels=channels,
    )
    ranges, static = _ranges(search)
    definition = {member: trial[member] for member in _DEFINITION if member in trial}
    definition["AlgorithmSpecification"] = {
        "TrainingImage": image,
        "TrainingInputMode": "File",
        "MetricDefinitions": [{"Name": name, "Regex": pattern} for name, pattern in METRICS.items()],
    }
    if static:
        definition["StaticHyperParameters"] = static
    request: dict[str, Any] = {
        "HyperParameterTuningJobConfig": {
            "Strategy": tuning.strategy,
            "HyperParameterTuningJobObjective": {"Type": "Minimize", "MetricName": OBJECTIVE},
            "ResourceLimits": {
                "MaxNumberOfTrainingJobs": trials,
                "MaxParallelTrainingJobs": min(tuning.max_parallel_jobs, trials),
            },
            "ParameterRanges": ranges,
            # Another seed after an interruption: the same one would propose the finished trials again.
            "RandomSeed": (search.resolved()["seed"] + finished) % _LARGEST_SEED,
        },
        "TrainingJobDefinition": definition,
    }
    if "Tags" in trial:
        request["Tags"] = trial["Tags"]
    return request


def _ranges(search: TuneModelSettings) -> tuple[dict[str, list[dict[str, str]]], dict[str, str]]:
    """Ranges as the API takes them, and the values of what has only one."""
    resolved = search.resolved()
    ranges: dict[str, list[dict[str, str]]] = {}
    static: dict[str, str] = {}
    for name, kind in TUNED.items():
        low, high = resolved[f"{name}_min"], resolved[f"{name}_max"]
        if low == high:
            static[name] = str(low)
            continue
        member = "IntegerParameterRanges" if kind is int else "ContinuousParameterRanges"
        scaling = "Logarithmic" if name in _LOGARITHMIC else "Linear"
        entry = {"Name": name, "MinValue": str(low), "MaxValue": str(high), "ScalingType": scaling}
        ranges.setdefault(member, []).append(entry)
    if not ranges:
        raise ValueError("native tuning needs at least one hyperparameter whose range has more than one value")
    return ranges, static
