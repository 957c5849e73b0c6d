"""The one place that decides which implementation every resource has, from the environment (`housing_assets.settings`).

`HOUSING_DEPLOYMENT=local` (default) runs everything on this machine, `HOUSING_DEPLOYMENT=sagemaker` runs steps as
SageMaker jobs with data, feature store, registry and endpoint on AWS. Nothing here connects to anything.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.storage.tags import (  # have no public names
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)
from pydantic import Field

from housing_assets.sagemaker_config import load_sections
from housing_assets.settings import (
    DEPLOYMENTS,
    Settings,
    environment_of,
    load_automation,
    refuse_passwords,
    root_of,
)
from resources.compute.local_ray import LocalRay
from resources.endpoints.local import LocalDataCapture, LocalEndpointHost
from resources.feature_store.local import LocalFeatureStore
from resources.model_registry.local import LocalModelRegistry
from resources.references.evidence import EvidenceStore
from resources.references.io_manager import ReferenceIOManager
from resources.services.experiments import ExperimentTracker, MlflowTracking, NoTracking
from resources.services.notifier import EmailNotifier, LogNotifier, Notifier, SlackNotifier, SnsNotifier
from resources.sources.listing import expanded
from step_scripts.runner import storage

_NAME = "housing"  # of endpoint, model group, experiment; and first part of the names of jobs


class SourceLocation(dg.ConfigurableResource):
    """Where the source files are when run configuration does not say, and where generated data goes."""

    landing: str | None = Field(default=None, description="Folder or s3:// prefix where new files arrive.")
    settle_seconds: float = Field(default=60.0, ge=0, description="A file is read once it is unchanged for so long.")
    timezone: str = Field(default="UTC", description="Time zone of the days of ingestion.")
    source: str | None = Field(default=None, description="Path, folder, glob or s3:// URI. Empty: generated data.")
    sample_folder: str = Field(description="Folder or s3:// prefix for generated data.")
    sample_rows: int = Field(default=10_000, ge=1, description="Rows to generate.")

    def resolve(self) -> str:
        """The source. Without one, data is generated once, the same on every machine."""
        if self.source:
            return self.source
        from housing_assets.sample_data import write_sample

        sample = storage.join(self.sample_folder, f"house_sales_{self.sample_rows}.csv")
        if storage.exists(sample):
            return sample
        if not storage.is_remote(sample):
            write_sample(storage.local_path(sample), rows=self.sample_rows)
            return sample
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "sample.csv"
            write_sample(file, rows=self.sample_rows)
            storage.upload(file, sample)
        return sample


class CheckedReferenceIOManager(ReferenceIOManager):
    """The IO manager, which every run initializes first: the moment to reject wrong run configuration."""

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Check the run's configuration."""
        from housing_assets.config import check_run_config  # which reads the file of HOUSING_CONFIG

        if context.run is not None:
            check_run_config(dict(context.run.run_config))
            _check_days(context.run.tags)


def _check_days(tags: Mapping[str, str]) -> None:
    """Raise `dagster.Failure` for a range of days from a later to an earlier one."""
    first, last = tags.get(ASSET_PARTITION_RANGE_START_TAG), tags.get(ASSET_PARTITION_RANGE_END_TAG)
    if first and last and first > last:
        raise dg.Failure(
            f"the range of days {first}...{last} is reversed. Give the earlier day first: {last}...{first}",
            allow_retries=False,
        )


