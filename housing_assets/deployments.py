"""The one place that reads environment variables and decides which implementation every resource has.

`HOUSING_DEPLOYMENT=local` (default) runs everything on this machine, `HOUSING_DEPLOYMENT=sagemaker` runs steps as
SageMaker jobs with data, feature store, registry and endpoint on AWS. Nothing here connects to anything.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import dagster as dg
from dagster._core.storage.tags import (  # have no public names
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)
from pydantic import BaseModel, Field, ValidationError, field_validator

from housing_assets.config_fields import suggestion, unknown_fields
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

DEPLOYMENTS = ("local", "sagemaker")
# What a file named by HOUSING_SAGEMAKER_CONFIG may configure, field by field.
SECTIONS = ("compute", "feature_store", "model_registry", "endpoint_host")
_NAME = "housing"  # of endpoint, model group, experiment; and first part of the names of jobs
_ENVIRONMENT = re.compile(r"[a-z0-9](-?[a-z0-9]){0,27}")
_SECRETS = frozenset({"HOUSING_SLACK_WEBHOOK", "HOUSING_SMTP_USER", "HOUSING_SMTP_PASSWORD"})
# Of a URL: user information in general, or with a password where user names are usual, or a parameter.
_PASSWORD = re.compile(
    r"^\s*(https?|ray|smtps?)://[^/?#]*@"
    r"|://[^/?#@:]*:(?!\d+(?:/|$))[^@\s]*@"
    r"|[?&;](password|passwd|pwd|token|secret)=",
    re.IGNORECASE,
)
_PLACES = {
    "HOUSING_MLFLOW_URI": "MLflow's client reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN; drivers of databases have files and variables of their own, such as PGPASSWORD."
}
_BRANCH_LENGTH = 13  # of the readable part of a branch's environment


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
        from housing_assets.config import check_run_config  # which takes defaults from this module

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


class Settings:
    """Typed reading of environment variables. Raises `ValueError` naming the variable for a value without sense."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment

    def text(self, name: str) -> str | None:
        """The value; `None` if it is not set, or empty."""
        return self.environment.get(name, "").strip() or None

    def required(self, name: str, what: str) -> str:
        """The value. Raises `ValueError` saying what is missing."""
        value = self.text(name)
        if value is None:
            raise ValueError(f"{name} is not set: {what}")
        return value

    def number(self, name: str, kind: type[int] | type[float]) -> Any:
        """A number, or `None`."""
        text = self.text(name)
        if text is None:
            return None
        try:
            return kind(text)
        except ValueError as error:
            raise ValueError(f"{name}={text!r} is not {'an integer' if kind is int else 'a number'}") from error

    def switch(self, name: str, default: bool) -> bool:
        """`on` or `off`."""
        text = (self.text(name) or ("on" if default else "off")).lower()
        if text not in ("on", "off"):
            raise ValueError(f"{name}={text!r}: choose on or off")
        return text == "on"

    def words(self, name: str) -> list[str]:
        """Values separated by commas."""
        return [word.strip() for word in (self.text(name) or "").split(",") if word.strip()]

    def given(self, **variables: tuple[str, Any]) -> dict[str, Any]:
        """By field name: the values of those variables that are set, each (variable, kind)."""
        readers = {str: self.text, list: self.words}
        found = {
            field: readers[kind](name) if kind in readers else self.number(name, kind)
            for field, (name, kind) in variables.items()
        }
        return {field: value for field, value in found.items() if value not in (None, [])}


