"""What the benchmarks share: running a command with its whole process tree watched, comparing, recording results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.side import MARK

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results.jsonl"
# Both sides alike where other programs use the cores too: Ray's workers do not give way to everybody else.
_ALIKE = {"RAY_worker_niceness": "0", "PYTHONWARNINGS": "ignore"}
_MEMORY_SECONDS = 0.25  # between two samples
_MEMORY_SHARE = 0.03  # of the time


@dataclass(frozen=True)
class Measured:
    """Wall-clock seconds, peak memory of the process tree (bytes), exit status, and the combined output."""

    seconds: float
    peak_bytes: int
    status: int
    output: str


def run_measured(command: list[str], environment: dict[str, str] | None = None, folder: Path = ROOT) -> Measured:
    """Run `command` in `folder` and watch it and all its descendants.

    Memory is the sum of the proportional set sizes, so that shared pages (Ray's object store) count once. To add them
    up stops the processes for a moment: it takes no more than 3 % of the time, at most every 0.25 s.
    """
    env = os.environ | (environment or {})
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        pause = _MEMORY_SECONDS
        while not done.wait(pause):
            before = time.perf_counter()
            peak = max(peak, tree_bytes(process.pid))
            pause = max(_MEMORY_SECONDS, (time.perf_counter() - before) / _MEMORY_SHARE)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output = process.communicate()[0]
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return Measured(seconds, peak, process.returncode, output)


@dataclass(frozen=True)
class Side:
    """One way to do the work: a function of a module, which a process of its own calls with `arguments`.

    The function returns `{"figures": {name: number}, "result": {name: value}}`. The figure `process_seconds`, from the
    start of the process to its end, is added here, unless the function measured a process that it started itself.
    `root`: the working tree whose code runs.
    """

    label: str
    function: Callable[..., dict[str, Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    root: Path = ROOT

    def run(self) -> tuple[dict[str, float], dict[str, Any], int]:
        """Figures, result, and peak memory of the process tree (bytes). Exits with the output if the process fails."""
        module = self.function.__module__
        if module == "__main__":
            module = sys.modules["__main__"].__spec__.name  # pyright: ignore[reportOptionalMemberAccess]
        call = [f"{module}:{self.function.__qualname__}", json.dumps(dict(self.arguments))]
        done = run_measured([sys.executable, "-m", "benchmarks.side", *call], _ALIKE, self.root)
        line = next((line for line in reversed(done.output.splitlines()) if line.startswith(MARK)), None)
        if done.status or line is None:
            sys.exit(f"{self.label} failed with status {done.status}:\n{done.output}")
        returned = json.loads(line.removeprefix(MARK))
        figures = {"process_seconds": done.seconds, **returned.get("figures", {})}
        return figures, returned.get("result", {}), done.peak_bytes


def compare(
    benchmark: str,
    ours: Side,
    other: Side,
    *,
    pairs: int,
    warm_ups: int = 1,
    agree: Mapping[str, float] | None = None,
    other_first: bool = False,
    **facts: Any,
) -> dict[str, Any]:
    """Run both sides in turn, print the median of each figure and of its ratio (ours to other), and record them.

    `agree`: entries of the results that must be equal within a relative tolerance; others are a failure of the
    benchmark. The first `warm_ups` pairs fill caches and are not counted. Ratios are those of pairs. `other_first`:
    ours needs what the other leaves.
    """
    rows: dict[str, tuple[list[float], list[float]]] = {}
    peaks: tuple[list[int], list[int]] = ([], [])
    result: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for pair in range(warm_ups + pairs):
        done = {side.label: side.run() for side in ((other, ours) if other_first else (ours, other))}
        (mine, my_result, my_peak), (theirs, their_result, their_peak) = done[ours.label], done[other.label]
        check_agreement(my_result, their_result, agree or {})
        result = my_result, their_result
        if pair < warm_ups:
            continue
        peaks[0].append(my_peak)
        peaks[1].append(their_peak)
        for name in mine.keys() & theirs.keys():
            pair_of = rows.setdefault(name, ([], []))
            pair_of[0].append(mine[name])
            pair_of[1].append(theirs[name])
    facts = {k: v for k, v in facts.items() if v is not None}
    print(f"{benchmark} {facts}\n  ours:  {ours.label} {result[0]}\n  other: {other.label} {result[1]}")
    recorded: dict[str, Any] = {}
    for name, (mine_all, theirs_all) in sorted(rows.items()):
        ratios = [m / t for m, t in zip(mine_all, theirs_all, strict=True)]
        recorded[name] = {
            "ours": _rounded(statistics.median(mine_all)),
            "other": _rounded(statistics.median(theirs_all)),
            "ratio": _rounded(statistics.median(ratios)),
            "lowest": _rounded(min(ratios)),
            "highest": _rounded(max(ratios)),
        }
        print(f"  {name:24s}" + "".join(f" {k} {v:<10g}" for k, v in recorded[name].items()))
    megabytes = {side: round(max(peak) / 1e6) for side, peak in zip(("ours", "other"), peaks, strict=True)}
    print(f"  peak memory: ours {megabytes['ours']:,} MB, other {megabytes['other']:,} MB; {pairs} pairs", flush=True)
    record(
        benchmark,
        **facts,
        sides={"ours": ours.label, "other": other.label},
        pairs=pairs,
        **recorded,
        peak_megabytes=megabytes,
    )
    return recorded


def check_agreement(ours: Mapping[str, Any], other: Mapping[str, Any], agree: Mapping[str, float]) -> None:
    """Exit if an entry differs by more than its relative tolerance: then both sides did not do the same work."""
    for name, tolerance in agree.items():
        if abs(ours[name] - other[name]) > tolerance * abs(other[name]):
            sys.exit(f"the results differ: {name} is {ours[name]} here and {other[name]} there")


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def parser(description: str | None, rows: int | None = None, pairs: int = 5) -> argparse.ArgumentParser:
    """The options that all comparisons have: `--pairs`, `--warm-ups` and, with a default, `--rows`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--pairs", type=int, default=pairs, help="pairs to measure (default %(default)s)")
    made.add_argument("--warm-ups", type=int, default=1, help="pairs before those (default %(default)s)")
    if rows is not None:
        made.add_argument("--rows", type=int, default=rows, help="rows to generate (default %(default)s)")
    return made


@contextmanager
def stopwatch(figures: dict[str, float], name: str = "seconds") -> Iterator[None]:
    """Put the duration of the block into `figures`."""
    start = time.perf_counter()
    yield
    figures[name] = time.perf_counter() - start


def tree_bytes(pid: int) -> int:
    """Memory of process `pid` and its descendants, in bytes: proportional set size where the system tells it."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for member in family:
        try:
            memory = member.memory_full_info()
        except psutil.Error:
            continue
        total += getattr(memory, "pss", 0) or memory.rss
    return total


def record(benchmark: str, **figures: Any) -> None:
    """Append `figures` to the results, with machine and versions."""
    line = {
        "benchmark": benchmark,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("dagster", "ray", "xgboost", "polars")},
        **figures,
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
