"""What the benchmarks share: running a command with its whole process tree watched, and recording results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results.jsonl"


@dataclass(frozen=True)
class Measured:
    """Wall-clock seconds, peak memory of the process tree (bytes), exit status, and the combined output."""

    seconds: float
    peak_bytes: int
    status: int
    output: str


def run_measured(command: list[str], environment: dict[str, str] | None = None) -> Measured:
    """Run `command` and watch it and all its descendants.

    Memory is the sum of the proportional set sizes, sampled every 0.25 s: shared pages (Ray's object store) count once.
    """
    env = os.environ | (environment or {})
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.25):
            peak = max(peak, tree_bytes(process.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output = process.communicate()[0]
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return Measured(seconds, peak, process.returncode, output)


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
