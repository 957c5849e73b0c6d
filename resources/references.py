"""What assets pass to each other: small typed references, never the data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from step_scripts.contract import Artifact
from step_scripts.table import TableSpec


class Reference(BaseModel):
    """Base of all references."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceRef(Reference):
    """Validated rows of a source, the rows that were rejected, and the table (with its bounds) that decided."""

    source: str
    table: TableSpec
    rows: Artifact
    rejected: Artifact
    rows_total: int
    rows_rejected: int


class SplitRef(Reference):
    """One split. Only the training split carries the statistics that were fitted on it."""

    rows: Artifact
    fraction: float
    configured_fraction: float
    statistics: Artifact | None = None


class ModelRef(Reference):
    """A trained model, and the report of the search that found it."""

    model: Artifact
    report: Artifact
    metrics: dict[str, float]
    parameters: dict[str, float | int | str]
    request_digest: str


class EvaluationRef(Reference):
    """The evaluation of exactly one model (`model_digest`) on exactly one test split (`test_digest`)."""

    report: Artifact
    model_digest: str
    test_digest: str
    metrics: dict[str, float]
    rmse_threshold: float
