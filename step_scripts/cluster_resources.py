"""What the Ray cluster has, and how to divide it among workers."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray._private.worker

from step_scripts.job_hosts import is_open


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[str]:
    """A folder for the block, inside the folder of the Ray session, with which it goes if the process is killed."""
    node = ray._private.worker._global_node
    parent = node.get_session_dir_path() if node is not None else None
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as folder:
        yield folder


def node_cpus() -> list[int]:
    """CPUs of each node that is alive and has any, most first."""
    counts = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return sorted((c for c in counts if c > 0), reverse=True) or [1]


def cpus_per_worker(num_workers: int, nodes: list[int]) -> int:
    """The most CPUs that each of `num_workers` can have at once, on nodes with so many CPUs; 0 if they do not fit."""
    for cpus in range(nodes[0], 0, -1):
        if sum(node // cpus for node in nodes) >= num_workers:
            return cpus
    return 0


def await_lost_nodes(seconds: float) -> None:
    """Wait until Ray knows of every node that cannot be reached any more that it is gone, for at most `seconds`.

    Ray takes its time to be sure; until then it would wait for workers on such a node.
    """
    deadline = time.monotonic() + seconds
    suspects = {n["NodeID"] for n in ray.nodes() if n["Alive"] and not _answers(n)}
    while suspects and time.monotonic() < deadline:
        time.sleep(0.5)
        suspects &= {n["NodeID"] for n in ray.nodes() if n["Alive"] and not _answers(n)}


def _answers(node: dict[str, Any]) -> bool:
    return is_open(node["NodeManagerAddress"], node["NodeManagerPort"], 2.0)
