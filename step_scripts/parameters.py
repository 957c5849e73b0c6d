"""Parameters of all steps, with defaults, ranges and descriptions.

`*Settings` are what people configure; `*Params` add what the platform fills in. This module imports nothing heavy:
run configuration is derived from it while Dagster loads the code location.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from step_scripts.runner.contract import StepError, StepParams
from step_scripts.table.spec import NUMERIC_DTYPES, TableSpec


class StepSettings(BaseModel):
    """Base of all settings."""

    # A validator is built when it is first needed, not while a code location loads.
    model_config = ConfigDict(defer_build=True)


class SourceFile(StepParams):
    """One source file and what identifies its content without reading it."""

    uri: str
    bytes: int = Field(ge=0)
    modified: float = Field(description="Modification time, seconds since 1970, UTC.")
    change: str = Field(
        default="",
        description="Differs whenever the file is written (`runner.local_files.FileState`). Empty: unknown.",
    )


class ValidateSourceSettings(StepSettings):
    """How the source files are read and which rows are acceptable."""

    max_rejected_fraction: float = Field(
        default=0.005, ge=0, le=1, description="Fail if a larger fraction of the rows violates the schema."
    )
    duplicate_rows: Literal["reject", "keep"] = Field(
        default="reject",
        description="Rows equal to an earlier row (or with the same key): reject all but the first, or keep all.",
    )
    delimiter: str = Field(default=",", min_length=1, max_length=1, description="Separator between fields.")
    unterminated_last_row: Literal["refuse", "accept"] = Field(
        default="refuse",
        description="A last row without a line end, as in a file that was cut off: refuse the file, or accept the row.",
    )
    encoding: Literal["utf-8"] = Field(default="utf-8", description="Encoding of the files.")
    max_line_bytes: int = Field(
        default=1 << 20, ge=256, le=1 << 26, description="A longer row means that the file is damaged; bytes."
    )
    chunk_bytes: int = Field(
        default=24 << 20, ge=1 << 10, le=1 << 32, description="Size of the fragments read in parallel; bytes."
    )


class ValidateSourceParams(ValidateSourceSettings, StepParams):
    """Parameters of step `validate_source`. `table` already holds configured ranges."""

    table: TableSpec
    files: tuple[SourceFile, ...]


class IngestFeaturesSettings(StepSettings):
    """How validated rows enter the feature store."""

    num_actors: int | None = Field(
        default=None, ge=1, le=1024, description="Ray actors that ingest in parallel. Empty: tasks on all CPUs."
    )


class OnlineTarget(StepParams):
    """Where an online store is, and how hard to press it."""

    group: str
    region_name: str | None = None
    in_flight: int = Field(default=16, description="Calls at the same time, of each actor.")
    retry_timeout_seconds: float = Field(
        default=300.0, description="How long the store may accept no entry of a batch; seconds."
    )


class IngestionTarget(StepParams):
    """Where a feature store is, and how rows enter it. `mirror`: delete the group's records that the dataset lacks."""

    root: str
    mirror: bool = False
    online: OnlineTarget | None = None


class IngestFeaturesParams(IngestFeaturesSettings, StepParams):
    """Parameters of step `ingest_features`. `target` comes from the feature store resource."""

    table: TableSpec
    group: str
    target: IngestionTarget


class PrepareSplitsSettings(StepSettings):
    """Fractions of the records in each split; they sum to 1."""

    train_size: float = Field(default=0.6, gt=0, lt=1, description="Fraction of the records to train on.")
    validation_size: float = Field(default=0.2, gt=0, lt=1, description="Fraction to choose hyperparameters with.")
    test_size: float = Field(default=0.2, gt=0, lt=1, description="Fraction to evaluate the final model on.")
    split_salt: str = Field(
        default="", max_length=64, description="Another text gives another, equally deterministic, assignment."
    )

    @model_validator(mode="after")
    def _sum_to_one(self) -> PrepareSplitsSettings:
        total = self.train_size + self.validation_size + self.test_size
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train_size + validation_size + test_size must be 1, not {total:.6g}")
        return self


class PrepareSplitsParams(PrepareSplitsSettings, StepParams):
    """Parameters of step `prepare_splits`. `deduplicate`: the input may hold several events of one record."""

    table: TableSpec
    deduplicate: bool = True
    as_of: AwareDatetime | None = Field(default=None, description="Latest event time to read.")


class TunedParameter(NamedTuple):
    """A hyperparameter of XGBoost: the type of its values, a customary one to begin with, and its scale."""

    kind: type[int] | type[float]
    customary: float
    logarithmic: bool = False


