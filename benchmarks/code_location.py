"""Does the code location load in about the time of `import dagster`?

`python -m benchmarks.code_location [--pairs 9]`. From the start of the process until the import is done; its end is not
counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from benchmarks.measuring import record, run_measured


def main(arguments: list[str] | None = None) -> None:
    """Measure both imports in turn and print the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="pairs to measure after one warm-up (default 9)")
    options = parser.parse_args(arguments)
    ratios, ours, theirs = [], [], []
    for pair in range(options.pairs + 1):
        load, other = seconds_of("housing_assets.definitions"), seconds_of("dagster")
        if pair:
            ours.append(load)
            theirs.append(other)
            ratios.append(load / other)
    ratio = statistics.median(ratios)
    print(f"import housing_assets.definitions {statistics.median(ours):.3f} s")
    print(f"import dagster {statistics.median(theirs):.3f} s")
    print(f"ratio: median {ratio:.3f}, {min(ratios):.3f} to {max(ratios):.3f} over {options.pairs} pairs")
    record("code_location", ratio=round(ratio, 3), lowest=round(min(ratios), 3), highest=round(max(ratios), 3))


def seconds_of(module: str) -> float:
    """From the start of a process until it has imported `module`."""
    return run_measured([sys.executable, "-c", f"import os, {module}; os._exit(0)"]).seconds


if __name__ == "__main__":
    main()
