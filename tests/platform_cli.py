"""Runs the platform as people and CI do: through the command line, each run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

ROOT = Path(__file__).parents[1]
# A small search: the tests are about the platform, not about the model.
SMALL_SEARCH = {"tuned_model": {"num_trials": 2, "num_boost_round": 150, "eta_min": 0.1}}


@dataclass
class Platform:
    """One installation of the platform in a folder of its own."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make Dagster's folder and its databases: two processes cannot make them at once."""
        (self.folder / "dagster").mkdir(exist_ok=True)
        (self.folder / "dagster" / "dagster.yaml").write_text((ROOT / "deploy" / "dagster.yaml").read_text())
        with self.instance() as instance:
            instance.get_runs(limit=1)
            instance.all_asset_keys()
            instance.all_instigator_state()

    @property
    def env(self) -> dict[str, str]:
        """The environment of its processes."""
        own = {"HOUSING_ROOT": str(self.folder / "data"), "DAGSTER_HOME": str(self.folder / "dagster")}
        return os.environ | {"HOUSING_SAMPLE_ROWS": "1500", "PYTHONWARNINGS": "ignore"} | own | self.environment

    def command(self, select: str, config: dict[str, Any] | None) -> list[str]:
        """The command that materializes `select`, with `config` by asset on top of the small search."""
        merged = {op: {"config": values} for op, values in (SMALL_SEARCH | (config or {})).items()}
        chosen = {op: section for op, section in merged.items() if select == "*" or op in select.split()}
        selection = select if select == "*" else " or ".join(f'key:"{name}"' for name in select.split())
        return [
            *(sys.executable, "-m", "dagster", "asset", "materialize", "-m", "housing_assets.definitions"),
            *("--select", selection, "--config-json", json.dumps({"ops": chosen})),
        ]

    def materialize(
        self, select: str = "*", config: dict[str, Any] | None = None, *, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Materialize the assets named in `select` (separated by blanks)."""
        return self.run(*self.command(select, config)[1:], timeout=timeout)

    def run(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run Python with `arguments` in this installation; standard output and error come together."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=self.env,
            text=True,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )

    def instance(self) -> dg.DagsterInstance:
        """Its Dagster instance, to read what happened."""
        return dg.DagsterInstance.from_config(str(self.folder / "dagster"))

    def metadata(self, asset: str) -> dict[str, Any]:
        """Metadata of the latest materialization of `asset`."""
        with self.instance() as instance:
            record = instance.fetch_materializations(dg.AssetKey(asset), limit=1).records[0]
            assert record.asset_materialization is not None
            return {name: value.value for name, value in record.asset_materialization.metadata.items()}

    def materializations(self, asset: str) -> int:
        """How often `asset` was materialized."""
        with self.instance() as instance:
            return len(instance.fetch_materializations(dg.AssetKey(asset), limit=100).records)

    def runs(self) -> list[dg.DagsterRun]:
        """All runs, latest first."""
        with self.instance() as instance:
            return list(instance.get_runs())

    def reference(self, asset: str) -> dict[str, Any]:
        """The reference that `asset` left last for its readers."""
        return json.loads(Path(self.metadata(asset)["reference"]).read_text())["value"]

    def stop(self) -> None:
        """End its endpoint."""
        self.run("-m", "resources.endpoints.local", "stop", "--root", str(self.folder / "data" / "endpoints"))