TUNED = {
    "max_depth": TunedParameter(int, 3),
    "eta": TunedParameter(float, 0.1, logarithmic=True),
    "min_child_weight": TunedParameter(float, 1.0),
    "subsample": TunedParameter(float, 0.8),
}
"""What is tuned. Of each, `TuneModelSettings` has the fields `…_min` and `…_max`, and every preset has values."""
PRESETS: dict[str, dict[str, float | int]] = {
    "default": {
        "max_depth_min": 1, "max_depth_max": 6,
        "eta_min": 0.03, "eta_max": 0.2,
        "min_child_weight_min": 0.0, "min_child_weight_max": 10.0,
        "subsample_min": 0.6, "subsample_max": 1.0,
        "num_boost_round": 1500, "early_stopping_rounds": 50, "num_trials": 8,
    },
    # The ranges of the AWS sample "Orchestrate Ray-based machine learning workflows using Amazon SageMaker".
    "article": {
        "max_depth_min": 1, "max_depth_max": 8,
        "eta_min": 0.2, "eta_max": 1.0,
        "min_child_weight_min": 0.0, "min_child_weight_max": 120.0,
        "subsample_min": 0.2, "subsample_max": 1.0,
        "num_boost_round": 100, "early_stopping_rounds": 10, "num_trials": 4,
    },
}  # fmt: skip


class TuneModelSettings(StepSettings):
    """The search and the final fit. What is left empty comes from the preset."""

    preset: Literal["default", "article"] = Field(
        default="default", description="Where empty fields take their values: `default`, or the AWS `article`'s."
    )
    max_depth_min: int | None = Field(default=None, ge=1, le=20, description="Smallest depth of a tree.")
    max_depth_max: int | None = Field(default=None, ge=1, le=20, description="Largest depth of a tree.")
    eta_min: float | None = Field(default=None, gt=0, le=1, description="Smallest learning rate.")
    eta_max: float | None = Field(default=None, gt=0, le=1, description="Largest learning rate.")
    min_child_weight_min: float | None = Field(default=None, ge=0, description="Smallest weight of a leaf.")
    min_child_weight_max: float | None = Field(default=None, ge=0, description="Largest weight of a leaf.")
    subsample_min: float | None = Field(default=None, gt=0, le=1, description="Smallest fraction of rows a tree sees.")
    subsample_max: float | None = Field(default=None, gt=0, le=1, description="Largest fraction of rows a tree sees.")
    num_boost_round: int | None = Field(default=None, ge=1, le=100_000, description="Most rounds of a trial.")
    early_stopping_rounds: int | None = Field(
        default=None, ge=1, le=10_000, description="Stop a fit after this many rounds without a better RMSE."
    )
    num_trials: int | None = Field(default=None, ge=1, le=10_000, description="Number of trials.")
    max_concurrent_trials: int | None = Field(
        default=None, ge=1, le=1024, description="Trials at a time. Empty: one per CPU."
    )
    search_algorithm: Literal["optuna", "random"] = Field(
        default="optuna", description="`optuna`: tree-structured Parzen estimator; `random`: random search."
    )
    scheduler: Literal["asha", "median", "none"] = Field(
        default="asha",
        description="Stops bad trials early: successive halving, median rule, or not at all. Trials of seconds go on.",
    )
    seed: int = Field(default=42, ge=0, le=2**31 - 1, description="Seed of the search and of XGBoost.")
    engine: Literal["ray_train", "xgboost_ray"] = Field(
        default="ray_train", description="What runs the final fit: Ray Train's XGBoostTrainer, or xgboost_ray."
    )
    num_workers: int | None = Field(
        default=None, ge=1, le=1024, description="Workers of the final fit. Empty: one per node."
    )

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> TuneModelSettings:
        for name, (low, high) in self.ranges().items():
            if low > high:
                raise ValueError(f"{name}_min ({low}) must not be greater than {name}_max ({high})")
        return self

    def resolved(self) -> dict[str, Any]:
        """All values, with the preset's where none is set."""
        values = self.model_dump(include=set(TuneModelSettings.model_fields))
        return values | {k: v for k, v in PRESETS[self.preset].items() if values[k] is None}

    def ranges(self) -> dict[str, tuple[Any, Any]]:
        """Smallest and largest value of each parameter that is tuned."""
        resolved = self.resolved()
        return {name: (resolved[f"{name}_min"], resolved[f"{name}_max"]) for name in TUNED}


class TuneModelParams(TuneModelSettings, StepParams):
    """Parameters of step `tune_model`, resolved."""

    table: TableSpec


class Slice(StepParams):
    """Groups of test rows whose errors are reported: by equal-width bins, or by quantile bands."""

    name: str
    column: str
    width: float | None = Field(default=None, gt=0, description="Width of a bin, in the column's unit.")
    bands: int | None = Field(default=None, ge=2, le=100, description="Number of equally populated bands.")


def check_slices(slices: Sequence[Slice], table: TableSpec) -> None:
    """Raise `StepError` for a slice that `table` cannot serve."""
    for item in slices:
        if item.column not in table.column_names:
            raise StepError(f"slice {item.name!r}: there is no column {item.column}; choose of {table.column_names}")
        if table.column(item.column).dtype not in NUMERIC_DTYPES:
            raise StepError(f"slice {item.name!r}: column {item.column} is not numeric")
        if (item.width is None) == (item.bands is None):
            raise StepError(f"slice {item.name!r}: give either `width` or `bands`")


class EvaluateModelParams(StepParams):
    """Parameters of step `evaluate_model`."""

    table: TableSpec
    slices: tuple[Slice, ...] = ()
    plotted_rows: int = Field(default=2000, ge=10, le=100_000)
