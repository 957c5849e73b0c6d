"""One training job: attempts, statuses, files, artifacts."""

import math
import re
import threading
import time
from typing import Any

from tests.sagemaker_emulator.cluster import Cluster, End, Follower, HostPlan, Outcome, plan_hosts
from tests.sagemaker_emulator.common import Call, Params, arn, now, pick
from tests.sagemaker_emulator.hosts import Host
from tests.sagemaker_emulator.jobs import Job, first_characters
from tests.sagemaker_emulator.services import Services
from tests.sagemaker_emulator.storage import Mirror
from tests.sagemaker_emulator.training_files import fill_hosts, upload_artifacts

_MESSAGES = {
    "Starting": "Preparing the instances for training",
    "Downloading": "Downloading input data",
    "Training": "Training image download completed. Training in progress.",
    "Uploading": "Uploading generated training model",
    "Completed": "Training job completed",
    "Failed": "Training job failed",
    "Stopping": "Stopping the training job",
    "Stopped": "Training job stopped",
    "Interrupted": "Training job interrupted: the spot instances were taken away",
    "MaxRuntimeExceeded": "Training job runtime exceeded MaxRuntimeInSeconds provided by user",
    "MaxWaitTimeExceeded": "Training job runtime exceeded MaxWaitTimeInSeconds provided by user",
    "Restarting": "Restarting the training job",
}
_ECHOED = (
    "TrainingJobName", "HyperParameters", "AlgorithmSpecification", "RoleArn", "InputDataConfig", "OutputDataConfig",
    "ResourceConfig", "VpcConfig", "StoppingCondition", "EnableNetworkIsolation", "EnableManagedSpotTraining",
    "EnableInterContainerTrafficEncryption", "CheckpointConfig", "ExperimentConfig", "Environment", "RetryStrategy",
)  # fmt: skip
_DAY = 86400


