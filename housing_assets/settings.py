"""Environment variables: the one module that reads them, and says what they mean. Connects to nothing.

`Settings` reads single values; what several modules ask for has a function of its own. `housing_assets.deployments`
makes the resources of it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, Field, ValidationError, field_validator

from resources.sources.listing import expanded
from step_scripts.runner import storage

DEPLOYMENTS = ("local", "sagemaker")
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
    repeat_hours: float = Field(
        default=24.0, gt=0, description="Findings that remain are reported again after so long."
    )
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
    content = yaml_file("HOUSING_CONFIG", path)
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


def yaml_file(variable: str, path: str) -> dict[Any, Any]:
    """The mapping in the file that the variable names. Raises `ValueError` if it cannot be read, or holds another."""
    import yaml

    try:
        content = yaml.safe_load(Path(expanded(path)).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{variable}={path!r} cannot be read: {error}") from error
    return _mapping(content, f"{variable}={path!r} must hold sections with fields, as YAML")


def refuse_passwords(environment: Mapping[str, str]) -> None:
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
