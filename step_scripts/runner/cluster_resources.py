"""The CPUs of the Ray cluster: which are free, and how to divide them among workers."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray._private.state  # the public API has the free CPUs of all nodes together only
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from step_scripts.runner.contract import Reporter, StepError
from step_scripts.runner.processes import repeated
from step_scripts.runner.ray_environment import is_open
from step_scripts.runner.ray_session import private_folder_of_session
from step_scripts.runner.wording import counted

WAIT_VARIABLE = "HOUSING_RESOURCE_WAIT_SECONDS"
_DEFAULT_WAIT_SECONDS = 1800.0
_SETTLE_SECONDS = 5.0  # the CPUs of actors that have just ended become free a little later
_MESSAGE_SECONDS = 15.0


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[str]:
    """A folder for the block. It lies in the folder of a private session, which is removed if the process is killed."""
    parent = private_folder_of_session()
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as folder:
        yield folder


def node_cpus() -> list[int]:
    """CPUs of each node that is alive and has any, most first."""
    counts = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return sorted((c for c in counts if c > 0), reverse=True) or [1]


def wait_seconds() -> float:
    """How long to wait for resources that others use, `HOUSING_RESOURCE_WAIT_SECONDS`."""
    return float(os.environ.get(WAIT_VARIABLE) or _DEFAULT_WAIT_SECONDS)


def free_cpus(what: str, needed: int, log: Reporter) -> list[int]:
    """Free CPUs of each node, most first, as soon as `needed` of them are free for `what`.

    In a private session these are all: what is in use is ours and about to end. Raises `StepError` if too few are free
    within `wait_seconds`.
    """
    if private_folder_of_session() is not None:
        return node_cpus()
    start = time.monotonic()
    limit, next_message = wait_seconds(), 0.0
    while True:
        waited = time.monotonic() - start
        total, free = sum(node_cpus()), _unused()
        if sum(free) >= needed and (sum(free) >= total or waited >= _SETTLE_SECONDS):
            return free
        state = f"{what} needs {counted(needed, 'CPU')} of the Ray cluster, {sum(free)} of {total}"
        if waited >= max(limit, _SETTLE_SECONDS):
            raise StepError(
                f"{state} were free within {limit:g} s: end what uses them, or wait longer by {WAIT_VARIABLE}"
            )
        if waited >= next_message and sum(free) < needed:
            next_message = waited + _MESSAGE_SECONDS
            log.info(f"{state} are free; waiting for {waited:.0f} of at most {limit:g} s")
        time.sleep(0.2)


@contextlib.contextmanager
def reserved(what: str, cpus: int) -> Iterator[dict[str, Any]]:
    """Options for a task that gets that many CPUs of one node. They are reserved when the block begins.

    Raises `StepError` if they are not free within `wait_seconds`. In a private session no one else could use them.
    """
    if private_folder_of_session() is not None:
        yield {"num_cpus": cpus}
        return
    group = placement_group([{"CPU": cpus}])
    try:
        if not group.wait(wait_seconds()):
            raise no_room(what)
        yield {"num_cpus": cpus, "scheduling_strategy": PlacementGroupSchedulingStrategy(group)}
    finally:
        remove_placement_group(group)


def no_room(what: str) -> StepError:
    """The error for work that has waited for CPUs as long as it may."""
    return StepError(
        f"the Ray cluster had no room for {what} within {wait_seconds():g} s: end what uses it, or wait longer by "
        f"{WAIT_VARIABLE}"
    )


@contextlib.contextmanager
def waiting_is_told(what: str, log: Reporter) -> Iterator[None]:
    """Log now and then, during the block, that a placement group created in it waits for CPUs."""
    known = set(placement_group_table())

    def look() -> None:
        asked = [group for name, group in placement_group_table().items() if name not in known]
        if any(group["state"] == "PENDING" for group in asked):
            log.info(f"{what} waits for CPUs of the Ray cluster: {sum(_unused())} of {sum(node_cpus())} are free")

    with repeated(look, _MESSAGE_SECONDS, "tell-waiting"):
        yield


def _unused() -> list[int]:
    nodes = ray._private.state.available_resources_per_node()
    return sorted((int(resources.get("CPU", 0)) for resources in nodes.values()), reverse=True) or [0]


def cpus_per_worker(num_workers: int, nodes: list[int]) -> int:
    """The most CPUs that each of `num_workers` can have at once, on nodes with so many CPUs; 0 if they do not fit."""
    for cpus in range(nodes[0], 0, -1):
        if sum(node // cpus for node in nodes) >= num_workers:
            return cpus
    return 0


def await_lost_nodes(seconds: float) -> None:
    """Wait, for at most `seconds`, until Ray has marked every unreachable node as dead.

    Until then Ray would wait for workers on such a node.
    """
    deadline = time.monotonic() + seconds
    suspects = _silent_nodes()
    while suspects and time.monotonic() < deadline:
        time.sleep(0.5)
        suspects &= _silent_nodes()


def _silent_nodes() -> set[str]:
    alive = (node for node in ray.nodes() if node["Alive"])
    return {n["NodeID"] for n in alive if not is_open(n["NodeManagerAddress"], n["NodeManagerPort"], 2.0)}
