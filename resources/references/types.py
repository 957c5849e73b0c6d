"""What assets pass to each other: small typed references, never the data."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from resources.references.evidence import Judged
from step_scripts.parameters import SourceFile
from step_scripts.runner.contract import Artifact, FrozenModel
from step_scripts.table.spec import TableSpec


class Reference(FrozenModel):
    """Base of all references."""


class ProducedRef(Reference):
    """Base of references to what a run has made: with which code."""

    run_id: str | None = None
    code_version: str | None = None


class DataFile(SourceFile):
    """A source file as it was read. `content`: a digest."""

    content: str | None = None
    rows: int | None = None


class DatasetRef(ProducedRef):
    """What was ingested at once. `digest` is that of the validated rows. No files: they were not recorded."""

    digest: str
    source: str = ""
    files: tuple[DataFile, ...] = ()
    rows: int | None = None
    rows_rejected: int | None = None
    commit: int | None = None
    ingested_at: datetime | None = None


class SnapshotRef(Reference):
    """The records of a feature group that were read: those of `commit`, and of the time `as_of` if there is one.

    `snapshot_id`: of that commit in the group's Iceberg table, for time travel by any engine.
    """

    group: str
    commit: int
    snapshot_id: int | None = None
    digest: str
    as_of: datetime | None = None
    run_id: str | None = None
    datasets: tuple[DatasetRef, ...] = ()


class SourceRef(ProducedRef):
    """Validated rows of a source, the rows that were rejected, and the table (with its bounds) that decided."""

    source: str
    table: TableSpec
    rows: Artifact
    rejected: Artifact
    rows_total: int
    rows_rejected: int
    files: tuple[DataFile, ...] = ()


class SplitRef(ProducedRef):
    """One split. Only the training split carries the statistics that were fitted on it.

    `splits`: digests of all three that were made together, by name. `judged`: what they stand on, as in the references
    below; blocking checks have judged it.
    """

    name: str = ""
    rows: Artifact
    fraction: float
    configured_fraction: float
    statistics: Artifact | None = None
    snapshot: SnapshotRef | None = None
    splits: dict[str, str] = Field(default_factory=dict)
    judged: tuple[Judged, ...] = ()


class ModelRef(ProducedRef):
    """A trained model, the report of the search that found it, and the training split that it was fitted on."""

    model: Artifact
    report: Artifact
    metrics: dict[str, float]
    parameters: dict[str, float | int | str]
    request_digest: str
    made_at: datetime | None = None
    validation_digest: str | None = None
    train: SplitRef | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    judged: tuple[Judged, ...] = ()


class EvaluationRef(ProducedRef):
    """The evaluation of exactly one model (`model_digest`) on exactly one test split (`test_digest`)."""

    report: Artifact
    model_digest: str
    test_digest: str
    test: Artifact | None = None
    metrics: dict[str, float]
    rmse_threshold: float
    judged: tuple[Judged, ...] = ()
