"""How long does the whole graph take, where does the time go, and how much memory does it need?

`python -m benchmarks.whole_graph [--rows 10000] [--source FILE] [--again]`; `--again` also measures a second run in
which nothing has changed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import dagster as dg

from benchmarks.measuring import ROOT, Measured, record, run_measured
from housing_assets.sample_data import write_sample

# The gate is not what is measured: other data may need another threshold.
CONFIG = '{"ops": {"evaluation_report": {"config": {"rmse_threshold": 1e9}}}}'


def main(arguments: list[str] | None = None) -> None:
    """Measure one run in a new folder, and print seconds per asset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="rows to generate (default 10,000)")
    parser.add_argument("--source", help="CSV files to use instead of generated ones")
    parser.add_argument("--again", action="store_true", help="also measure an unchanged second run")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as name:
        folder = Path(name)
        (folder / "dagster").mkdir()
        (folder / "dagster" / "dagster.yaml").write_text((ROOT / "dagster.yaml").read_text())
        source = options.source or str(write_sample(folder / "sales.csv", rows=options.rows))
        environment = {
            "HOUSING_ROOT": str(folder / "data"),
            "DAGSTER_HOME": str(folder / "dagster"),
            "HOUSING_RAW_CSV": str(Path(source).absolute()) if "://" not in source else source,
            "PYTHONWARNINGS": "ignore",
        }
        stop = [sys.executable, "-m", "resources.endpoints.local", "stop", "--root", str(folder / "data" / "endpoints")]
        try:
            first = measure(environment)
            seconds = seconds_per_asset(folder / "dagster")
            figures = {"seconds": round(first.seconds, 2), "peak_megabytes": round(first.peak_bytes / 1e6)}
            if options.again:
                figures["unchanged_seconds"] = round(measure(environment).seconds, 2)
            rmse = rmse_of(folder / "dagster")
        finally:
            run_measured(stop, environment)
    for asset, duration in seconds.items():
        print(f"{asset:40s} {duration:8.2f} s")
    print(
        f"{'whole command':40s} {first.seconds:8.2f} s, peak memory {first.peak_bytes / 1e6:,.0f} MB, RMSE {rmse:,.0f}"
    )
    if options.again:
        print(f"{'unchanged second run':40s} {figures['unchanged_seconds']:8.2f} s")
    record("whole_graph", rows=options.rows, source=options.source, rmse=round(rmse, 1), per_step=seconds, **figures)


def measure(environment: dict[str, str]) -> Measured:
    """Run everything once. Exits with the run's output if it fails."""
    command = [
        *(sys.executable, "-m", "dagster", "asset", "materialize", "--select", "*"),
        *("-m", "housing_assets.definitions", "--config-json", CONFIG),
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


def rmse_of(home: Path) -> float:
    """RMSE of the latest evaluation."""
    with dg.DagsterInstance.from_config(str(home)) as instance:
        record = instance.fetch_materializations(dg.AssetKey("evaluation_report"), limit=1).records[0]
    assert record.asset_materialization is not None
    return float(str(record.asset_materialization.metadata["rmse"].value))


if __name__ == "__main__":
    main()
