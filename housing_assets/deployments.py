"""The one place that decides which implementation every resource has, from the environment (`housing_assets.settings`).

`HOUSING_DEPLOYMENT=local` (default) runs everything on this machine, `HOUSING_DEPLOYMENT=sagemaker` runs steps as
SageMaker jobs with data, feature store, registry and endpoint on AWS. Nothing here connects to anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from housing_assets.config_fields import suggestion, unknown_fields, yaml_file
from housing_assets.own_resources import CheckedReferenceIOManager, SourceLocation
from housing_assets.settings import Settings
from resources.compute.local_ray import LocalRay
from resources.endpoints.local import LocalDataCapture, LocalEndpointHost
from resources.feature_store.local import LocalFeatureStore
from resources.model_registry.local import LocalModelRegistry
from resources.references.evidence import EvidenceStore
from resources.services.experiments import ExperimentTracker, MlflowTracking, NoTracking
from resources.services.notifier import EmailNotifier, LogNotifier, Notifier, SlackNotifier, SnsNotifier
from step_scripts.runner import storage

_NAME = "housing"  # of endpoint, model group, experiment; and first part of the names of jobs


def load_resources(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """All resources of the deployment that `HOUSING_DEPLOYMENT` names (default `local`).

    Raises `ValueError` naming the variable for a value that makes no sense.
    """
    settings = Settings.load(environment)
    root, name = settings.own_root, _own(settings)
    common = {
        "notifier": _notifier(settings),
        "experiments": _experiments(settings, name),
        "io_manager": CheckedReferenceIOManager(root=storage.join(root, "references")),
        "evidence": EvidenceStore(root=storage.join(root, "evidence")),
        "source_location": SourceLocation(
            landing=settings.landing,
            settle_seconds=settings.settle_seconds,
            timezone=settings.timezone,
            source=settings.raw_csv,
            sample_folder=storage.join(root, "sample"),
            sample_rows=settings.sample_rows,
        ),
    }
    fields: dict[str, dict[str, Any]] = {  # what every backend has
        "compute": {
            "artifact_root": storage.join(root, "artifacts"),
            "use_cache": settings.cache,
            "cache_expiry_hours": settings.cache_hours,
        },
        "feature_store": {"root": storage.join(root, "feature_store"), "name_suffix": _own(settings, "")},
        "model_registry": {"root": storage.join(root, "model_registry"), "default_group": name},
        "endpoint_host": {"root": storage.join(root, "endpoints"), "default_name": name},
    }
    backend = _sagemaker if settings.deployment == "sagemaker" else _local
    return common | backend(settings, fields)


def _own(settings: Settings, name: str = _NAME) -> str:
    """`name`, with the environment at its end."""
    return f"{name}-{settings.own_environment}" if settings.own_environment else name


def _given(**values: Any) -> dict[str, Any]:
    """Those that are set: the resources have defaults for the others."""
    return {field: value for field, value in values.items() if value not in (None, [])}


def _notifier(settings: Settings) -> Notifier:
    if settings.notifier == "slack":
        # Read where a message is sent: the URL is a secret, and never part of the definitions.
        return SlackNotifier(webhook_url=dg.EnvVar("HOUSING_SLACK_WEBHOOK"))
    if settings.notifier == "sns":
        return SnsNotifier(topic_arn=settings.required("sns_topic", "the ARN of the topic to publish to"))
    if settings.notifier == "email":
        login = {"user": dg.EnvVar("HOUSING_SMTP_USER"), "password": dg.EnvVar("HOUSING_SMTP_PASSWORD")}
        return EmailNotifier(
            host=settings.required("smtp_host", "the SMTP server that sends the messages"),
            port=settings.smtp_port,
            sender=settings.required("smtp_sender", "the address that messages come from"),
            recipients=settings.smtp_recipients,
            allow_insecure=settings.smtp_allow_insecure,
            **(login if settings.smtp_user else {}),
        )
    return LogNotifier()


def _experiments(settings: Settings, name: str) -> ExperimentTracker:
    if settings.mlflow_uri is None:
        return NoTracking()
    return MlflowTracking(
        tracking_uri=settings.mlflow_uri,
        experiment=settings.mlflow_experiment or name,
        **_given(artifact_location=settings.mlflow_artifacts),
    )


def _local(settings: Settings, fields: dict[str, dict[str, Any]]) -> dict[str, Any]:
    captured = _given(sampling_percentage=settings.capture_percent, megabytes=settings.capture_megabytes)
    return {
        "compute": LocalRay(**fields["compute"], address=settings.ray_address, num_cpus=settings.num_cpus),
        "feature_store": LocalFeatureStore(**fields["feature_store"]),
        "model_registry": LocalModelRegistry(**fields["model_registry"]),
        "endpoint_host": LocalEndpointHost(
            **fields["endpoint_host"],
            port=settings.endpoint_port,
            data_capture=LocalDataCapture(**captured) if settings.data_capture else None,
        ),
    }


def _sagemaker(settings: Settings, fields: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from resources.compute.sagemaker import SageMakerCompute
    from resources.endpoints.endpoint_requests import DataCapture
    from resources.endpoints.sagemaker import SageMakerEndpointHost
    from resources.feature_store.sagemaker import SageMakerFeatureStore
    from resources.model_registry.sagemaker import SageMakerModelRegistry

    role = settings.required("role_arn", "the ARN of the IAM role that SageMaker runs jobs and endpoints as")
    common, image = _given(region_name=settings.region), _given(image=settings.image)
    job = _given(
        instance_type=settings.instance_type,
        instance_count=settings.instance_count,
        subnets=settings.subnets,
        security_group_ids=settings.security_groups,
        price_per_hour=settings.price_per_hour,
    )
    captured = _given(sampling_percentage=settings.capture_percent)  # job `prune` bounds how much is kept
    capture = _given(data_capture=DataCapture(**captured) if settings.data_capture else None)
    own: dict[str, dict[str, Any]] = {
        "compute": {"job_root": storage.join(settings.own_root, "jobs"), "name_prefix": _own(settings), **image},
        "feature_store": {"role_arn": role},
        "model_registry": image,
        "endpoint_host": {"role_arn": role, **capture, **image},
    }
    kinds = {
        "compute": SageMakerCompute,
        "feature_store": SageMakerFeatureStore,
        "model_registry": SageMakerModelRegistry,
        "endpoint_host": SageMakerEndpointHost,
    }
    sections = _sections(settings.sagemaker_config, kinds)
    fields = {name: common | fields[name] | own[name] | sections.get(name, {}) for name in kinds}
    fields["compute"]["job"] = {"role_arn": role, **job, **fields["compute"].get("job", {})}
    endpoints = fields["endpoint_host"]
    offline = [name for name in ("serverless", "network_isolation") if endpoints.get(name) not in (None, False)]
    if offline and not endpoints.get("image") and not fields["model_registry"].get("image"):
        raise ValueError(
            f"endpoint_host.{offline[0]} needs a custom image (HOUSING_IMAGE, built from the Dockerfile): AWS's image "
            "installs this project's requirements when it starts, which such an endpoint cannot do"
        )
    return {name: kind(**fields[name]) for name, kind in kinds.items()}


def _sections(path: str | None, kinds: Mapping[str, type[dg.ConfigurableResource]]) -> dict[str, dict[str, Any]]:
    """The file of `HOUSING_SAGEMAKER_CONFIG`: any field of the resources, in a section a resource.

    Raises `ValueError` naming every section and field that there is not.
    """
    content = yaml_file("HOUSING_SAGEMAKER_CONFIG", path)
    if not all(isinstance(section, dict) for section in content.values()):
        raise ValueError(f"HOUSING_SAGEMAKER_CONFIG={path!r} must hold sections with fields, as YAML")
    problems = [f"{name} is unknown{suggestion(str(name), [*kinds])}" for name in content if name not in kinds]
    problems = problems or [p for name, section in content.items() for p in unknown_fields(kinds[name], section, name)]
    if problems:
        raise ValueError(f"HOUSING_SAGEMAKER_CONFIG={path!r}: {'. '.join(problems)}")
    return content