class AutomationSettings(BaseModel):
    """What makes the platform run by itself. Everything is off until it is switched on in the UI."""

    landing: str | None = Field(default=None, description="Folder or s3:// prefix where new CSV files arrive.")
    landing_start: date = Field(default=date(2025, 1, 1), description="First day of ingestion that can be backfilled.")
    settle_seconds: float = Field(default=60.0, ge=0, description="A file is taken once it is unchanged for so long.")
    retrain_cron: str = Field(default="0 3 * * 1", description="When to retrain: Mondays at three.")
    timezone: str = Field(default="UTC", description="Time zone of the schedules and of the days of ingestion.")
    freshness_days: float = Field(default=8.0, gt=0, description="A model or an endpoint older than this is stale.")
    watch_cron: str = Field(default="*/15 * * * *", description="When the endpoint is looked at.")
    drift_days: float = Field(default=7.0, gt=0, description="Captured requests of so many days are compared.")
    drift_rows: int = Field(default=200, ge=1, description="With fewer captured rows, nothing is said about drift.")
    repeat_hours: float = Field(default=24.0, gt=0, description="What is still abandoned after so long is told again.")
    prune_cron: str = Field(default="37 2 * * *", description="When old things are removed.")
    keep_versions: int = Field(default=10, ge=1, description="Newest versions of a model that stay.")
    pending_days: float = Field(default=30.0, ge=0, description="Versions that wait for a decision stay for so long.")
    capture_days: float = Field(default=30.0, gt=0, description="Captured requests older than this are removed.")
    capture_megabytes: float = Field(default=10_000.0, gt=0, description="Bound of an endpoint's captured requests.")

    @field_validator("landing")
    @classmethod
    def _home(cls, landing: str | None) -> str | None:
        return landing and expanded(landing)

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, timezone: str) -> str:
        try:
            ZoneInfo(timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError("there is no such time zone; names are those of the tz database: Europe/Berlin") from error
        return timezone

    @property
    def stale_after(self) -> timedelta:
        """`freshness_days` as a time span."""
        return timedelta(days=self.freshness_days)


def load_automation(environment: Mapping[str, str] | None = None) -> AutomationSettings:
    """`HOUSING_LANDING` and the others. Raises `ValueError` naming the variable for a value that makes no sense."""
    settings = Settings(os.environ if environment is None else environment)
    variables = {field: f"HOUSING_{field.upper()}" for field in AutomationSettings.model_fields}
    given = {field: value for field, name in variables.items() if (value := settings.text(name)) is not None}
    try:
        return AutomationSettings.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = variables[str(problem["loc"][0])]
        raise ValueError(f"{name}={problem['input']!r}: {problem['msg']}") from error


def load_launch_defaults(environment: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """By op: the fields that the file named by `HOUSING_CONFIG` sets for every launch, as it has them.

    The file is run configuration, as `--config` takes it. Raises `ValueError` for another form; fields and values are
    left to the caller.
    """
    settings = Settings(os.environ if environment is None else environment)
    path = settings.text("HOUSING_CONFIG")
    if path is None:
        return {}
    content = _yaml_file("HOUSING_CONFIG", path)
    form = f"HOUSING_CONFIG={path!r} must be run configuration, as YAML: `ops: {{raw_csv: {{config: {{…}}}}}}`"
    if others := sorted(map(str, set(content) - {"ops"})):
        raise ValueError(f"{form}. It has {', '.join(others)}, which gives no defaults")
    sections = {}
    for op, section in _mapping(content.get("ops"), form).items():
        section = _mapping(section, f"{form}. ops.{op} is not of this form")
        if others := sorted(map(str, set(section) - {"config"})):
            raise ValueError(f"{form}. ops.{op} has {', '.join(others)} beside or instead of config")
        sections[str(op)] = _mapping(section.get("config"), f"{form}. ops.{op}.config is not of this form")
    return sections


def _mapping(value: Any, problem: str) -> dict[Any, Any]:
    """`value`, a mapping; an empty one for nothing. Raises `ValueError` with `problem` for anything else."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(problem)
    return value or {}


def _yaml_file(variable: str, path: str) -> dict[Any, Any]:
    """The mapping in the file that the variable names. Raises `ValueError` if it cannot be read, or holds another."""
    import yaml

    try:
        content = yaml.safe_load(Path(expanded(path)).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{variable}={path!r} cannot be read: {error}") from error
    return _mapping(content, f"{variable}={path!r} must hold sections with fields, as YAML")


def load_resources(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """All resources of the deployment that `HOUSING_DEPLOYMENT` names (default `local`).

    Raises `ValueError` naming the variable for a value that makes no sense.
    """
    settings = Settings(os.environ if environment is None else environment)
    _refuse_passwords(settings.environment)
    deployment = settings.text("HOUSING_DEPLOYMENT") or "local"
    if deployment not in DEPLOYMENTS:
        raise ValueError(f"HOUSING_DEPLOYMENT={deployment!r}: choose one of {', '.join(DEPLOYMENTS)}")
    return _sagemaker(settings) if deployment == "sagemaker" else _local(settings)


def _refuse_passwords(environment: Mapping[str, str]) -> None:
    """Raise `ValueError` for a URL with a password in it: it would stand in the UI, in logs and in Dagster's database.

    Those that are secrets as a whole are read where they are used, and never part of the definitions.
    """
    for name, value in environment.items():
        if not name.startswith(("HOUSING_", "RAY_ADDRESS", "AWS_ENDPOINT_URL")) or name in _SECRETS:
            continue
        if _PASSWORD.search(value):
            raise ValueError(
                f"{name} has a user name or a password in its URL, which would stand in the UI, in logs and in "
                f"Dagster's database: take it out. {_PLACES.get(name, '')}".rstrip()
            )


def environment_of(environment: Mapping[str, str] | None = None) -> str | None:
    """The environment that everything has places and names of its own in; `None` for the only one.

    On a branch deployment of Dagster+ it is the branch's, whatever `HOUSING_ENVIRONMENT` says: a branch never touches
    what production uses. Raises `ValueError` naming the variable for a name that does not fit into AWS's names.
    """
    settings = Settings(os.environ if environment is None else environment)
    if settings.text("DAGSTER_CLOUD_IS_BRANCH_DEPLOYMENT") == "1":
        branch = settings.required("DAGSTER_CLOUD_GIT_BRANCH", "Dagster+ sets it on branch deployments")
        readable = re.sub(r"[^a-z0-9]+", "-", branch.lower())[:_BRANCH_LENGTH].strip("-")
        digest = hashlib.sha256(branch.encode()).hexdigest()[:6]
        return "-".join(part for part in ("branch", readable, digest) if part)
    name = settings.text("HOUSING_ENVIRONMENT")
    if name is not None and not _ENVIRONMENT.fullmatch(name):
        raise ValueError(
            f"HOUSING_ENVIRONMENT={name!r}: choose at most 28 lower-case letters, digits and single inner hyphens"
        )
    return name


def root_of(environment: Mapping[str, str] | None = None) -> str:
    """The folder or s3:// prefix below which this environment keeps everything."""
    settings = Settings(os.environ if environment is None else environment)
    if (settings.text("HOUSING_DEPLOYMENT") or "local") == "local":
        place = settings.text("HOUSING_ROOT") or "data"
        if "://" in place:
            raise ValueError(
                f"HOUSING_ROOT={place!r}: with HOUSING_DEPLOYMENT=local it must be a folder of this machine; for a "
                "root on S3 set HOUSING_DEPLOYMENT=sagemaker"
            )
        if Path(place).exists() and not Path(place).is_dir():
            raise ValueError(f"HOUSING_ROOT={place!r} is a file: name a folder")
        root = str(Path(place).absolute())
    else:
        root = settings.required(
            "HOUSING_ROOT", "the s3:// prefix below which everything is kept, for example s3://bucket/housing"
        ).rstrip("/")
        if not root.startswith("s3://"):
            raise ValueError(f"HOUSING_ROOT={root!r}: with HOUSING_DEPLOYMENT=sagemaker it must be an s3:// prefix")
    name = environment_of(settings.environment)
    return storage.join(root, "environments", name) if name else root


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
    more = _sections(settings)
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


def _sections(settings: Settings) -> dict[str, dict[str, Any]]:
    """What the file named by `HOUSING_SAGEMAKER_CONFIG` says, by resource."""
    empty: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    path = settings.text("HOUSING_SAGEMAKER_CONFIG")
    if path is None:
        return empty
    content = _yaml_file("HOUSING_SAGEMAKER_CONFIG", path)
    if not all(isinstance(section, dict) for section in content.values()):
        raise ValueError(f"HOUSING_SAGEMAKER_CONFIG={path!r} must hold sections with fields, as YAML")
    if unknown := sorted(str(name) for name in set(content) - set(SECTIONS)):
        wrong = ". ".join(f"{name} is unknown{suggestion(name, SECTIONS)}" for name in unknown)
        raise ValueError(f"HOUSING_SAGEMAKER_CONFIG={path!r}: {wrong}")
    models = _section_models()
    if problems := [p for name, section in content.items() for p in unknown_fields(models[name], section, name)]:
        raise ValueError(f"HOUSING_SAGEMAKER_CONFIG={path!r}: {'. '.join(problems)}")
    return empty | {name: dict(section) for name, section in content.items()}


def _section_models() -> dict[str, type[BaseModel]]:
    from resources.compute.sagemaker import SageMakerCompute
    from resources.endpoints.sagemaker import SageMakerEndpointHost
    from resources.feature_store.sagemaker import SageMakerFeatureStore
    from resources.model_registry.sagemaker import SageMakerModelRegistry

    models = (SageMakerCompute, SageMakerFeatureStore, SageMakerModelRegistry, SageMakerEndpointHost)
    return dict(zip(SECTIONS, models, strict=True))