def load_resources(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """All resources of the deployment that `HOUSING_DEPLOYMENT` names (default `local`).

    Raises `ValueError` naming the variable for a value that makes no sense.
    """
    settings = Settings(os.environ if environment is None else environment)
    refuse_passwords(settings.environment)
    deployment = settings.text("HOUSING_DEPLOYMENT") or "local"
    if deployment not in DEPLOYMENTS:
        raise ValueError(f"HOUSING_DEPLOYMENT={deployment!r}: choose one of {', '.join(DEPLOYMENTS)}")
    return _sagemaker(settings) if deployment == "sagemaker" else _local(settings)


def _own(settings: Settings, name: str = _NAME) -> str:
    """`name`, with the environment at its end."""
    environment = environment_of(settings.environment)
    return f"{name}-{environment}" if environment else name


def _common(settings: Settings, root: str) -> dict[str, Any]:
    automation, source = load_automation(settings.environment), settings.text("HOUSING_RAW_CSV")
    return {
        "notifier": _notifier(settings),
        "experiments": _experiments(settings),
        "io_manager": CheckedReferenceIOManager(root=storage.join(root, "references")),
        "evidence": EvidenceStore(root=storage.join(root, "evidence")),
        "source_location": SourceLocation(
            landing=automation.landing,
            settle_seconds=automation.settle_seconds,
            timezone=automation.timezone,
            source=source and expanded(source),
            sample_folder=storage.join(root, "sample"),
            sample_rows=settings.number("HOUSING_SAMPLE_ROWS", int) or 10_000,
        ),
    }


def _notifier(settings: Settings) -> Notifier:
    kind = settings.text("HOUSING_NOTIFIER") or "log"
    if kind == "log":
        return LogNotifier()
    if kind == "slack":
        # Read where a message is sent: the URL is a secret, and never part of the definitions.
        return SlackNotifier(webhook_url=dg.EnvVar("HOUSING_SLACK_WEBHOOK"))
    if kind == "sns":
        return SnsNotifier(topic_arn=settings.required("HOUSING_SNS_TOPIC", "the ARN of the topic to publish to"))
    if kind == "email":
        login = {"user": dg.EnvVar("HOUSING_SMTP_USER"), "password": dg.EnvVar("HOUSING_SMTP_PASSWORD")}
        return EmailNotifier(
            host=settings.required("HOUSING_SMTP_HOST", "the SMTP server that sends the messages"),
            port=settings.number("HOUSING_SMTP_PORT", int) or 587,
            sender=settings.required("HOUSING_SMTP_SENDER", "the address that messages come from"),
            recipients=settings.words("HOUSING_SMTP_RECIPIENTS"),
            allow_insecure=settings.switch("HOUSING_SMTP_ALLOW_INSECURE", default=False),
            **(login if settings.text("HOUSING_SMTP_USER") else {}),
        )
    raise ValueError(f"HOUSING_NOTIFIER={kind!r}: choose one of log, slack, email, sns")


def _experiments(settings: Settings) -> ExperimentTracker:
    uri = settings.text("HOUSING_MLFLOW_URI")
    if uri is None:
        return NoTracking()
    more = settings.given(
        experiment=("HOUSING_MLFLOW_EXPERIMENT", str),
        artifact_location=("HOUSING_MLFLOW_ARTIFACTS", str),
    )
    return MlflowTracking(**{"tracking_uri": uri, "experiment": _own(settings), **more})


def _caching(settings: Settings) -> dict[str, Any]:
    hours = settings.number("HOUSING_CACHE_HOURS", float) or 12.0
    return {"use_cache": settings.switch("HOUSING_CACHE", default=True), "cache_expiry_hours": hours}


def _local(settings: Settings) -> dict[str, Any]:
    root = Path(root_of(settings.environment))
    for seconds in ("HOUSING_RAY_CONNECT_SECONDS", "HOUSING_RESOURCE_WAIT_SECONDS"):
        settings.number(seconds, float)  # read by the steps; what is no number is refused here
    return {
        **_common(settings, str(root)),
        "compute": LocalRay(
            artifact_root=str(root / "artifacts"),
            address=settings.text("RAY_ADDRESS"),
            num_cpus=settings.number("HOUSING_NUM_CPUS", int),
            **_caching(settings),
        ),
        "feature_store": LocalFeatureStore(root=str(root / "feature_store"), name_suffix=_own(settings, "")),
        "model_registry": LocalModelRegistry(root=str(root / "model_registry"), default_group=_own(settings)),
        "endpoint_host": LocalEndpointHost(
            root=str(root / "endpoints"),
            default_name=_own(settings),
            port=settings.number("HOUSING_ENDPOINT_PORT", int),
            **_local_capture(settings),
        ),
    }


def _local_capture(settings: Settings) -> dict[str, Any]:
    """What `HOUSING_DATA_CAPTURE` says, for the local endpoint."""
    if not settings.switch("HOUSING_DATA_CAPTURE", default=False):
        return {}
    bounds = settings.given(
        sampling_percentage=("HOUSING_CAPTURE_PERCENT", float), megabytes=("HOUSING_CAPTURE_MEGABYTES", float)
    )
    return {"data_capture": LocalDataCapture(**bounds)}


def _sagemaker_capture(settings: Settings) -> dict[str, Any]:
    """The same for SageMaker's, which job `prune` bounds."""
    from resources.endpoints.endpoint_requests import DataCapture

    if not settings.switch("HOUSING_DATA_CAPTURE", default=False):
        return {}
    return {"data_capture": DataCapture(**settings.given(sampling_percentage=("HOUSING_CAPTURE_PERCENT", int)))}


def _sagemaker(settings: Settings) -> dict[str, Any]:
    from resources.compute.sagemaker import SageMakerCompute
    from resources.endpoints.sagemaker import SageMakerEndpointHost
    from resources.feature_store.sagemaker import SageMakerFeatureStore
    from resources.model_registry.sagemaker import SageMakerModelRegistry

    root = root_of(settings.environment)
    role = settings.required("HOUSING_ROLE_ARN", "the ARN of the IAM role that SageMaker runs jobs and endpoints as")
    region = settings.given(region_name=("AWS_REGION", str)) or settings.given(region_name=("AWS_DEFAULT_REGION", str))
    more = load_sections(settings)
    job = settings.given(
        instance_type=("HOUSING_INSTANCE_TYPE", str),
        instance_count=("HOUSING_INSTANCE_COUNT", int),
        subnets=("HOUSING_SUBNETS", list),
        security_group_ids=("HOUSING_SECURITY_GROUPS", list),
        price_per_hour=("HOUSING_PRICE_PER_HOUR", float),
    )
    image = settings.given(image=("HOUSING_IMAGE", str))
    compute = {
        "artifact_root": f"{root}/artifacts",
        "job_root": f"{root}/jobs",
        "name_prefix": _own(settings),
        **region,
        **image,
        **_caching(settings),
        **more["compute"],
        "job": {"role_arn": role, **job, **more["compute"].get("job", {})},
    }
    suffix, name = {"name_suffix": _own(settings, "")}, _own(settings)
    store = {"root": f"{root}/feature_store", "role_arn": role, **suffix, **region, **more["feature_store"]}
    registry = {"root": f"{root}/model_registry", "default_group": name, **image, **region, **more["model_registry"]}
    endpoints = {"root": f"{root}/endpoints", "role_arn": role, "default_name": name, **image, **region}
    endpoints |= _sagemaker_capture(settings) | more["endpoint_host"]
    if not endpoints.get("image") and not registry.get("image"):
        _check_start_without_packages(endpoints)
    return {
        **_common(settings, root),
        "compute": SageMakerCompute(**compute),
        "feature_store": SageMakerFeatureStore(**store),
        "model_registry": SageMakerModelRegistry(**registry),
        "endpoint_host": SageMakerEndpointHost(**endpoints),
    }


def _check_start_without_packages(endpoints: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an endpoint that AWS's image cannot serve: it installs packages when it starts."""
    if offline := [name for name in ("serverless", "network_isolation") if endpoints.get(name) not in (None, False)]:
        raise ValueError(
            f"endpoint_host.{offline[0]} needs a custom image (HOUSING_IMAGE, built from the Dockerfile): AWS's image "
            "installs this project's requirements when it starts, which such an endpoint cannot do"
        )
