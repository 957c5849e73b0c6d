"""Processing jobs."""

import threading
import time
from pathlib import Path
from typing import Any

from tests.sagemaker_emulator.cluster import Cluster, End, Follower, HostPlan, Outcome, plan_hosts, resource_config
from tests.sagemaker_emulator.common import Call, Handler, Listing, Params, arn, list_page, now, pick
from tests.sagemaker_emulator.errors import in_use, not_emulated, validation
from tests.sagemaker_emulator.jobs import Job, JobTable, first_characters, write_json
from tests.sagemaker_emulator.services import Services
from tests.sagemaker_emulator.storage import Mirror

_ECHOED = (
    "ProcessingJobName", "ProcessingInputs", "ProcessingOutputConfig", "ProcessingResources", "StoppingCondition",
    "AppSpecification", "Environment", "NetworkConfig", "RoleArn", "ExperimentConfig",
)  # fmt: skip
_SUMMARY = (
    "ProcessingJobName", "ProcessingJobArn", "CreationTime", "ProcessingEndTime", "LastModifiedTime",
    "ProcessingJobStatus", "FailureReason", "ExitMessage",
)  # fmt: skip
_LISTING = Listing("ProcessingJobSummaries", "ProcessingJobName", "ProcessingJobStatus")
_DAY = 86400
_ROOT = "/opt/ml/processing"


class ProcessingJob(Job):
    """One processing job."""

    kind = "processing"
    log_group = "/aws/sagemaker/ProcessingJobs"

    def __init__(self, services: Services, call: Call) -> None:
        name = call.params["ProcessingJobName"]
        super().__init__(services, call, name, arn(call.region, "processing-job", name))
        self.exit_message: str | None = None

    def fail(self, reason: str) -> None:
        self._finish("Failed", reason)

    def run(self) -> None:
        config = self.request["ProcessingResources"]["ClusterConfig"]
        if self.stop_requested.wait(self.services.settings.starting_seconds):
            return self._finish("Stopped")
        plans = plan_hosts([("homogeneousCluster", config["InstanceType"], config["InstanceCount"])])
        cluster = self.new_cluster(plans, [])
        self._prepare(cluster, plans)
        continuous = self._mirrors(cluster, "Continuous")
        outcome = self._execute(cluster, continuous)
        self.exit_message = self._message(cluster)
        if outcome.end is End.FAILED:
            assert outcome.host is not None
            return self.fail(f"AlgorithmError: See job logs for more information, exit code: {outcome.code}")
        if outcome.end is End.INTERNAL:
            return self.fail(
                f"InternalServerError: We encountered an internal error. Please try again. ({outcome.detail})"
            )
        if outcome.end is End.STOPPED:
            return self._finish("Stopped")
        if outcome.end is End.TIMED_OUT:
            return self._finish("Stopped", "The job ran longer than MaxRuntimeInSeconds.")
        for mirror in self._mirrors(cluster, "EndOfJob"):
            mirror.sync()
        return self._finish("Completed")

    def _execute(self, cluster: Cluster, continuous: list[Mirror]) -> Outcome:
        if self.stop_requested.is_set():
            return Outcome(End.STOPPED)
        application = self.request["AppSpecification"]
        image = self.services.pull(self.region, self.role, application["ImageUri"])
        command = [
            *(application.get("ContainerEntrypoint") or image.entrypoint),
            *application.get("ContainerArguments", []),
        ]
        if not command:
            return Outcome(End.INTERNAL, detail="the image has no entry point and the request gives none")
        given = self.request.get("Environment", {})
        self.started = now()
        limit = self.request.get("StoppingCondition", {}).get("MaxRuntimeInSeconds", _DAY)
        cluster.start(
            command,
            lambda host: self.services.environment(image, self.region, self.role, host, given, keep=True),
            image.workdir,
            self.log_sink,
        )
        follower = Follower(continuous, self.services.settings.sync_interval)
        try:
            return cluster.supervise(self.stop_requested, threading.Event(), time.monotonic() + limit)
        finally:
            follower.finish()

    def _prepare(self, cluster: Cluster, plans: list[HostPlan]) -> None:
        description = {**pick(self.request, _ECHOED), "ProcessingJobArn": self.arn}
        for host, plan in zip(cluster.hosts, plans, strict=True):
            config = host.ml / "config"
            write_json(config / "resourceconfig.json", resource_config(plans, plan, cluster.interface))
            write_json(config / "processingjobconfig.json", description)
            (host.ml / "output").mkdir(parents=True)
            for output in self._outputs():
                host.local(output["LocalPath"]).mkdir(parents=True, exist_ok=True)
        storage = self.services.storage(self.region, self.role)
        for given in self.request.get("ProcessingInputs", []):
            source = given["S3Input"]
            storage.download(
                source["S3Uri"],
                source["S3DataType"],
                [host.local(source["LocalPath"]) for host in cluster.hosts],
                sharded=source.get("S3DataDistributionType") == "ShardedByS3Key",
            )

    def _outputs(self) -> list[Params]:
        outputs = self.request.get("ProcessingOutputConfig", {}).get("Outputs", [])
        return [output["S3Output"] for output in outputs]

    def _mirrors(self, cluster: Cluster, mode: str) -> list[Mirror]:
        storage = self.services.storage(self.region, self.role)
        return [
            Mirror(storage, host.local(output["LocalPath"]), output["S3Uri"])
            for output in self._outputs()
            if output["S3UploadMode"] == mode
            for host in cluster.hosts
        ]

    @staticmethod
    def _message(cluster: Cluster) -> str | None:
        files = [Path(host.ml, "output", "message") for host in cluster.hosts]
        return next((text for text in map(first_characters, files) if text), None)

    def _finish(self, status: str, reason: str | None = None) -> None:
        self.services.logs.drain()
        with self.lock:
            self.failure_reason = reason[:1024] if reason else None
            self.ended = self.modified = now()
            self.status = status

    def describe(self) -> Params:
        """DescribeProcessingJob's answer."""
        with self.lock:
            answer = pick(self.request, _ECHOED)
            optional: dict[str, Any] = {
                "ExitMessage": self.exit_message or self.isolation(),
                "FailureReason": self.failure_reason,
                "ProcessingStartTime": self.started,
                "ProcessingEndTime": self.ended,
            }
            answer |= {
                "ProcessingJobArn": self.arn,
                "ProcessingJobStatus": self.status,
                "CreationTime": self.created,
                "LastModifiedTime": self.modified,
            }
            return answer | {key: value for key, value in optional.items() if value is not None}