class TrainingJob(Job):
    """One training job, with its attempts when spot instances are taken away."""

    kind = "training"
    log_group = "/aws/sagemaker/TrainingJobs"

    def __init__(self, services: Services, call: Call, tuning_job_arn: str | None = None) -> None:
        name = call.params["TrainingJobName"]
        super().__init__(services, call, name, arn(call.region, "training-job", name))
        self.tuning_job_arn = tuning_job_arn
        self.secondary_status = "Starting"
        self.transitions: list[Params] = []
        self.metrics: dict[str, Params] = {}
        self.interrupt_requested = threading.Event()
        self.training_seconds = 0.0
        self._created_clock = time.monotonic()
        definitions = self.request["AlgorithmSpecification"].get("MetricDefinitions", [])
        self._metrics = [(d["Name"], re.compile(d["Regex"])) for d in definitions]
        self.transition("Starting")

    # -- status ----------------------------------------------------------------------------------------------------

    def transition(self, status: str, message: str | None = None) -> None:
        """Move to a secondary status."""
        with self.lock:
            time_now = now()
            if self.transitions and "EndTime" not in self.transitions[-1]:
                self.transitions[-1]["EndTime"] = time_now
            text = message or _MESSAGES[status]
            if status == "Starting" and (note := self.isolation()):
                text += f"; {note}"
            self.transitions.append({"Status": status, "StartTime": time_now, "StatusMessage": text})
            self.secondary_status = status
            self.modified = time_now

    def stop(self) -> None:
        with self.lock:
            super().stop()
            self.transition("Stopping")

    def finish(self, status: str, secondary: str | None = None, reason: str | None = None) -> None:
        """Reach the end."""
        self.services.logs.drain()
        with self.lock:
            self.failure_reason = reason[:1024] if reason else None
            self.transition(secondary or status, reason[:1024] if reason else None)
            self.transitions[-1]["EndTime"] = self.transitions[-1]["StartTime"]
            self.ended = self.transitions[-1]["StartTime"]
            self.status = status

    def fail(self, reason: str) -> None:
        self.finish("Failed", reason=reason)

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        retries = self.request.get("RetryStrategy", {}).get("MaximumRetryAttempts", 0)
        while True:
            outcome = self._attempt()
            if outcome.end is End.INTERRUPTED:
                self.transition("Interrupted")
                self.interrupt_requested.clear()
                if self._wait(self.services.settings.spot_restart_delay):
                    return self.finish("Stopped")
                if time.monotonic() > self._wait_deadline():
                    return self.finish("Stopped", "MaxWaitTimeExceeded")
                self.transition("Starting")
                continue
            if outcome.end is End.INTERNAL and retries > 0:
                retries -= 1
                self.transition("Restarting")
                continue
            return self._conclude(outcome)

    def _attempt(self) -> Outcome:
        if self._wait(self.services.settings.starting_seconds):
            return Outcome(End.STOPPED)
        checkpoints = self._checkpoint_path()
        volumes = [checkpoints] if checkpoints and not checkpoints.startswith("/opt/ml/") else []
        plans = training_plans(self.request["ResourceConfig"])
        cluster = self.new_cluster(plans, volumes)
        if not self.stop_requested.is_set():
            self.transition("Downloading")
        begun = time.monotonic()
        storage = self.services.storage(self.region, self.role)
        try:
            fill_hosts(storage, self.request, cluster, plans)
            mirrors = self._restore_checkpoints(cluster)
            if self.stop_requested.is_set():
                return Outcome(End.STOPPED)
            return self._execute(cluster, mirrors)
        finally:
            self.training_seconds += time.monotonic() - begun

    def _execute(self, cluster: Cluster, mirrors: list[Mirror]) -> Outcome:
        image = self.services.pull(self.region, self.role, self.request["AlgorithmSpecification"]["TrainingImage"])
        given = {
            "TRAINING_JOB_NAME": self.name,
            "TRAINING_JOB_ARN": self.arn,
            **self.request.get("Environment", {}),
        }
        command = training_command(self.request["AlgorithmSpecification"], image.entrypoint)
        self.started = self.started or now()
        self.transition("Training")
        cluster.start(
            command,
            lambda host: self.services.environment(image, self.region, self.role, host, given, keep=True),
            image.workdir,
            lambda host: self.log_sink(host, self._read_metrics),
        )
        follower = Follower(mirrors, self.services.settings.sync_interval)
        try:
            return cluster.supervise(
                self.stop_requested,
                self.interrupt_requested,
                min(self._run_deadline(), self._wait_deadline()),
                spot=bool(self.request.get("EnableManagedSpotTraining")),
            )
        finally:
            follower.finish()

    def _conclude(self, outcome: Outcome) -> None:
        if outcome.end is End.FAILED:
            assert outcome.host is not None
            text = next((t for t in map(_failure_text, [outcome.host, *self._hosts()]) if t), "")
            return self.fail(f"AlgorithmError: {text}, exit code: {outcome.code}")
        if outcome.end is End.INTERNAL:
            return self.fail(
                f"InternalServerError: We encountered an internal error. Please try again. ({outcome.detail})"
            )
        if self._hosts() and self.started:
            self.transition("Uploading")
            upload_artifacts(
                self.services.storage(self.region, self.role), self.request, self.output_prefix(), self._hosts()
            )
        if outcome.end is End.STOPPED:
            return self.finish("Stopped")
        if outcome.end is End.TIMED_OUT:
            over = "MaxWaitTimeExceeded" if time.monotonic() > self._wait_deadline() else "MaxRuntimeExceeded"
            return self.finish("Stopped", over)
        return self.finish("Completed")

    def _restore_checkpoints(self, cluster: Cluster) -> list[Mirror]:
        path = self._checkpoint_path()
        if path is None:
            return []
        uri = self.request["CheckpointConfig"]["S3Uri"]
        storage = self.services.storage(self.region, self.role)
        directories = [host.local(path) for host in cluster.hosts]
        storage.download(uri.rstrip("/") + "/", "S3Prefix", directories, required=False)
        mirrors = [Mirror(storage, directory, uri) for directory in directories]
        for mirror in mirrors:
            mirror.remember()
        return mirrors

    # -- details ---------------------------------------------------------------------------------------------------

    def output_prefix(self) -> str:
        """Where the artifacts go."""
        return f"{self.request['OutputDataConfig']['S3OutputPath'].rstrip('/')}/{self.name}/output"

    def artifacts(self) -> str:
        """URI of the model artifact."""
        if self.request["OutputDataConfig"].get("CompressionType") == "NONE":
            return f"{self.output_prefix()}/model/"
        return f"{self.output_prefix()}/model.tar.gz"

    def _hosts(self) -> list[Host]:
        return self.cluster.hosts if self.cluster else []

    def _checkpoint_path(self) -> str | None:
        config = self.request.get("CheckpointConfig")
        return config.get("LocalPath", "/opt/ml/checkpoints") if config else None

    def _run_deadline(self) -> float:
        return time.monotonic() + self.request.get("StoppingCondition", {}).get("MaxRuntimeInSeconds", _DAY)

    def _wait_deadline(self) -> float:
        limit = self.request.get("StoppingCondition", {}).get("MaxWaitTimeInSeconds", 365 * _DAY)
        return self._created_clock + limit

    def _wait(self, seconds: float) -> bool:
        """Sleep unless stopped; True if stopped."""
        return self.stop_requested.wait(seconds) or self.services.closing.is_set()

    def _read_metrics(self, line: str) -> None:
        for name, pattern in self._metrics:
            if match := pattern.search(line):
                try:
                    value = float(match.group(1))
                except (IndexError, ValueError):
                    continue
                self.metrics[name] = {"MetricName": name, "Value": value, "Timestamp": now()}

    # -- description -----------------------------------------------------------------------------------------------

    def describe(self) -> Params:
        """DescribeTrainingJob's answer."""
        with self.lock:
            answer = pick(self.request, _ECHOED)
            answer |= {
                "TrainingJobArn": self.arn,
                "ModelArtifacts": {"S3ModelArtifacts": self.artifacts()},
                "TrainingJobStatus": self.status,
                "SecondaryStatus": self.secondary_status,
                "SecondaryStatusTransitions": [dict(t) for t in self.transitions],
                "CreationTime": self.created,
                "LastModifiedTime": self.modified,
                "EnableManagedSpotTraining": bool(self.request.get("EnableManagedSpotTraining")),
                "ProfilingStatus": "Disabled",
                "FinalMetricDataList": list(self.metrics.values()),
            }
            optional: dict[str, Any] = {
                "TuningJobArn": self.tuning_job_arn,
                "FailureReason": self.failure_reason,
                "TrainingStartTime": self.started,
                "TrainingEndTime": self.ended,
                "WarmPoolStatus": self._warm_pool(),
            }
            if self.ended is not None and self.training_seconds:
                seconds = max(1, math.ceil(self.training_seconds))
                spot = self.request.get("EnableManagedSpotTraining")
                fraction = self.services.settings.spot_billable_fraction if spot else 1.0
                answer["TrainingTimeInSeconds"] = seconds
                answer["BillableTimeInSeconds"] = max(1, math.ceil(seconds * fraction))
            return answer | {key: value for key, value in optional.items() if value is not None}

    def summary(self) -> Params:
        """ListTrainingJobs' entry."""
        full = self.describe()
        return pick(
            full,
            ("TrainingJobName", "TrainingJobArn", "CreationTime", "TrainingEndTime", "LastModifiedTime",
             "TrainingJobStatus", "SecondaryStatus", "WarmPoolStatus"),
        )  # fmt: skip

    def _warm_pool(self) -> Params | None:
        keep = self.request["ResourceConfig"].get("KeepAlivePeriodInSeconds")
        if not keep:
            return None
        if self.ended is None:
            return {"Status": "InUse"}
        kept = min(keep, int(now() - self.ended))
        status = "Terminated" if kept >= keep or self.status != "Completed" else "Available"
        return {"Status": status, "ResourceRetainedBillableTimeInSeconds": kept}


def training_plans(config: Params) -> list[HostPlan]:
    """Hosts for a ResourceConfig, heterogeneous or not."""
    if groups := config.get("InstanceGroups"):
        return plan_hosts([(g["InstanceGroupName"], g["InstanceType"], g["InstanceCount"]) for g in groups])
    return plan_hosts([("homogeneousCluster", config["InstanceType"], config["InstanceCount"])])


def training_command(algorithm: Params, image_entrypoint: tuple[str, ...]) -> list[str]:
    """The container's command line: the request's entry point and arguments, or the image's with `train`."""
    entrypoint = algorithm.get("ContainerEntrypoint")
    arguments = algorithm.get("ContainerArguments")
    if entrypoint:
        return [*entrypoint, *(arguments or [])]
    return [*image_entrypoint, *(arguments or ["train"])]


def _failure_text(host: Host) -> str:
    return first_characters(host.ml / "output" / "failure")
