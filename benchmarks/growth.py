"""How do time and memory grow with the number of rows?

`python -m benchmarks.growth [--what ingestion|graph] [--rows 100000 1000000 ...] [--plot growth.png]`. `ingestion`: CSV
to validated rows, feature store and splits, on a Ray session that is there. `graph`: all of a first run, as a command.
Prints seconds and peak memory of all processes for each size, and how both grew from the size before. `--plot` draws
the latest recorded figures of both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.ingestion import steps
from benchmarks.measuring import RESULTS, Side, record
from benchmarks.whole_graph import whole_run
from housing_assets.sample_data import write_sample

SIZES = {
    "ingestion": [100_000, 1_000_000, 10_000_000, 50_000_000],
    "graph": [10_000, 100_000, 1_000_000, 10_000_000],
}
_TITLES = {"ingestion": "CSV to feature store and splits", "graph": "Whole graph, first run"}


def measure(what: str, sizes: list[int], trials: int, rounds: int) -> list[dict[str, float]]:
    """Rows, seconds and peak megabytes of each size, after a small run that is not counted."""
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as folder:
        for number, rows in enumerate([min(sizes), *sorted(sizes)]):
            source = write_sample(Path(folder, f"sales-{number}.csv"), rows=rows)
            if what == "ingestion":
                side = Side(_TITLES[what], steps, {"source": str(source)})
            else:
                side = Side(_TITLES[what], whole_run, {"source": str(source), "trials": trials, "rounds": rounds})
            figures, _, peak = side.run()
            source.unlink()
            if number == 0:
                continue
            found.append({"rows": rows, "seconds": round(figures["seconds"], 2), "peak_megabytes": round(peak / 1e6)})
            print(_described(found), flush=True)
    return found


def _described(found: list[dict[str, float]]) -> str:
    latest = found[-1]
    line = f"{latest['rows']:>12,} rows {latest['seconds']:10,.1f} s {latest['peak_megabytes']:8,.0f} MB"
    if len(found) == 1:
        return line
    before = found[-2]
    times, time, memory = (latest[name] / before[name] for name in ("rows", "seconds", "peak_megabytes"))
    return f"{line}   {times:g} x the rows: {time:.2f} x the time, {memory:.2f} x the memory"


def recorded() -> dict[str, list[dict[str, float]]]:
    """The latest recorded sizes of each kind."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return {line["what"]: line["sizes"] for line in lines if line["benchmark"] == "growth"}


def plot(series: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Seconds and memory over rows, both axes logarithmic, with a dotted line of growth in proportion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.8), dpi=100, layout="constrained")
    axes: Any = figure.subplots(1, 2)
    for side, name, label in zip(axes, ("seconds", "peak_megabytes"), ("Seconds", "Peak memory, MB"), strict=True):
        for what, colour in (("ingestion", "#2b6cb0"), ("graph", "#c2560c")):
            if what not in series:
                continue
            rows, values = ([s[key] for s in series[what]] for key in ("rows", name))
            side.plot(rows, values, marker="o", color=colour, label=_TITLES[what])
            if name == "seconds":
                side.plot(rows, [values[-1] * r / rows[-1] for r in rows], ":", color=colour, linewidth=1)
        side.set_xscale("log")
        side.set_yscale("log")
        side.set_xlabel("Rows")
        side.set_ylabel(label)
        side.grid(visible=True, which="major", alpha=0.3)
    axes[0].legend(title="dotted: in proportion to the rows", fontsize=8, title_fontsize=8)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Measure, record, draw."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--what", choices=list(SIZES), help="one of both only (default: both)")
    options.add_argument("--rows", type=int, nargs="+", help=f"sizes (default {SIZES})")
    options.add_argument("--trials", type=int, default=8, help="trials of the whole graph's search (default 8)")
    options.add_argument(
        "--rounds",
        type=int,
        default=100,
        help="most rounds of a trial: with early stopping alone, more rows allow more rounds (default 100)",
    )
    options.add_argument("--plot", type=Path, help="PNG file to draw")
    options.add_argument("--draw-only", action="store_true", help="draw what was recorded, measure nothing")
    chosen = options.parse_args(arguments)
    for what, sizes in SIZES.items():
        if chosen.what in (None, what) and not chosen.draw_only:
            print(_TITLES[what])
            work = {"trials": chosen.trials, "rounds": chosen.rounds}
            found = measure(what, chosen.rows or sizes, **work)
            record("growth", what=what, **(work if what == "graph" else {}), sizes=found)
    if chosen.plot:
        plot(recorded(), chosen.plot)


if __name__ == "__main__":
    main()
