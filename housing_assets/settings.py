"""Environment variables: the one module that reads them, and says what they mean. Connects to nothing.

`Settings` declares each of them once: type, default, limits and meaning, which docs/configuration.md lists.
`housing_assets.deployments` makes the resources of it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError

from resources.sources.listing import expanded
from step_scripts.runner import storage

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
# What is wrong with a value, by pydantic's name for it; `expected` are the choices of a literal.
_WRONG = {
    "int_parsing": " is not an integer",
    "float_parsing": " is not a number",
    "bool_parsing": ": choose on or off",
    "literal_error": ": choose one of {expected}",
}


def _on_or_off(value: Any) -> Any:
    if isinstance(value, str) and value.lower() not in ("on", "off"):
        raise PydanticCustomError("bool_parsing", "choose on or off")  # pydantic itself takes yes, 1 and others
    return value


_Switch = Annotated[bool, BeforeValidator(_on_or_off)]
_Place = Annotated[str | None, AfterValidator(lambda place: place and expanded(place))]
_Words = Annotated[list[str], BeforeValidator(lambda text: [word.strip() for word in text.split(",") if word.strip()])]


def _variable(default: Any, meaning: str, *, shown: str | None = None, **more: Any) -> Any:
    """A field. `shown`: what stands for the default in the documentation, where the value would say too little."""
    return Field(default=default, description=meaning, json_schema_extra={"shown": shown}, **more)


class _Variables(BaseModel):
    """Fields are named as their variables, without `HOUSING_`. An empty variable is one that is not set."""

    model_config = ConfigDict(
        frozen=True, populate_by_name=True, alias_generator=lambda field: f"HOUSING_{field.upper()}"
    )


class Everywhere(_Variables):
    """What every deployment reads."""

    deployment: Literal["local", "sagemaker"] = _variable(
        "local", "`local` or `sagemaker`: which implementations the resources have."
    )
    root: str | None = _variable(
        None, "Folder (`sagemaker`: s3:// prefix) of artifacts, feature store and registry.", shown="./data"
    )
    environment: str | None = _variable(
        None,
        "For example `staging`: places and names of its own, below `environments/`. On branch deployments of Dagster+ "
        "the branch's, whatever is set.",
    )
    raw_csv: _Place = _variable(
        None, "Path, folder, glob or s3:// URI of the source files; `~` is the home folder.", shown="generated data"
    )
    config: str | None = _variable(
        None,
        "YAML file with run configuration that every launch has unless it says something else; `~` is the home "
        "folder. See [below](#run-configuration).",
    )
    sample_rows: int = _variable(10_000, "Rows to generate when there is no source.", ge=1)
    cache: _Switch = _variable(True, "`off`: run every step, even if nothing has changed.")
    cache_hours: float = _variable(12.0, "How long an earlier run's result is reused.", gt=0)
    data_capture: _Switch = _variable(False, "`on`: the endpoint keeps requests and answers, for `prediction_drift`.")
    capture_percent: float | None = _variable(None, "Share of the requests that is kept, percent.", shown="100")
    capture_megabytes: float | None = _variable(
        None,
        "Bound of what an endpoint keeps; the oldest make room (`sagemaker`: when job `prune` runs).",
        shown="100; `sagemaker`: 10000",
        gt=0,
    )
    capture_days: float = _variable(30.0, "What is older is removed when job `prune` runs.", gt=0)
    dagster_home: str | None = _variable(
        None, "Dagster's runs and events.", shown="./.dagster (make)", alias="DAGSTER_HOME"
    )


class Local(_Variables):
    """What the deployment on this machine reads."""

    num_cpus: int | None = _variable(None, "CPUs that local Ray may use.", shown="all")
    ray_address: str | None = _variable(
        None, "An existing Ray cluster to use; it is never shut down. See [clusters](clusters.md).", alias="RAY_ADDRESS"
    )
    # The steps read these two; what is no number is refused here.
    ray_connect_seconds: float = _variable(60.0, "How long the cluster at `RAY_ADDRESS` may take to answer.")
    resource_wait_seconds: float = _variable(1800.0, "How long search and final fit wait for CPUs that others use.")
    endpoint_port: int | None = _variable(None, "Port of the local endpoint.", shown="8080, or a free one")


class SageMaker(_Variables):
    """What the deployment on AWS reads."""

    role_arn: str | None = _variable(None, "ARN of the IAM role that jobs and endpoints run as.", shown="required")
    region: str | None = _variable(
        None, "AWS region.", shown="boto3's", validation_alias=AliasChoices("AWS_REGION", "AWS_DEFAULT_REGION")
    )
    image: str | None = _variable(
        None, "Image of jobs and endpoints, built from the Dockerfile.", shown="AWS's XGBoost image"
    )
    instance_type: str | None = _variable(None, "Instance type of jobs.", shown="ml.m5.xlarge")
    instance_count: int | None = _variable(None, "Hosts of each job; Ray spans them.", shown="1")
    subnets: _Words = _variable([], "VPC subnets of jobs, separated by commas.", shown="SageMaker's network")
    security_groups: _Words = _variable([], "Security groups of jobs; needed with subnets.")
    price_per_hour: float | None = _variable(None, "Price of one instance-hour, for cost estimates.")
    sagemaker_config: str | None = _variable(None, "YAML file with every other field of the resources, by resource.")


class Automation(_Variables):
    """What makes the platform run by itself, and who hears of it. Off until it is switched on in the UI."""

    landing: _Place = _variable(None, "Folder or s3:// prefix where new files arrive; days become partitions.")
    landing_start: date = _variable(date(2025, 1, 1), "First day of ingestion that can be backfilled.")
    settle_seconds: float = _variable(
        60.0,
        "A file is taken once it is unchanged for so long; ten times as long if its last line has no line end.",
        ge=0,
    )
    retrain_cron: str = _variable("0 3 * * 1", "When `weekly_retraining` runs.")
    timezone: str = _variable("UTC", "Time zone of the schedules and of the days of ingestion.")
    freshness_days: float = _variable(8.0, "A model or an endpoint older than this is stale.", gt=0)
    watch_cron: str = _variable("*/15 * * * *", "When `endpoint_watch` looks at the endpoint.")
    drift_days: float = _variable(7.0, "Captured requests of so many days are compared with the training data.", gt=0)
    drift_rows: int = _variable(200, "With fewer captured rows, nothing is said about drift.", ge=1)
    prune_cron: str = _variable("37 2 * * *", "When `nightly_prune` removes what is old.")
    keep_versions: int = _variable(10, "So many newest versions of a model stay, and those that are needed.", ge=1)
    pending_days: float = _variable(30.0, "Versions that wait for a decision stay for so many days.", ge=0)
    repeat_hours: float = _variable(24.0, "What `hourly_sweep` has reported is reported again after so long.", gt=0)
    notifier: Literal["log", "slack", "email", "sns"] = _variable(
        "log", "How notifications are sent: `log`, `slack`, `email`, `sns`."
    )
    slack_webhook: SecretStr | None = _variable(None, "URL of Slack's incoming webhook. A secret.")
    sns_topic: str | None = _variable(None, "ARN of the topic.")
    smtp_host: str | None = _variable(None, "SMTP server.")
    smtp_port: int = _variable(587, "Its port.")
    smtp_sender: str | None = _variable(None, "The address that messages come from.")
    smtp_recipients: _Words = _variable([], "The addresses that receive them, separated by commas.")
    smtp_user: SecretStr | None = _variable(None, "User name, if the server wants one.")
    smtp_password: SecretStr | None = _variable(None, "Its password. A secret.")
    smtp_allow_insecure: _Switch = _variable(
        False, "`on`: send also without encryption, or to a server whose certificate cannot be verified."
    )
    mlflow_uri: str | None = _variable(
        None, "Tracking server, database, or ARN: tuning runs are recorded in MLflow. No password in it."
    )
    mlflow_experiment: str | None = _variable(None, "Name of the experiment.", shown="housing")
    mlflow_artifacts: str | None = _variable(None, "Where a new experiment keeps artifacts.", shown="the server's")

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, timezone: str) -> str:
        try:
            ZoneInfo(timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError("there is no such time zone; names are those of the tz database: Europe/Berlin") from error
        return timezone


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


class Settings(Everywhere, Local, SageMaker, Automation):
    """All environment variables, read and checked."""

    is_branch: bool = Field(default=False, alias="DAGSTER_CLOUD_IS_BRANCH_DEPLOYMENT")
    branch: str | None = Field(default=None, alias="DAGSTER_CLOUD_GIT_BRANCH")

    @classmethod
    def load(cls, environment: Mapping[str, str] | None = None) -> Self:
        """From the process's environment, or another. Raises `ValueError` naming the variable for a wrong value."""
        variables = os.environ if environment is None else environment
        _refuse_passwords(variables)
        try:
            return cls.model_validate({name: text.strip() for name, text in variables.items() if text.strip()})
        except ValidationError as error:
            problem = error.errors()[0]
            expected = problem.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ")
            wrong = _WRONG.get(problem["type"], f": {problem['msg']}").format(expected=expected)
            raise ValueError(f"{problem['loc'][0]}={problem['input']!r}{wrong}") from error

    def required(self, field: str, what: str) -> str:
        """The value of a variable. Raises `ValueError` saying what is missing."""
        if (value := getattr(self, field)) is None:
            raise ValueError(f"HOUSING_{field.upper()} is not set: {what}")
        return value

    @property
    def own_environment(self) -> str | None:
        """The environment that everything has places and names of its own in; `None` for the only one.

        On a branch deployment of Dagster+ it is the branch's, whatever `HOUSING_ENVIRONMENT` says: a branch never
        touches what production uses. Raises `ValueError` for a name that does not fit into AWS's names.
        """
        if self.is_branch:
            if self.branch is None:
                raise ValueError("DAGSTER_CLOUD_GIT_BRANCH is not set: Dagster+ sets it on branch deployments")
            readable = re.sub(r"[^a-z0-9]+", "-", self.branch.lower())[:_BRANCH_LENGTH].strip("-")
            digest = hashlib.sha256(self.branch.encode()).hexdigest()[:6]
            return "-".join(part for part in ("branch", readable, digest) if part)
        name = self.environment
        if name is not None and not _ENVIRONMENT.fullmatch(name):
            raise ValueError(
                f"HOUSING_ENVIRONMENT={name!r}: choose at most 28 lower-case letters, digits and single inner hyphens"
            )
        return name

    @property
    def own_root(self) -> str:
        """The folder or s3:// prefix below which this environment keeps everything."""
        if self.deployment == "local":
            place = self.root or "data"
            if "://" in place:
                raise ValueError(
                    f"HOUSING_ROOT={place!r}: with HOUSING_DEPLOYMENT=local it must be a folder of this machine; for a "
                    "root on S3 set HOUSING_DEPLOYMENT=sagemaker"
                )
            if Path(place).exists() and not Path(place).is_dir():
                raise ValueError(f"HOUSING_ROOT={place!r} is a file: name a folder")
            root = str(Path(place).absolute())
        else:
            what = "the s3:// prefix below which everything is kept, for example s3://bucket/housing"
            root = self.required("root", what).rstrip("/")
            if not root.startswith("s3://"):
                raise ValueError(f"HOUSING_ROOT={root!r}: with HOUSING_DEPLOYMENT=sagemaker it must be an s3:// prefix")
        return storage.join(root, "environments", self.own_environment) if self.own_environment else root
