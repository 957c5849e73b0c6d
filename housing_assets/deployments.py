"""The one place that reads environment variables and decides which implementation every resource has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from housing_assets.config import check_run_config
from resources.compute.local_ray import LocalRay
from resources.endpoints.local import LocalEndpointHost
from resources.feature_store.local import LocalFeatureStore
from resources.io_manager import ReferenceIOManager
from resources.model_registry.local import LocalModelRegistry

DEPLOYMENTS = ("local",)


class SourceLocation(dg.ConfigurableResource):
    """Where the source files are when run configuration does not say, and where generated data goes."""

    source: str | None = Field(default=None, description="Path, folder, glob or s3:// URI. Empty: generated data.")
    sample_folder: str = Field(description="Folder for generated data.")
    sample_rows: int = Field(default=10_000, ge=1, description="Rows to generate.")

    def resolve(self) -> str:
        """The source. Without one, data is generated once, the same on every machine."""
        if self.source:
            return self.source
        from housing_assets.sample_data import write_sample

        sample = Path(self.sample_folder) / f"house_sales_{self.sample_rows}.csv"
        if not sample.exists():
            write_sample(sample, rows=self.sample_rows)
        return str(sample)


class CheckedReferenceIOManager(ReferenceIOManager):
    """The IO manager, which every run initializes first: the moment to reject wrong run configuration."""

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Check the run's configuration."""
        if context.run is not None:
            check_run_config(dict(context.run.run_config))


def _number(environment: Mapping[str, str], name: str, kind: type[int] | type[float]) -> Any:
    text = environment.get(name, "").strip()
    if not text:
        return None
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r} is not {'an integer' if kind is int else 'a number'}") from error


def load_resources(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """All resources of the deployment that `HOUSING_DEPLOYMENT` names (default `local`).

    Raises `ValueError` naming the variable for a value that makes no sense.
    """
    environment = os.environ if environment is None else environment
    deployment = environment.get("HOUSING_DEPLOYMENT", "local")
    if deployment not in DEPLOYMENTS:
        raise ValueError(f"HOUSING_DEPLOYMENT={deployment!r}: choose one of {', '.join(DEPLOYMENTS)}")
    root = Path(environment.get("HOUSING_ROOT") or "data").absolute()
    caching = environment.get("HOUSING_CACHE", "on").lower()
    if caching not in ("on", "off"):
        raise ValueError(f"HOUSING_CACHE={caching!r}: choose on or off")
    return {
        "io_manager": CheckedReferenceIOManager(root=str(root / "references")),
        "source_location": SourceLocation(
            source=environment.get("HOUSING_RAW_CSV") or None,
            sample_folder=str(root / "sample"),
            sample_rows=_number(environment, "HOUSING_SAMPLE_ROWS", int) or 10_000,
        ),
        "compute": LocalRay(
            artifact_root=str(root / "artifacts"),
            use_cache=caching == "on",
            cache_expiry_hours=_number(environment, "HOUSING_CACHE_HOURS", float) or 12.0,
            address=environment.get("RAY_ADDRESS") or None,
            num_cpus=_number(environment, "HOUSING_NUM_CPUS", int),
        ),
        "feature_store": LocalFeatureStore(root=str(root / "feature_store")),
        "model_registry": LocalModelRegistry(root=str(root / "model_registry")),
        "endpoint_host": LocalEndpointHost(
            root=str(root / "endpoints"), port=_number(environment, "HOUSING_ENDPOINT_PORT", int)
        ),
    }
