"""The training part of the API."""

import threading

from tests.sagemaker_emulator.common import Call, Handler, Listing, Params, list_page
from tests.sagemaker_emulator.errors import in_use, validation
from tests.sagemaker_emulator.jobs import JobTable
from tests.sagemaker_emulator.services import Services
from tests.sagemaker_emulator.training_job import TrainingJob
from tests.sagemaker_emulator.training_rules import check_training_request

_LISTING = Listing("TrainingJobSummaries", "TrainingJobName", "TrainingJobStatus")


class Training:
    """The training part of the API."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.jobs: JobTable[TrainingJob] = JobTable()
        self._lock = threading.Lock()

    def operations(self) -> dict[str, Handler]:
        """Handlers by operation name."""
        return {
            "CreateTrainingJob": lambda call: {"TrainingJobArn": self.create(call).arn},
            "DescribeTrainingJob": lambda call: self.find(call).describe(),
            "StopTrainingJob": self._stop,
            "ListTrainingJobs": self._list,
        }

    def create(self, call: Call, tuning_job_arn: str | None = None) -> TrainingJob:
        """Check a request, then start the job."""
        check_training_request(call.params)
        with self._lock:
            key = (call.region, call.params["TrainingJobName"])
            if existing := self.jobs.get(key):
                raise in_use(
                    "Training job names must be unique within an AWS account and region, and a training job with "
                    f"this name already exists ({existing.arn})"
                )
            job = self.jobs[key] = TrainingJob(self._services, call, tuning_job_arn)
        job.launch()
        return job

    def find(self, call: Call) -> TrainingJob:
        """The job a request names."""
        return self.jobs.find(call, call.params["TrainingJobName"], validation("Requested resource not found."))

    def _stop(self, call: Call) -> Params:
        job = self.find(call)
        job.require_running("training job")
        if job.status == "InProgress":
            job.stop()
        return {}

    def _list(self, call: Call) -> Params:
        jobs = self.jobs.of_region(call.region)
        if wanted := call.params.get("WarmPoolStatusEquals"):
            jobs = [job for job in jobs if (job.describe().get("WarmPoolStatus") or {}).get("Status") == wanted]
        return list_page(call.params, [job.summary() for job in jobs], _LISTING)
