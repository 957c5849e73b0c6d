"""The tuning part of the API."""

import threading

from tests.sagemaker_emulator.common import Call, Handler, Listing, Params, list_page
from tests.sagemaker_emulator.errors import in_use, not_found
from tests.sagemaker_emulator.jobs import JobTable
from tests.sagemaker_emulator.services import Services
from tests.sagemaker_emulator.training import Training
from tests.sagemaker_emulator.tuning_job import TuningJob
from tests.sagemaker_emulator.tuning_rules import check_tuning_request

_LISTING = Listing("HyperParameterTuningJobSummaries", "HyperParameterTuningJobName", "HyperParameterTuningJobStatus",
                   sort_default="Name", order_default="Ascending")  # fmt: skip
_CHILDREN = Listing("TrainingJobSummaries", "TrainingJobName", "TrainingJobStatus", sort_default="Name",
                    order_default="Ascending")  # fmt: skip


class Tuning:
    """The tuning part of the API."""

    def __init__(self, services: Services, training: Training) -> None:
        self._services = services
        self._training = training
        self._jobs: JobTable[TuningJob] = JobTable()
        self._lock = threading.Lock()

    def operations(self) -> dict[str, Handler]:
        """Handlers by operation name."""
        return {
            "CreateHyperParameterTuningJob": self._create,
            "DescribeHyperParameterTuningJob": lambda call: self._find(call).describe(),
            "StopHyperParameterTuningJob": self._stop,
            "ListHyperParameterTuningJobs": self._list,
            "ListTrainingJobsForHyperParameterTuningJob": self._list_children,
        }

    def _create(self, call: Call) -> Params:
        check_tuning_request(call.params)
        with self._lock:
            key = (call.region, call.params["HyperParameterTuningJobName"])
            if existing := self._jobs.get(key):
                raise in_use(
                    "Hyperparameter tuning job names must be unique within an AWS account and region, and a tuning "
                    f"job with this name already exists ({existing.arn})"
                )
            job = self._jobs[key] = TuningJob(self._services, call, self._training)
        job.launch()
        return {"HyperParameterTuningJobArn": job.arn}

    def _find(self, call: Call) -> TuningJob:
        name = call.params["HyperParameterTuningJobName"]
        return self._jobs.find(call, name, not_found(f"Amazon SageMaker can't find a tuning job with name {name}."))

    def _stop(self, call: Call) -> Params:
        job = self._find(call)
        job.require_running("hyperparameter tuning job")
        job.stop()
        return {}

    def _list(self, call: Call) -> Params:
        return list_page(call.params, [job.summary() for job in self._jobs.of_region(call.region)], _LISTING)

    def _list_children(self, call: Call) -> Params:
        job = self._find(call)
        items = [job.summary_of(child) for child in list(job.children)]
        params = dict(call.params)
        if params.get("SortBy") == "FinalObjectiveMetricValue":
            for item in items:
                item["_objective"] = item.get("FinalHyperParameterTuningJobObjectiveMetric", {}).get("Value")
            items = [item for item in items if item["_objective"] is not None]
            params["SortBy"] = "_objective"
        page = list_page(params, items, _CHILDREN)
        for item in page["TrainingJobSummaries"]:
            item.pop("_objective", None)
        return page