class Processing:
    """The processing part of the API."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.jobs: JobTable[ProcessingJob] = JobTable()
        self._lock = threading.Lock()

    def operations(self) -> dict[str, Handler]:
        """Handlers by operation name."""
        return {
            "CreateProcessingJob": self._create,
            "DescribeProcessingJob": lambda call: self._find(call).describe(),
            "StopProcessingJob": self._stop,
            "ListProcessingJobs": self._list,
        }

    def _create(self, call: Call) -> Params:
        check_processing_request(call.params)
        with self._lock:
            key = (call.region, call.params["ProcessingJobName"])
            if existing := self.jobs.get(key):
                raise in_use(
                    "Job name must be unique within an AWS account and region, and a job with this name already "
                    f"exists ({existing.arn})"
                )
            job = self.jobs[key] = ProcessingJob(self._services, call)
        job.launch()
        return {"ProcessingJobArn": job.arn}

    def _find(self, call: Call) -> ProcessingJob:
        name = call.params["ProcessingJobName"]
        return self.jobs.find(call, name, validation(f"Could not find requested job with name: {name}"))

    def _stop(self, call: Call) -> Params:
        job = self._find(call)
        job.require_running("processing job")
        if job.status == "InProgress":
            job.stop()
        return {}

    def _list(self, call: Call) -> Params:
        items = [pick(job.describe(), _SUMMARY) for job in self.jobs.of_region(call.region)]
        return list_page(call.params, items, _LISTING)


def check_processing_request(params: Params) -> None:
    """The rules that are not in the service model, and what is not emulated."""
    cluster = params["ProcessingResources"]["ClusterConfig"]
    if not cluster.get("InstanceType") or not cluster.get("InstanceCount"):
        raise not_emulated("processing clusters without InstanceType and InstanceCount")
    inputs = params.get("ProcessingInputs", [])
    outputs = params.get("ProcessingOutputConfig", {}).get("Outputs", [])
    for noun, names in (
        ("input", [given["InputName"] for given in inputs]),
        ("output", [output["OutputName"] for output in outputs]),
    ):
        if len(names) != len(set(names)):
            raise validation(f"Processing {noun} names must be unique.")
    for given in inputs:
        source = given.get("S3Input")
        if source is None or given.get("AppManaged"):
            raise not_emulated("processing inputs other than S3Input")
        if source.get("S3InputMode", "File") != "File" or source.get("S3CompressionType", "None") != "None":
            raise not_emulated("processing inputs in Pipe mode or compressed")
        _check_path(source.get("LocalPath"), given["InputName"])
    for output in outputs:
        if output.get("S3Output") is None or output.get("AppManaged"):
            raise not_emulated("processing outputs other than S3Output")
        _check_path(output["S3Output"].get("LocalPath"), output["OutputName"])


def _check_path(path: str | None, name: str) -> None:
    if not path or not (path == _ROOT or path.startswith(_ROOT + "/")):
        raise validation(f"LocalPath of {name} must be {_ROOT} or a path below it, not {path}.")
    if ".." in path.split("/"):
        raise validation(f"LocalPath of {name} must not contain '..'.")
