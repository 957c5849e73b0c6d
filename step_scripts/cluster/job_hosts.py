"""The hosts of a SageMaker job, as its container sees them: names, groups, the head, addresses.

SageMaker writes `resourceconfig.json` on every host before it starts the container, in `input/config` below the root
of a training job and in `config` below that of a processing job. It lists the hosts as text (`algo-10` before
`algo-2`). Names may take a while to resolve.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

ROOT_VARIABLE = "SAGEMAKER_BASE_DIR"
"""Names another root than /opt/ml. SageMaker's own toolkit knows it too; hosts without namespaces need it."""
ADDRESSES_VARIABLE = "SAGEMAKER_EMULATOR_HOSTS"
"""`name=address,…` where hosts have addresses without names: hosts that are emulated without namespaces."""

_CONFIG = "resourceconfig.json"


class HostsError(Exception):
    """The description of the job's hosts is missing or contradicts itself."""


@dataclass(frozen=True)
class JobHosts:
    """Who is there. `names` are in natural order; `head` is the same on every host."""

    kind: Literal["training", "processing"]
    root: Path
    current: str
    names: tuple[str, ...]
    head: str
    interface: str | None = None

    @property
    def is_head(self) -> bool:
        """Whether this host is the head."""
        return self.current == self.head

    @property
    def workers(self) -> tuple[str, ...]:
        """All hosts but the head."""
        return tuple(name for name in self.names if name != self.head)

    @property
    def failure_file(self) -> Path:
        """Where SageMaker looks for the reason of a failure."""
        return self.root / "output" / ("failure" if self.kind == "training" else "message")


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts `algo-2` before `algo-10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def ml_root(environment: Mapping[str, str] = os.environ) -> Path:
    """`/opt/ml`, or what `SAGEMAKER_BASE_DIR` names."""
    return Path(environment.get(ROOT_VARIABLE) or "/opt/ml")


def read_hosts(root: Path, head_group: str | None = None) -> JobHosts:
    """The hosts described below `root`.

    The head is the first host of the instance group `head_group`; without it, of the first group in natural order.
    Raises `HostsError` if there is no description, or it lacks this host, the group, or any host in the group.
    """
    places: tuple[tuple[Literal["training", "processing"], Path], ...] = (
        ("training", root / "input" / "config" / _CONFIG),
        ("processing", root / "config" / _CONFIG),
    )
    for kind, path in places:
        try:
            text = path.read_text()
        except FileNotFoundError:
            continue
        try:
            return _hosts(kind, root, json.loads(text), head_group)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HostsError(f"{path} is not as SageMaker writes it: {type(error).__name__}: {error}") from error
    raise HostsError(
        f"this is not a host of a SageMaker job: there is neither {places[0][1]} nor {places[1][1]}. "
        f"{ROOT_VARIABLE} names another root than /opt/ml"
    )


def _hosts(
    kind: Literal["training", "processing"], root: Path, config: dict[str, Any], head_group: str | None
) -> JobHosts:
    current = str(config["current_host"])
    names = tuple(sorted({str(name) for name in config["hosts"]}, key=natural_order))
    if current not in names:
        raise HostsError(f"the current host {current} is not among the hosts {', '.join(names)}")
    groups = {str(g["instance_group_name"]): [str(h) for h in g["hosts"]] for g in config.get("instance_groups") or []}
    candidates: Sequence[str] = names
    if head_group is not None and head_group not in groups:
        raise HostsError(f"there is no instance group {head_group}; there are {sorted(groups) or 'none'}")
    if groups:
        group = head_group or min(groups, key=natural_order)
        candidates = [name for name in groups[group] if name in names]
        if not candidates:
            raise HostsError(f"the instance group {group} has none of the hosts {', '.join(names)}")
    head = min(candidates, key=natural_order)
    return JobHosts(kind, root, current, names, head, config.get("network_interface_name"))


def resolve(name: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The IPv4 address of a host, or None if its name does not resolve (yet)."""
    given = dict(pair.split("=", 1) for pair in environment.get(ADDRESSES_VARIABLE, "").split(",") if "=" in pair)
    if name in given:
        return given[name]
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def own_address(hosts: JobHosts, lookup: Callable[[str], str | None] = resolve) -> str | None:
    """The address under which the other hosts reach this one.

    That is what its name resolves to. Where that is nothing, or a loopback address, which means nothing to others, it
    is the address of the job's network interface. A host alone is content with `127.0.0.1`. None: not known yet.
    """
    address = lookup(hosts.current)
    if address is not None and (not address.startswith("127.") or ADDRESSES_VARIABLE in os.environ):
        return address
    interfaces = psutil.net_if_addrs()
    for found in interfaces.get(hosts.interface or "", []):
        if found.family == socket.AF_INET and not found.address.startswith("127."):
            return found.address
    return "127.0.0.1" if len(hosts.names) == 1 else None
