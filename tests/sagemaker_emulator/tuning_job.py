"""One tuning job: starts training jobs and keeps the books."""

import secrets
import time
from dataclasses import dataclass
from typing import Any

from tests.sagemaker_emulator.common import Call, Params, arn, now, pick
from tests.sagemaker_emulator.jobs import TERMINAL, Job
from tests.sagemaker_emulator.search_space import candidates, grid_size
from tests.sagemaker_emulator.services import Services
from tests.sagemaker_emulator.training import Training
from tests.sagemaker_emulator.training_job import TrainingJob
from tests.sagemaker_emulator.tuning_rules import child_request, objective_of

_ECHOED = ("HyperParameterTuningJobName", "HyperParameterTuningJobConfig", "TrainingJobDefinition")
_TICK = 0.1


@dataclass(frozen=True)
class Child:
    """One training job of a tuning job, with the hyperparameters that were chosen for it."""

    job: TrainingJob
    tuned: dict[str, str]


class TuningJob(Job):
    """One tuning job."""

    kind = "tuning"
    log_group = "/aws/sagemaker/TrainingJobs"

    def __init__(self, services: Services, call: Call, training: Training) -> None:
        name = call.params["HyperParameterTuningJobName"]
        super().__init__(services, call, name, arn(call.region, "hyper-parameter-tuning-job", name))
        self._training = training
        self.children: list[Child] = []
        self.config: Params = self.request["HyperParameterTuningJobConfig"]
        self.definition: Params = self.request["TrainingJobDefinition"]
        self.objective: Params = objective_of(self.request)

    def fail(self, reason: str) -> None:
        self._finish("Failed", reason)

    def run(self) -> None:
        limits = self.config["ResourceLimits"]
        ranges = self.definition.get("HyperParameterRanges") or self.config["ParameterRanges"]
        values = candidates(self.config["Strategy"], ranges, self.config.get("RandomSeed"))
        most = limits.get("MaxNumberOfTrainingJobs") or grid_size(ranges)
        deadline = time.monotonic() + limits.get("MaxRuntimeInSeconds", 30 * 86400)
        while True:
            running = [child for child in self.children if child.job.status not in TERMINAL]
            done = self.stop_requested.is_set() or time.monotonic() > deadline or self._target_reached()
            if done or self.services.closing.is_set():
                for child in running:
                    if child.job.status == "InProgress":
                        child.job.stop()
                if not running:
                    return self._conclude()
            elif len(self.children) < most and len(running) < limits["MaxParallelTrainingJobs"]:
                tuned = next(values, None)
                if tuned is None:
                    most = len(self.children)
                else:
                    self._start_child(tuned)
                continue
            elif not running:
                return self._conclude()
            time.sleep(_TICK)

    def _start_child(self, tuned: dict[str, str]) -> None:
        name = f"{self.name}-{len(self.children) + 1:03d}-{secrets.token_hex(4)}"
        call = Call("CreateTrainingJob", child_request(self.definition, name, tuned, self.objective), self.region)
        self.children.append(Child(self._training.create(call, self.arn), tuned))
        self.modified = now()

    def _conclude(self) -> None:
        if self.stop_requested.is_set():
            return self._finish("Stopped")
        if self.children and all(child.job.status == "Failed" for child in self.children):
            return self._finish(
                "Failed", "All training jobs failed. Take a look at the individual failures for more details."
            )
        return self._finish("Completed")

    def _finish(self, status: str, reason: str | None = None) -> None:
        self.failure_reason = reason
        self.ended = self.modified = now()
        self.status = status

    def _target_reached(self) -> bool:
        target = self.config.get("TuningJobCompletionCriteria", {}).get("TargetObjectiveMetricValue")
        best = self.best()
        value = self.value_of(best) if best else None
        if value is None or target is None:
            return False
        return value <= target if self.objective["Type"] == "Minimize" else value >= target

    # -- description -----------------------------------------------------------------------------------------------

    def value_of(self, child: Child) -> float | None:
        """Final objective value of a training job that has completed."""
        metric = child.job.metrics.get(self.objective["MetricName"])
        return metric["Value"] if metric and child.job.status == "Completed" else None

    def best(self) -> Child | None:
        """The completed training job with the best objective."""
        valued = [(value, child) for child in self.children if (value := self.value_of(child)) is not None]
        if not valued:
            return None
        choose = min if self.objective["Type"] == "Minimize" else max
        return choose(valued, key=lambda pair: pair[0])[1]

    def summary_of(self, child: Child) -> Params:
        """A training job as a tuning job shows it."""
        described = child.job.describe()
        summary = pick(
            described,
            ("TrainingJobName", "TrainingJobArn", "CreationTime", "TrainingStartTime", "TrainingEndTime",
             "TrainingJobStatus", "FailureReason"),
        )  # fmt: skip
        value = self.value_of(child)
        summary |= {"TunedHyperParameters": child.tuned, "ObjectiveStatus": self._objective_status(child)}
        if definition := self.definition.get("DefinitionName"):
            summary["TrainingJobDefinitionName"] = definition
        if value is not None:
            metric = {"MetricName": self.objective["MetricName"], "Value": value}
            summary["FinalHyperParameterTuningJobObjectiveMetric"] = metric
        return summary

    def _objective_status(self, child: Child) -> str:
        if child.job.status not in TERMINAL:
            return "Pending"
        return "Succeeded" if self.value_of(child) is not None else "Failed"

    def describe(self) -> Params:
        """DescribeHyperParameterTuningJob's answer."""
        best = self.best()
        answer = pick(self.request, _ECHOED)
        optional: dict[str, Any] = {
            "HyperParameterTuningEndTime": self.ended,
            "FailureReason": self.failure_reason,
            "BestTrainingJob": self.summary_of(best) if best else None,
        }
        answer |= {
            "HyperParameterTuningJobArn": self.arn,
            "HyperParameterTuningJobStatus": self.status,
            "CreationTime": self.created,
            "LastModifiedTime": self.modified,
            **self._counters(),
        }
        return answer | {key: value for key, value in optional.items() if value is not None}

    def _counters(self) -> Params:
        states = [child.job.status for child in self.children]
        objectives = [self._objective_status(child) for child in self.children]
        return {
            "TrainingJobStatusCounters": {
                "Completed": states.count("Completed"),
                "InProgress": states.count("InProgress") + states.count("Stopping"),
                "RetryableError": 0,
                "NonRetryableError": states.count("Failed"),
                "Stopped": states.count("Stopped"),
            },
            "ObjectiveStatusCounters": {name: objectives.count(name) for name in ("Succeeded", "Pending", "Failed")},
        }

    def summary(self) -> Params:
        """ListHyperParameterTuningJobs' entry."""
        return {
            **pick(self.describe(), (
                "HyperParameterTuningJobName", "HyperParameterTuningJobArn", "HyperParameterTuningJobStatus",
                "CreationTime", "HyperParameterTuningEndTime", "LastModifiedTime", "TrainingJobStatusCounters",
                "ObjectiveStatusCounters",
            )),
            "Strategy": self.config["Strategy"],
            "ResourceLimits": self.config["ResourceLimits"],
        }  # fmt: skip
