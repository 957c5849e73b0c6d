"""Run configuration of the assets. Fields, defaults and ranges are those of the steps' settings.

This is also where the domain's defaults live that are not columns: the slices by which errors are reported.
"""

from __future__ import annotations

from typing import Any, Literal

import dagster as dg
from pydantic import Field, ValidationError

from housing_assets.config_fields import unknown_fields
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


class ColumnBounds(dg.Config):
    """Bounds of one column that replace those of the schema. An empty bound is no limit."""

    minimum: float | None = Field(default=None, description="Smallest allowed value.")
    maximum: float | None = Field(default=None, description="Largest allowed value.")


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


class FeatureGroupConfig(IngestFeaturesSettings, dg.Config):
    """Where the rows go in the feature store."""

    feature_group_name: str | None = Field(
        default=None,
        pattern=r"^[a-zA-Z0-9]([_-]*[a-zA-Z0-9]){0,63}$",
        description="Name of the feature group. Empty: one group a source, so that two sources never mix.",
    )
    ingestion: Literal["mirror", "append"] = Field(
        default="mirror",
        description="`mirror`: records that the source no longer has are marked deleted; `append`: they stay.",
    )


class SplitsConfig(PrepareSplitsSettings, dg.Config):
    """Sizes of the splits, and the point in time to read."""

    as_of: str | None = Field(
        default=None, description="Read the feature store as it was at this time (ISO 8601). Empty: the latest."
    )


class TunedModelConfig(TuneModelSettings, dg.Config):
    """The hyperparameter search and the final fit."""


class EvaluationConfig(EvaluateModelSettings, dg.Config):
    """The quality gate."""


class RegistrationConfig(RegisterModelSettings, dg.Config):
    """How the model enters the registry."""


class EndpointConfig(DeployEndpointSettings, dg.Config):
    """Where the model is served."""


# By the name of the op that Dagster makes of the assets.
CONFIG_OF_OP: dict[str, type[dg.Config]] = {
    "raw_csv": RawCsvConfig,
    "feature_group": FeatureGroupConfig,
    "splits": SplitsConfig,
    "tuned_model": TunedModelConfig,
    "evaluation_report": EvaluationConfig,
    "registered_model": RegistrationConfig,
    "endpoint": EndpointConfig,
}


def settings_of(config: dg.Config, model: type) -> dict[str, Any]:
    """Those values of `config` that are fields of `model`, as plain data."""
    return {name: value for name, value in config.model_dump().items() if name in model.model_fields}


def check_run_config(run_config: dict[str, Any]) -> None:
    """Raise `dagster.Failure` naming every wrong value in `run_config`, and what is allowed, before any work starts."""
    problems: list[str] = []
    for op, section in (run_config.get("ops") or {}).items():
        model = CONFIG_OF_OP.get(op)
        if model is None:
            continue
        given = (section or {}).get("config") or {}
        problems += unknown_fields(model, given, op)
        try:
            model(**given)
        except ValidationError as error:
            problems += [_describe(op, model, dict(e)) for e in error.errors()]
    if problems:
        raise dg.Failure("run configuration: " + "; ".join(problems), allow_retries=False)


def _describe(op: str, model: type[dg.Config], error: dict[str, Any]) -> str:
    location = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if not location:
        return f"{op}: {message}"
    text = f"{op}.{location} = {error['input']!r}: {message}"
    field = model.model_fields.get(str(error["loc"][0]))
    return f"{text} ({field.description})" if field is not None and field.description else text
