"""Steps as SageMaker jobs: each on a Ray cluster of the job's hosts."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Self

import dagster as dg
from pydantic import Field, create_model, model_validator

from resources.aws.code_package import BOOTSTRAP, XGBOOST_IMAGE_VERSION, code_package, job_image, upload
from resources.aws.request_validation import check_request
from resources.compute.base import ComputeBackend, as_metadata, failure_of
from resources.inventory import NotOwned, OwnedItem, files_below
from resources.sagemaker import jobs
from resources.sagemaker.job_files import JobInputs, JobPolling
from resources.sagemaker.job_reports import JobFailure
from resources.sagemaker.job_requests import (
    PROCESSING_INPUT,
    TRAINING_INPUT,
    TRAINING_ONLY,
    JobConfig,
    processing_request,
    training_request,
)
from resources.sagemaker.jobs import PROCESSING, TRAINING, TUNING, JobKind
from resources.sagemaker.pipes_client import PipesSageMakerClient
from resources.sagemaker.tuning_jobs import NativeTuning, NativeTuningConfig
from step_scripts.cluster.job import failure_from
from step_scripts.parameters import TuneModelSettings
from step_scripts.runner import storage
from step_scripts.runner.contract import StepRequest, StepResult

_LONGEST_NAME = "x" * 63
STEPS = ("validate_source", "ingest_features", "prepare_splits", "tune_model", "evaluate_model")
HEAD_GROUP = "HOUSING_CLUSTER_HEAD_GROUP"  # read by step_scripts.cluster
_SAME_FOR_ALL = {"role_arn", "subnets", "security_group_ids", "checkpoint_uri", "network_isolation", "tags"}
_CHANGES: Mapping[str, Any] = {
    name: (field.annotation | None, Field(default=None, description=field.description))  # pyright: ignore[reportOperatorIssue]
    for name, field in JobConfig.model_fields.items()
    if name not in (*_SAME_FOR_ALL, "environment")
}


class StepJob(create_model("_Changes", __base__=dg.Config, **_CHANGES)):
    """What is different for the jobs of one step: the fields of `JobConfig`, empty where they are as for all."""

    job_type: str | None = Field(
        default=None, pattern="^(training|processing)$", description="Kind of job: training or processing."
    )
    environment: dict[str, str] = Field(default_factory=dict, description="More environment variables.")


class SageMakerCompute(ComputeBackend):
    """Runs each step as one job: `tune_model` as a training job, the others as processing jobs.

    The job's hosts get the project's code through S3 and form a Ray cluster (`step_scripts.cluster`). Nothing of AWS
    is touched before a step has to run.
    """

    job_root: str = Field(description="s3:// prefix for the jobs' requests, messages and code.")
    job: JobConfig = Field(description="Role, instances, limits, network and encryption of all jobs.")
    steps: dict[str, StepJob] = Field(default_factory=dict, description="What is different for single steps, by name.")
    training_steps: list[str] = Field(default=["tune_model"], description="Steps that are training jobs.")
    image: str | None = Field(
        default=None, description="Image of the jobs. Empty: AWS's XGBoost image of the region; needs sagemaker."
    )
    region_name: str | None = Field(default=None, description="AWS region. Empty: boto3's.")
    native_tuning: NativeTuningConfig | None = Field(
        default=None,
        description="Trials of tune_model as a SageMaker tuning job, before its training job. Empty: Ray Tune inside "
        "the training job. Needs a custom image.",
    )
    wheels_uri: str | None = Field(
        default=None, description="s3:// prefix of wheels to install from, for hosts that reach no package index."
    )
    name_prefix: str = Field(default="housing", description="First part of the names of jobs.")
    detach: bool = Field(default=False, description="Leave running jobs alone when the run is interrupted or fails.")
    forward_logs: bool = Field(default=True, description="Forward the log lines of all hosts to the run's log.")
    poll_seconds: float = Field(default=2.0, gt=0, description="Shortest interval between two polls of a job.")
    retry_timeout_seconds: float = Field(
        default=900.0, gt=0, description="How long calls that AWS throttles or does not answer are repeated; seconds."
    )

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        for name in ("artifact_root", "job_root"):
            uri = getattr(self, name)
            if isinstance(uri, dg.EnvVar) or uri.startswith("s3://"):
                continue
            raise ValueError(f"{name} must be an s3:// URI that the jobs can reach, not {uri!r}")
        if unknown := [step for step in self.steps if "." not in step and step not in STEPS]:
            raise ValueError(f"steps: {', '.join(unknown)} is no step; there are {', '.join(STEPS)}")
        for step, own in self.steps.items():
            given = [name for name in TRAINING_ONLY if getattr(own, name)]
            if given and not self._is_training(step):
                raise ValueError(
                    f"steps.{step}: {', '.join(given)} exists for training jobs only, and {step} is a processing job; "
                    "set its job_type: training, or leave it out"
                )
            if not isinstance(self.job.role_arn, dg.EnvVar):
                self.config_of(step)  # raises for values that do not fit together
        if self.native_tuning is not None and self.image is None:
            raise ValueError(
                "native_tuning needs a custom image (image, built from the Dockerfile): SageMaker starts the "
                "jobs of a tuning job with the image's own entry point, and AWS's image does not know this project"
            )
        if self.job.network_isolation:
            raise ValueError(
                "network_isolation keeps steps from S3, where their inputs, outputs and messages are. Use subnets "
                "without a route to the internet, an S3 gateway endpoint, and wheels_uri instead"
            )
        return self

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Check the requests that the configuration leads to, before the first step runs.

        Raises `InvalidJobRequest` naming each wrong value.
        """
        code_uri = f"{self.job_root}/code/{'0' * 16}/"
        for step in {"tune_model", "prepare_splits", *self.steps}:
            kind, request = self._request_of(step, "image", code_uri, "0" * 16)
            environment = {
                **request.get("Environment", {}),
                "HOUSING_JOB_URI": f"{self.job_root}/{_LONGEST_NAME}/",
                "HOUSING_ATTEMPT": _LONGEST_NAME,
            }
            named = {**request, kind.member("Name"): _LONGEST_NAME, "Environment": environment}
            check_request(f"Create{kind.operation}", named)
        if (tuning := self._native_tuning("image", code_uri)) is not None:
            search = TuneModelSettings()
            request = tuning.create_request(search, search.resolved()["num_trials"], 0)
            check_request(f"Create{TUNING.operation}", {**request, TUNING.member("Name"): _LONGEST_NAME[:32]})

    @property
    def client(self) -> PipesSageMakerClient:
        """The Pipes client that runs the jobs."""
        poll = self.poll_seconds
        return PipesSageMakerClient(
            self.job_root,
            region_name=self.region_name,
            name_prefix=self.name_prefix,
            detach=self.detach,
            forward_logs=self.forward_logs,
            polling=JobPolling(
                interval=poll,
                longest_interval=5 * poll,
                quiet=1.5 * poll,
                lease=7.5 * poll,
                retry=self.retry_timeout_seconds,
            ),
        )

    def config_of(self, step: str) -> JobConfig:
        """The job configuration of one step."""
        own = self.steps.get(step)
        if own is None:
            return self.job
        changes = own.model_dump(exclude={"job_type", "environment"}, exclude_none=True)
        changes["environment"] = {**self.job.environment, **own.environment}
        if groups := changes.get("instance_groups"):
            changes["environment"] = {HEAD_GROUP: groups[0]["name"], **changes["environment"]}
        return JobConfig(**{**self.job.model_dump(), **changes})

    def _is_training(self, step: str) -> bool:
        own = self.steps.get(step)
        return own.job_type == "training" if own and own.job_type else step in self.training_steps

    def _channels(self, code_uri: str) -> dict[str, str]:
        return {"code": code_uri} | ({"wheels": self.wheels_uri} if self.wheels_uri else {})

    def _native_tuning(self, image: str, code_uri: str) -> NativeTuning | None:
        if (config := self.native_tuning) is None:
            return None
        job = self.config_of("tune_model")
        return NativeTuning(self.client.settings, config, job, image, self._channels(code_uri))

    def _request_of(self, step: str, image: str, code_uri: str, digest: str) -> tuple[JobKind, dict[str, Any]]:
        """Kind and parameters of a step's job, without name and bootstrap."""
        config, training = self.config_of(step), self._is_training(step)
        folder = TRAINING_INPUT if training else PROCESSING_INPUT
        parts: dict[str, Any] = {
            "image": image,
            "entrypoint": ["/bin/bash", f"{folder}/code/{BOOTSTRAP}"],
            "channels": self._channels(code_uri),
        }
        if training:
            parts |= {"output_uri": self.job_root, "checkpoint_folder": digest}
            return TRAINING, training_request(config, **parts)
        return PROCESSING, processing_request(config, **parts)

    def inventory(self) -> Sequence[OwnedItem]:
        """See `ComputeBackend.inventory`. Jobs in progress; files of jobs, code and checkpoints below `job_root`."""
        files = files_below(self.job_root, self._job_file, "files of job")
        return [*jobs.jobs_in_progress(self.client.settings), *super().inventory(), *files]

    def remove(self, item: OwnedItem) -> None:
        """See `ComputeBackend.remove`. A job is stopped, and its end waited for."""
        if item.kind == "job":
            jobs.remove_job(self.client.settings, item)
        elif item.location.startswith(f"{self.job_root}/"):
            if not self._job_file.fullmatch(f"{item.location.removeprefix(f'{self.job_root}/')}/"):
                raise NotOwned(f"{item.location} holds no files of jobs of this deployment")
            storage.delete_folder(item.location)
        else:
            super().remove(item)

    @property
    def _job_file(self) -> re.Pattern[str]:
        """Files in folders, below `job_root`, that this deployment's jobs use."""
        ours = rf"code|checkpoints|{re.escape(self.name_prefix)}-[^/]+|tune-[0-9a-f]+-[0-9a-f]+(?:-[0-9]+)?"
        return re.compile(rf"({ours})/.*", re.DOTALL)

    def _environment(self) -> dict[str, str]:
        """See `ComputeBackend._environment`. The image decides on Python; other versions are installed."""
        versions = {name: version for name, version in super()._environment().items() if name != "python"}
        return versions | {"image": self.image or f"AWS XGBoost {XGBOOST_IMAGE_VERSION}"}

    def _execute(self, context: dg.AssetExecutionContext, request: StepRequest) -> StepResult:
        package = code_package(["step_scripts", "housing_assets"], [request.step] if "." in request.step else [])
        code_uri = upload(package, f"{self.job_root}/code")
        image = job_image(self.image, self.client.settings.client("sagemaker").meta.region_name)
        kind, params = self._request_of(request.step, image, code_uri, request.digest[:16])
        if kind is TRAINING:
            request = request.model_copy(update={"checkpoint_uri": f"{self.job_root}/checkpoints/{request.digest}"})
        inputs = JobInputs(
            files={"request.json": request.model_dump_json().encode()},
            secrets={"ray_token": secrets.token_hex(32).encode()},
            uri_variable="HOUSING_JOB_URI",
            name_variable="HOUSING_ATTEMPT",
            digest=jobs.digest_of([request.digest, request.output_uri, jobs.request_digest(params)]),
        )
        metadata: dict[str, Any] = {}
        tuning = self._native_tuning(image, code_uri)
        if tuning is not None and request.step == "tune_model" and kind is TRAINING:
            metadata = tuning.run(context, request)
        try:
            invocation = self.client.run(
                context=context,
                params=params,
                inputs=inputs,
                completed_after=request.not_before,
                price_per_hour=self.config_of(request.step).price_per_hour,
            )
        except JobFailure as failure:
            with contextlib.suppress(OSError):
                storage.delete_folder(storage.join(request.output_uri, failure.job_name))
            raise self._step_failure(request.step, failure) from failure
        for key in context.selected_asset_keys:
            context.add_asset_metadata(as_metadata({**metadata, **invocation.metadata}), asset_key=key)
        try:
            manifest = storage.read_bytes(request.manifest_uri)
        except FileNotFoundError:
            raise dg.Failure(
                f"{request.step}: the job completed and left no manifest at {request.manifest_uri}", allow_retries=False
            ) from None
        return StepResult.model_validate_json(manifest)

    @staticmethod
    def _step_failure(step: str, failure: JobFailure) -> dg.Failure:
        """The failure that the step itself reported, with what is known of the job; else the job's failure."""
        messages = [m["step_error"] for m in failure.messages if isinstance(m, dict) and "step_error" in m]
        error = messages[-1] if messages else failure_from(failure.reason)
        if error is None:
            return failure
        own = failure_of(step, {"details": {}, "traceback": "see the job's log", **error})
        if error["kind"] == "input":
            return dg.Failure(own.description, {**failure.metadata, **own.metadata}, allow_retries=False)
        text = f"{own.description}\n{failure.description}"
        return dg.Failure(text, {**failure.metadata, **own.metadata}, allow_retries=failure.allow_retries)
