"""Running `validate_source` on files that a test writes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from housing_assets.schema import HOUSING_TABLE
from step_scripts.parameters import SourceFile, ValidateSourceParams
from step_scripts.runner.contract import StepRequest, StepResult
from step_scripts.runner.execution import run_step
from step_scripts.runner.ray_session import RaySession
from step_scripts.table.spec import TableSpec

HEADER = ",".join(HOUSING_TABLE.column_names)
MODIFIED = 1_700_000_000.25


class CollectingReporter(logging.Logger):
    """Keeps the messages."""

    def __init__(self) -> None:
        super().__init__("collecting", logging.INFO)
        self.messages: list[str] = []
        self.warnings: list[str] = []

    def handle(self, record: logging.LogRecord) -> None:
        (self.warnings if record.levelno >= logging.WARNING else self.messages).append(record.getMessage())


def sale(number: int) -> str:
    """A valid row, another one for each number."""
    year, size = 1950 + number % 70, 1000 + number / 4
    return f"{200_000 + number},{year},{size},{number % 9},{1 + number % 4 / 2},0.5,{number % 3},{number % 2},1"


def sales(count: int) -> list[str]:
    return [sale(number) for number in range(count)]


def table_text(rows: Sequence[str], header: str = HEADER, end: str = "\n") -> str:
    return end.join([header, *rows]) + end


def source_file(path: Path) -> SourceFile:
    return SourceFile(uri=str(path), bytes=path.stat().st_size, modified=path.stat().st_mtime)


def write_source(folder: Path, content: str | bytes, name: str = "sales.csv") -> SourceFile:
    """Write the file with a fixed modification time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    os.utime(path, (MODIFIED, MODIFIED))
    return source_file(path)


def validate(
    session: RaySession,
    root: Path,
    files: Sequence[SourceFile],
    *,
    table: TableSpec = HOUSING_TABLE,
    reporter: CollectingReporter | None = None,
    **settings: Any,
) -> StepResult:
    """Run the step by the runner, as a backend does."""
    params = ValidateSourceParams(table=table, files=tuple(files), **settings)
    request = StepRequest(
        step="validate_source",
        params=params.model_dump(mode="json"),
        output_root=str(root / "output"),
        code_version="test",
    )
    return run_step(request, reporter or CollectingReporter(), session)


def rows_of(result: StepResult) -> pl.DataFrame:
    """The rows written, in the order of the parts."""
    uris = result.outputs["rows"].file_uris(".parquet")
    return pl.concat([pl.read_parquet(uri) for uri in uris])


def rejected_of(result: StepResult) -> list[dict[str, Any]]:
    """The table of rejected rows."""
    (uri,) = result.outputs["rejected"].file_uris()
    frame = pl.read_csv(uri, schema_overrides={"value": pl.String, "column": pl.String}, empty_string_is_null=False)
    return frame.to_dicts()
