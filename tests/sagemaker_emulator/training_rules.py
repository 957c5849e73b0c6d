"""What a CreateTrainingJob request must satisfy beyond the service model."""

import re

from tests.sagemaker_emulator.common import Params
from tests.sagemaker_emulator.errors import not_emulated, validation

_REFUSED = (
    "DebugHookConfig", "DebugRuleConfigurations", "TensorBoardOutputConfig", "ProfilerRuleConfigurations",
    "ServerlessJobConfig", "MlflowConfig", "ModelPackageConfig", "RemoteDebugConfig", "SessionChainingConfig",
)  # fmt: skip
_DAY = 86400


def check_training_request(params: Params) -> None:
    """The rules that are not in the service model, and what is not emulated."""
    for member in _REFUSED:
        if params.get(member):
            raise not_emulated(f"{member} of training jobs")
    if (profiler := params.get("ProfilerConfig")) and not profiler.get("DisableProfiler"):
        raise not_emulated("the profiler")
    algorithm = params.get("AlgorithmSpecification")
    if not algorithm:
        raise validation("AlgorithmSpecification is required.")
    if not algorithm.get("TrainingImage"):
        raise not_emulated("training by AlgorithmName; give a TrainingImage")
    config = params.get("ResourceConfig")
    if not config:
        raise validation("ResourceConfig is required.")
    for member in ("TrainingPlanArn", "InstancePlacementConfig", "InstancePreferences"):
        if config.get(member):
            raise not_emulated(f"{member} of training jobs")
    if config.get("InstanceGroups"):
        if config.get("InstanceType") or config.get("InstanceCount"):
            raise validation("InstanceGroups cannot be combined with InstanceType or InstanceCount.")
    elif not config.get("InstanceType") or not config.get("InstanceCount"):
        raise validation("Either InstanceGroups or both InstanceType and InstanceCount must be specified.")
    _check_limits(params, config)
    for definition in algorithm.get("MetricDefinitions", []):
        try:
            re.compile(definition["Regex"])
        except re.error as error:
            raise validation(f"The regex of metric {definition['Name']} is invalid: {error}") from error
    names = [channel["ChannelName"] for channel in params.get("InputDataConfig", [])]
    if len(names) != len(set(names)):
        raise validation("Channel names must be unique.")
    for channel in params.get("InputDataConfig", []):
        _check_channel(channel, algorithm)


def _check_limits(params: Params, config: Params) -> None:
    condition = params.get("StoppingCondition", {})
    longest = condition.get("MaxWaitTimeInSeconds")
    if params.get("EnableManagedSpotTraining"):
        if longest is None:
            raise validation("MaxWaitTimeInSeconds must be specified when EnableManagedSpotTraining is true.")
        if longest < condition.get("MaxRuntimeInSeconds", _DAY):
            raise validation(
                "Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal to MaxRuntimeInSeconds"
            )
        if config.get("KeepAlivePeriodInSeconds"):
            raise validation("KeepAlivePeriodInSeconds is not supported with managed spot training.")
    elif longest is not None:
        raise validation("MaxWaitTimeInSeconds above 0 is not supported without EnableManagedSpotTraining.")


def _check_channel(channel: Params, algorithm: Params) -> None:
    source = channel["DataSource"].get("S3DataSource")
    if source is None:
        raise not_emulated("channels that are not on S3")
    if source["S3DataType"] not in ("S3Prefix", "ManifestFile"):
        raise not_emulated(f"channels of S3DataType {source['S3DataType']}")
    if channel.get("InputMode", algorithm["TrainingInputMode"]) == "Pipe":
        raise not_emulated("input mode Pipe")
    if channel.get("ShuffleConfig"):
        raise not_emulated("ShuffleConfig of channels")
    for member in ("CompressionType", "RecordWrapperType"):
        if channel.get(member, "None") != "None":
            raise not_emulated(f"{member} {channel[member]} of channels")
