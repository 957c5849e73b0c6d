"""Run configuration of the assets. What a step does is set by the fields of the step's settings.

This is also where the domain's defaults live that are not columns: the slices by which errors are reported. The file
that `HOUSING_CONFIG` names gives fields other defaults, for every launch (`config_fields`).
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import dagster as dg
from pydantic import Field, field_validator

from housing_assets.config_fields import configures, refuse_unknown_ops
from step_scripts.parameters import (
    IngestFeaturesSettings,
    PrepareSplitsSettings,
    Slice,
    TuneModelSettings,
    ValidateSourceSettings,
)

SLICES = (
    Slice(name="price band", column="PRICE", bands=5),
    Slice(name="size", column="SQUARE_FEET", bands=5),
    Slice(name="decade built", column="YEAR_BUILT", width=10),
)

MODEL_GROUP = Field(
    default=None,
    pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}$",
    description="Name of the model group. Empty: the deployment's, `housing` unless HOUSING_ENVIRONMENT is set.",
)


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
class EvaluationConfig(dg.Config):
    """The quality gate."""

    model_group: str | None = MODEL_GROUP
    rmse_threshold: float = Field(
        default=15000.0, gt=0, description="Largest root mean squared error that passes, in the target's unit."
    )


@configures("registered_model")
class RegistrationConfig(dg.Config):
    """How the model enters the registry."""

    model_group: str | None = MODEL_GROUP
    approval: Literal["automatic", "manual"] = Field(
        default="automatic", description="`automatic`: approve what passed the gate; `manual`: a person approves."
    )


@configures("endpoint")
class EndpointConfig(dg.Config):
    """Where the model is served."""

    endpoint_name: str | None = Field(
        default=None,
        pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}$",
        description="Name of the endpoint. Empty: the deployment's, `housing` unless HOUSING_ENVIRONMENT is set.",
    )
    version: int | None = Field(
        default=None, ge=1, description="Version of the model group to serve. Empty: the one registered last."
    )
    rollback: bool = Field(default=False, description="Serve what the endpoint served before, instead of a `version`.")
    smoke_test_rows: int = Field(
        default=50, ge=1, le=1000, description="Test rows whose served predictions must equal the offline ones."
    )


refuse_unknown_ops()
