"""What do Python, Dagster and Ray cost before any work is done?

`python -m benchmarks.overhead [--repeats 3]`. Imports are timed in new processes, without the start of the interpreter;
Ray's parts in one session of this process each time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from benchmarks.measuring import Side, record, run_measured, stopwatch
from step_scripts.runner.ray_environment import only_needed_processes

_IMPORTS = {
    "dagster": "import dagster",
    "code location": "import housing_assets.definitions",
    "ray": "import ray",
    "xgboost": "import xgboost",
    "all of step tune_model": "import step_scripts.tune_model",
    "what a trial's process imports": "import ray; import step_scripts.training.search_trials",
}


def ray_parts() -> dict[str, Any]:
    """Seconds of the parts of a Ray session."""
    import ray

    figures: dict[str, float] = {}
    with stopwatch(figures, "start of Ray"), only_needed_processes():
        ray.init(include_dashboard=False, logging_level=40, log_to_driver=False)
    nothing = ray.remote(lambda: None)
    with stopwatch(figures, "first task"):
        ray.get(nothing.remote())
    with stopwatch(figures, "another task"):
        ray.get(nothing.remote())

    class Actor:
        def answer(self) -> None:
            """Answer once the actor is there."""

    with stopwatch(figures, "first answer of an actor"):
        actor: Any = ray.remote(Actor).remote()
        ray.get(actor.answer.remote())
    with stopwatch(figures, "end of Ray"):
        ray.shutdown()
    return {"figures": figures}


def main(arguments: list[str] | None = None) -> None:
    """Print the medians."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=3, help="how often each is measured (default 3)")
    repeats = options.parse_args(arguments).repeats
    found: dict[str, list[float]] = {}
    timed = "import time; _t = time.perf_counter(); {}; print(time.perf_counter() - _t)"
    for _ in range(repeats):
        for name, statement in _IMPORTS.items():
            output = run_measured([sys.executable, "-W", "ignore", "-c", timed.format(statement)]).output
            found.setdefault(f"import {name}", []).append(float(output.split()[-1]))
        for name, seconds in Side("Ray", ray_parts).run()[0].items():
            if name != "process_seconds":
                found.setdefault(name, []).append(seconds)
    medians = {name: round(statistics.median(values), 3) for name, values in found.items()}
    for name, seconds in medians.items():
        print(f"{name:45s} {seconds:8.3f} s")
    record("overhead", repeats=repeats, seconds=medians)


if __name__ == "__main__":
    main()
