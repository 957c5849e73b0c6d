"""Run configuration of the assets. Fields, defaults and ranges are those of the steps' settings.

This is also where the domain's defaults live that are not columns: the slices by which errors are reported. The file
that `HOUSING_CONFIG` names gives fields other defaults, for every launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Literal, TypeVar

import dagster as dg
from pydantic import Field, ValidationError, field_validator

from housing_assets.config_fields import mapping, suggestion, unknown_fields, with_defaults, yaml_file
from housing_assets.settings import Settings
from step_scripts.parameters import (
    DeployEndpointSettings,
    EvaluateModelSettings,
    IngestFeaturesSettings,
    PrepareSplitsSettings,
    RegisterModelSettings,
    Slice,
    TuneModelSettings,
    ValidateSourceSettings,
)

SLICES = (
    Slice(name="price band", column="PRICE", bands=5),
    Slice(name="size", column="SQUARE_FEET", bands=5),
    Slice(name="decade built", column="YEAR_BUILT", width=10),
)

# By the name of the op that Dagster makes of the assets; filled below.
CONFIG_OF_OP: dict[str, type[dg.Config]] = {}
_Config = TypeVar("_Config", bound=dg.Config)


def load_launch_defaults(environment: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """By op: the fields that the file named by `HOUSING_CONFIG` sets for every launch, as it has them.

    The file is run configuration, as `--config` takes it. Raises `ValueError` for another form.
    """
    path = Settings.load(environment).config
    content = yaml_file("HOUSING_CONFIG", path)
    form = f"HOUSING_CONFIG={path!r} must be run configuration, as YAML: `ops: {{raw_csv: {{config: {{…}}}}}}`"
    if others := sorted(map(str, set(content) - {"ops"})):
        raise ValueError(f"{form}. It has {', '.join(others)}, which gives no defaults")
    sections = {}
    for op, section in mapping(content.get("ops"), form).items():
        section = mapping(section, f"{form}. ops.{op} is not of this form")
        if others := sorted(map(str, set(section) - {"config"})):
            raise ValueError(f"{form}. ops.{op} has {', '.join(others)} beside or instead of config")
        sections[str(op)] = mapping(section.get("config"), f"{form}. ops.{op}.config is not of this form")
    return sections


_LAUNCH_DEFAULTS = load_launch_defaults()


def _problems(op: str, model: type[dg.Config], given: dict[str, Any]) -> list[str]:
    """What is wrong with values for the fields of `model`: a sentence each."""
    problems = list(unknown_fields(model, given, op))
    try:
        model(**{str(name): value for name, value in given.items()})
    except ValidationError as error:
        problems += [_describe(op, model, dict(e)) for e in error.errors()]
    return problems


def _describe(op: str, model: type[dg.Config], error: dict[str, Any]) -> str:
    location = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if not location:
        return f"{op}: {message}"
    text = f"{op}.{location} = {error['input']!r}: {message}"
    field = model.model_fields.get(str(error["loc"][0]))
    return f"{text} ({field.description})" if field is not None and field.description else text


def configures(op: str) -> Callable[[type[_Config]], type[_Config]]:
    """Makes a class the configuration of `op`, with the defaults that `HOUSING_CONFIG` gives its fields.

    Raises `ValueError` naming every wrong field and value.
    """

    def configure(config: type[_Config]) -> type[_Config]:
        given = _LAUNCH_DEFAULTS.get(op, {})
        if given and (problems := _problems(op, config, given)):
            raise ValueError(f"HOUSING_CONFIG: {'; '.join(problems)}")
        CONFIG_OF_OP[op] = configured = with_defaults(config, given)
        return configured

    return configure


class ColumnBounds(dg.Config):
    """Bounds of one column that replace those of the schema. An empty bound is no limit."""

    minimum: float | None = Field(default=None, description="Smallest allowed value.")
    maximum: float | None = Field(default=None, description="Largest allowed value.")


@configures("raw_csv")
class RawCsvConfig(ValidateSourceSettings, dg.Config):
    """Which files are read, and which rows are acceptable."""

    source: str | None = Field(
        default=None,
        description="Path, folder, glob or s3:// URI of the CSV files. Empty: HOUSING_RAW_CSV, or else generated data.",
    )
    column_ranges: dict[str, ColumnBounds] = Field(
        default_factory=dict,
        description="Other bounds for columns, for example `{PRICE: {minimum: -1000000, maximum: 1000000000}}`.",
    )


@configures("feature_group")
class FeatureGroupConfig(IngestFeaturesSettings, dg.Config):
    """Where the rows go in the feature store."""

    feature_group_name: str | None = Field(
        default=None,
        pattern=r"^[a-zA-Z0-9]([_-]*[a-zA-Z0-9]){0,63}$",
        description="Name of the feature group. Empty: one group a source, so that two sources never mix.",
    )
    ingestion: Literal["mirror", "append"] = Field(
        default="mirror",
        description="`mirror`: records that the source no longer has are marked deleted; `append`: they stay. By day "
        "(HOUSING_LANDING) they always stay.",
    )


@configures("splits")
class SplitsConfig(PrepareSplitsSettings, dg.Config):
    """Sizes of the splits, and the point in time to read."""

    as_of: str | None = Field(
        default=None, description="Read the feature store as it was at this time (ISO 8601). Empty: the latest."
    )

    @field_validator("as_of")
    @classmethod
    def _is_a_time(cls, as_of: str | None) -> str | None:
        try:
            datetime.fromisoformat(as_of) if as_of else None
        except ValueError:
            raise ValueError("it is not a date or time in ISO 8601") from None
        return as_of


@configures("tuned_model")
class TunedModelConfig(TuneModelSettings, dg.Config):
    """The hyperparameter search and the final fit."""


@configures("evaluation_report")
class EvaluationConfig(EvaluateModelSettings, dg.Config):
    """The quality gate."""


@configures("registered_model")
class RegistrationConfig(RegisterModelSettings, dg.Config):
    """How the model enters the registry."""


@configures("endpoint")
class EndpointConfig(DeployEndpointSettings, dg.Config):
    """Where the model is served."""


def refuse_unknown_ops(defaults: Mapping[str, Any]) -> None:
    """Raise `ValueError` for defaults of an op that takes none."""
    if unknown := [
        f"ops.{op} is unknown{suggestion(op, [*CONFIG_OF_OP])}" for op in defaults if op not in CONFIG_OF_OP
    ]:
        raise ValueError(f"HOUSING_CONFIG: {'. '.join(unknown)}")


refuse_unknown_ops(_LAUNCH_DEFAULTS)


def settings_of(config: dg.Config, model: type) -> dict[str, Any]:
    """Those values of `config` that are fields of `model`, as plain data."""
    return {name: value for name, value in config.model_dump().items() if name in model.model_fields}


def check_run_config(run_config: dict[str, Any]) -> None:
    """Raise `dagster.Failure` naming every wrong value in `run_config`, and what is allowed, before any work starts."""
    problems: list[str] = []
    for op, section in (run_config.get("ops") or {}).items():
        if (model := CONFIG_OF_OP.get(op)) is not None:
            problems += _problems(op, model, (section or {}).get("config") or {})
    if problems:
        raise dg.Failure("run configuration: " + "; ".join(problems), allow_retries=False)
