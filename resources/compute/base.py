"""The abstract compute backend: runs a step, or reuses the result of an earlier run.

A step's result is its manifest: the file that the step writes last, and that lists its outputs, metrics and details.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
from pydantic import Field

from resources.inventory import RESULT_FILE, NotOwned, OwnedItem, files_below, remove_step_results
from step_scripts.runner.code_version import library_versions, step_sources, version_of
from step_scripts.runner.contract import Artifact, StepError, StepParams, StepRequest, StepResult
from step_scripts.runner.execution import find_result, require_unchanged
from step_scripts.runner.wording import rounded


class ComputeBackend(dg.ConfigurableResource, ABC):
    """Runs steps. Which implementation is used is decided in `housing_assets.deployments`."""

    artifact_root: str = Field(description="Folder or s3:// prefix below which steps write their outputs.")
    use_cache: bool = Field(
        default=True,
        description="Answer an unchanged request from the manifest of an earlier run instead of running it.",
    )
    cache_expiry_hours: float = Field(
        default=12.0, gt=0, description="An earlier run's manifest is reused for this long; hours."
    )

    def run(
        self,
        context: dg.AssetExecutionContext,
        step: str,
        params: StepParams,
        inputs: dict[str, Artifact] | None = None,
        *,
        cacheable: bool = True,
        in_background: Callable[[], object] | None = None,
    ) -> StepResult:
        """Run `step`, or reuse its result if request, code and inputs are unchanged.

        `cacheable=False`: the step changes something beyond its outputs, so that a manifest does not prove that its
        work is still there. `in_background` is called in a thread while the step runs elsewhere, for imports that the
        asset needs for the result; it is not called for a reused result. Raises `dagster.Failure` without retries for
        bad input, with the figures as metadata.
        """
        reusable = cacheable and self.use_cache
        now = datetime.now(UTC)
        sources = step_sources(step)
        request = StepRequest(
            step=step,
            params=params.model_dump(mode="json"),
            inputs=inputs or {},
            output_root=self.artifact_root,
            code_version=version_of(sources),
            sources=dict(sources),
            environment=self._environment(),
            run_id=context.run.run_id,
            not_before=now - timedelta(hours=self.cache_expiry_hours) if reusable else now,
        )
        unusable: list[str] = []
        if reusable and (found := find_result(request, unusable.append)) is not None:
            age = (now - found.created_at).total_seconds()
            context.log.info(f"{step}: unchanged; reused the result of {age:.0f} s ago ({request.manifest_uri})")
            return found
        if unusable:
            context.log.warning(unusable[0])
            request = request.model_copy(update={"not_before": now})  # no earlier job is taken over either
        try:
            require_unchanged(request)
        except StepError as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        if in_background is not None:
            threading.Thread(target=in_background, daemon=True).start()
        return self._execute(context, request)

    def prepare(self, context: dg.AssetExecutionContext) -> None:
        """Begin, in the background, with what the first step needs (start Ray), if no earlier result can be reused."""

    def inventory(self) -> Sequence[OwnedItem]:
        """What this backend owns: stored results of steps, and processes or jobs that run now."""
        return files_below(self.artifact_root, RESULT_FILE, "results of")

    def remove(self, item: OwnedItem) -> None:
        """Remove an item of `inventory`, if it is still there. Raises `NotOwned` for what is not this deployment's."""
        if not item.location.startswith(f"{self.artifact_root.rstrip('/')}/"):
            raise NotOwned(f"{item.location} is not below {self.artifact_root}")
        remove_step_results(self.artifact_root, item.location)

    def _environment(self) -> dict[str, str]:
        """Versions of the libraries that results depend on. The process of the step compares them with its own."""
        return library_versions()

    @abstractmethod
    def _execute(self, context: dg.AssetExecutionContext, request: StepRequest) -> StepResult:
        """Run `request` on the backend and return its manifest."""


def failure_of(step: str, error: dict[str, Any]) -> dg.Failure:
    """The Dagster failure for an error that a step reported: `kind`, `message`, `details` or `traceback`."""
    if error["kind"] == "input":
        return dg.Failure(f"{step}: {error['message']}", metadata=as_metadata(error["details"]), allow_retries=False)
    return dg.Failure(
        f"{step} failed: {error['message']}",
        metadata={"traceback": dg.MetadataValue.md(f"```\n{error['traceback']}\n```")},
    )


def as_metadata(details: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data as metadata values: lists of flat objects become tables, other containers JSON.

    Numbers are for people here, hence rounded; artifacts, references and evidence hold them in full.
    """
    return {name: _metadata_value(value) for name, value in details.items() if value is not None}


def _metadata_value(value: object) -> Any:
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return table(value)
    if isinstance(value, dict | list):
        return dg.MetadataValue.json(_rounded(value))
    return _rounded(value.value if isinstance(value, dg.FloatMetadataValue) else value)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return rounded(value) if isinstance(value, float) else value


def table(rows: list[dict[str, Any]]) -> dg.TableMetadataValue:
    """Rows as a metadata table. Entries of a dictionary in a row become columns; lists and other values become text."""
    spread = [_spread(row) for row in rows]
    names = list(dict.fromkeys(name for row in spread for name in row))
    columns = []
    for name in names:
        first = next((row[name] for row in spread if row.get(name) is not None), None)
        columns.append(dg.TableColumn(name, dg.TableMetadataValue.infer_column_type(first)))
    records = [dg.TableRecord({name: row.get(name) for name in names}) for row in spread]
    return dg.MetadataValue.table(records, schema=dg.TableSchema(columns))


def _spread(row: Mapping[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            cells |= {f"{name}.{key}" if key in row or key in cells else key: item for key, item in value.items()}
        else:
            cells[name] = value
    return {k: _rounded(v) if isinstance(v, str | int | float | bool | None) else str(v) for k, v in cells.items()}
