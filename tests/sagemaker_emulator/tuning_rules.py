"""What a tuning job's request means: its objective, its training jobs' requests, and what it must satisfy."""

from tests.sagemaker_emulator.common import Params, pick
from tests.sagemaker_emulator.errors import ApiError, not_emulated, validation
from tests.sagemaker_emulator.search_space import check_ranges
from tests.sagemaker_emulator.training_rules import check_training_request

_PASSED_ON = (
    "AlgorithmSpecification", "RoleArn", "InputDataConfig", "VpcConfig", "OutputDataConfig", "StoppingCondition",
    "EnableNetworkIsolation", "EnableInterContainerTrafficEncryption", "EnableManagedSpotTraining", "CheckpointConfig",
    "RetryStrategy", "Environment", "ResourceConfig",
)  # fmt: skip


def objective_of(params: Params) -> Params:
    """The objective, wherever the request puts it."""
    definition = params["TrainingJobDefinition"]
    objective = params["HyperParameterTuningJobConfig"].get("HyperParameterTuningJobObjective")
    return objective or definition.get("TuningObjective") or {}


def child_request(definition: Params, name: str, tuned: dict[str, str], objective: Params) -> Params:
    """CreateTrainingJob request of one training job of a tuning job."""
    request: Params = {"TrainingJobName": name, **pick(definition, _PASSED_ON)}
    request["HyperParameters"] = {
        **definition.get("StaticHyperParameters", {}),
        **tuned,
        "_tuning_objective_metric": objective.get("MetricName", ""),
    }
    if config := definition.get("HyperParameterTuningResourceConfig"):
        request["ResourceConfig"] = pick(config, ("InstanceType", "InstanceCount", "VolumeSizeInGB"))
    if checkpoint := definition.get("CheckpointConfig"):
        # One prefix for all would make the training jobs overwrite and restore each other's files.
        request["CheckpointConfig"] = {**checkpoint, "S3Uri": f"{checkpoint['S3Uri'].rstrip('/')}/{name}"}
    return request


def check_tuning_request(params: Params) -> None:
    """The rules that are not in the service model, and what is not emulated."""
    config = params["HyperParameterTuningJobConfig"]
    for member in ("WarmStartConfig", "TrainingJobDefinitions", "Autotune"):
        if params.get(member):
            raise not_emulated(f"{member} of tuning jobs")
    if config["Strategy"] == "Hyperband":
        raise not_emulated("the Hyperband strategy")
    if config.get("TrainingJobEarlyStoppingType", "Off") != "Off":
        raise not_emulated("TrainingJobEarlyStoppingType Auto")
    criteria = config.get("TuningJobCompletionCriteria", {})
    if criteria.get("BestObjectiveNotImproving") or criteria.get("ConvergenceDetected"):
        raise not_emulated("completion criteria other than TargetObjectiveMetricValue")
    definition = params.get("TrainingJobDefinition")
    if not definition:
        raise validation("TrainingJobDefinition is required.")
    ranges = definition.get("HyperParameterRanges") or config.get("ParameterRanges")
    if not ranges:
        raise validation("ParameterRanges is required.")
    check_ranges(config["Strategy"], ranges)
    objective = objective_of(params)
    if not objective:
        raise validation("HyperParameterTuningJobObjective is required.")
    metrics = [d["Name"] for d in definition["AlgorithmSpecification"].get("MetricDefinitions", [])]
    if objective["MetricName"] not in metrics:
        raise validation(
            f"The objective metric for the hyperparameter tuning job, [{objective['MetricName']}], isn't valid: "
            f"it is not among the MetricDefinitions {metrics}."
        )
    if config["Strategy"] != "Grid" and not config["ResourceLimits"].get("MaxNumberOfTrainingJobs"):
        raise validation("MaxNumberOfTrainingJobs is required.")
    resources = definition.get("HyperParameterTuningResourceConfig", {})
    if resources.get("InstanceConfigs"):
        raise not_emulated("InstanceConfigs of tuning jobs")
    if definition["AlgorithmSpecification"].get("AlgorithmName"):
        raise not_emulated("tuning by AlgorithmName; give a TrainingImage")
    first = child_request(definition, "check", {}, objective)
    try:
        check_training_request(first)
    except ApiError as error:
        raise ApiError(error.code, f"TrainingJobDefinition: {error.message}") from error
