"""How long does a run take in which nothing has changed, compared with the first?

`python -m benchmarks.second_run [--rows 10000]`. Both are `dagster asset materialize` of all assets.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import Side, compare, parser, stopwatch
from benchmarks.whole_graph import environment_of, measure, new_platform, rmse_of, stop_endpoint
from housing_assets.sample_data import write_sample


def first(folder: str, source: str) -> dict[str, Any]:
    """A run in a new folder. What it made is left for the second, the endpoint too."""
    figures: dict[str, float] = {}
    shutil.rmtree(folder, ignore_errors=True)
    environment = new_platform(Path(folder), source)
    with stopwatch(figures):
        figures["process_seconds"] = measure(environment).seconds
    return {"figures": figures, "result": {"rmse": rmse_of(Path(folder, "dagster"))}}


def again(folder: str, source: str) -> dict[str, Any]:
    """An unchanged run in the same folder."""
    figures: dict[str, float] = {}
    environment = environment_of(Path(folder), source)
    try:
        with stopwatch(figures):
            figures["process_seconds"] = measure(environment).seconds
    finally:
        stop_endpoint(environment)
    return {"figures": figures, "result": {"rmse": rmse_of(Path(folder, "dagster"))}}


def main(arguments: list[str] | None = None) -> None:
    """Compare both."""
    options = parser(__doc__, rows=10_000)
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="housing-bench-", ignore_cleanup_errors=True) as name:
        source = str(write_sample(Path(name, "sales.csv"), rows=chosen.rows))
        work = {"folder": f"{name}/platform", "source": source}
        compare(
            "second_run",
            Side("unchanged run", again, work),
            Side("first run", first, work),
            pairs=chosen.pairs,
            warm_ups=chosen.warm_ups,
            other_first=True,
            agree={"rmse": 0},
            rows=chosen.rows,
        )


if __name__ == "__main__":
    main()
