"""How long does the whole graph take, where does the time go, and how much memory does it need?

`python -m benchmarks.whole_graph [--rows 10000] [--source FILE] [--again]`; `--again` also measures a second run in
which nothing has changed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from benchmarks.measuring import ROOT, Measured, record, run_measured, stopwatch
from housing_assets.sample_data import write_sample


def main(arguments: list[str] | None = None) -> None:
    """Measure one run in a new folder, and print seconds per asset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="rows to generate (default 10,000)")
    parser.add_argument("--source", help="CSV files to use instead of generated ones")
    parser.add_argument("--again", action="store_true", help="also measure an unchanged second run")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as name:
        folder = Path(name)
        source = options.source or str(write_sample(folder / "sales.csv", rows=options.rows))
        with platform(folder, source) as environment:
            first = measure(environment)
            seconds = seconds_per_asset(folder / "dagster")
            phases = phases_per_step(folder / "dagster")
            figures = {"seconds": round(first.seconds, 2), "peak_megabytes": round(first.peak_bytes / 1e6)}
            if options.again:
                figures["unchanged_seconds"] = round(measure(environment).seconds, 2)
            rmse = rmse_of(folder / "dagster")
    for asset, duration in seconds.items():
        spent = ", ".join(f"{phase} {length:.2f}" for phase, length in phases.get(asset, {}).items())
        print(f"{asset:40s} {duration:8.2f} s  {spent}")
    print(
        f"{'whole command':40s} {first.seconds:8.2f} s, peak memory {first.peak_bytes / 1e6:,.0f} MB, RMSE {rmse:,.0f}"
    )
    if options.again:
        print(f"{'unchanged second run':40s} {figures['unchanged_seconds']:8.2f} s")
    record(
        "whole_graph",
        rows=options.rows,
        source=options.source,
        rmse=round(rmse, 1),
        per_step=seconds,
        phases=phases,
        **figures,
    )


@contextmanager
def platform(folder: Path, source: str) -> Iterator[dict[str, str]]:
    """The environment of a platform in `folder` that has not run yet. Its endpoint is stopped at the end."""
    environment = new_platform(folder, source)
    try:
        yield environment
    finally:
        stop_endpoint(environment)


def new_platform(folder: Path, source: str) -> dict[str, str]:
    """The environment of a platform in `folder` that has not run yet."""
    (folder / "dagster").mkdir(parents=True)
    (folder / "dagster" / "dagster.yaml").write_text((ROOT / "deploy" / "dagster.yaml").read_text())
    return environment_of(folder, source)


def environment_of(folder: Path, source: str) -> dict[str, str]:
    """What makes commands use the platform in `folder`."""
    return {
        "HOUSING_ROOT": str(folder / "data"),
        "DAGSTER_HOME": str(folder / "dagster"),
        "HOUSING_RAW_CSV": str(Path(source).absolute()) if "://" not in source else source,
        "PYTHONWARNINGS": "ignore",
    }


def stop_endpoint(environment: dict[str, str]) -> None:
    """Stop the endpoint of a platform."""
    root = f"{environment['HOUSING_ROOT']}/endpoints"
    run_measured([sys.executable, "-m", "resources.endpoints.local", "stop", "--root", root], environment)


def whole_run(
    source: str,
    trials: int,
    preset: str = "default",
    folder: str | None = None,
    rounds: int | None = None,
    all_rounds: bool = False,
) -> dict[str, Any]:
    """The first run of the whole graph, in a new folder, as one side of a comparison.

    `all_rounds`: every trial boosts `rounds` rounds of trees of depth 6, whatever comes of it.
    """
    figures: dict[str, float] = {}
    tuning: dict[str, Any] = {"num_trials": trials, "preset": preset} | ({"num_boost_round": rounds} if rounds else {})
    if all_rounds:
        tuning |= {"scheduler": "none", "early_stopping_rounds": rounds, "max_depth_min": 6, "max_depth_max": 6}
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as name:
        root = Path(folder or name)
        shutil.rmtree(root, ignore_errors=True)
        with platform(root, source) as environment:
            with stopwatch(figures):
                figures["process_seconds"] = measure(environment, tuning).seconds
            return {"figures": figures, "result": {"rmse": rmse_of(root / "dagster")}}


def measure(environment: dict[str, str], tuning: dict[str, Any] | None = None) -> Measured:
    """Run everything once. Exits with the run's output if it fails."""
    # The gate is not what is measured: other data may need another threshold.
    config: dict[str, Any] = {"evaluation_report": {"config": {"rmse_threshold": 1e9}}}
    if tuning:
        config["tuned_model"] = {"config": tuning}
    command = [
        *(sys.executable, "-m", "dagster", "asset", "materialize", "--select", "*"),
        *("-m", "housing_assets.definitions", "--config-json", json.dumps({"ops": config})),
    ]
    done = run_measured(command, environment)
    if done.status:
        sys.exit(done.output)
    return done


def seconds_per_asset(home: Path) -> dict[str, float]:
    """Duration of every step of the latest run."""
    with dg.DagsterInstance.from_config(str(home)) as instance:
        run = instance.get_runs(limit=1)[0]
        statistics = instance.get_run_step_stats(run.run_id)
    return {s.step_key: round(s.end_time - s.start_time, 2) for s in statistics if s.start_time and s.end_time}


def phases_per_step(home: Path) -> dict[str, dict[str, float]]:
    """Seconds of each phase, by step of the latest run, from the assets' metadata."""
    found: dict[str, dict[str, float]] = {}
    with dg.DagsterInstance.from_config(str(home)) as instance:
        run = instance.get_runs(limit=1)[0]
        records = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION).records
    for event in records:
        materialization = event.asset_materialization
        phases = materialization.metadata.get("phases") if materialization else None
        if materialization and isinstance(phases, dg.TableMetadataValue):
            rows = [row.data for row in phases.records]
            found[materialization.asset_key.to_user_string()] = {
                str(r["phase"]): float(r["seconds"] or 0) for r in rows
            }
    return found


def rmse_of(home: Path) -> float:
    """RMSE of the latest evaluation."""
    with dg.DagsterInstance.from_config(str(home)) as instance:
        record = instance.fetch_materializations(dg.AssetKey("evaluation_report"), limit=1).records[0]
    assert record.asset_materialization is not None
    return float(str(record.asset_materialization.metadata["rmse"].value))


if __name__ == "__main__":
    main()
