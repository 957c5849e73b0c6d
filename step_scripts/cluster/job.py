"""A SageMaker job as its container sees it: hosts, files in the job's folder, time limits.

SageMaker writes `resourceconfig.json` on every host before it starts the container: in `input/config` below the root
of a training job, in `config` below the root of a processing job. It sorts the hosts as text (`algo-10` before
`algo-2`). Names may take a while to resolve.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field

from step_scripts.cluster.failure import ClusterError
from step_scripts.runner import storage
from step_scripts.runner.contract import StepRequest

ROOT_VARIABLE = "SAGEMAKER_BASE_DIR"
"""Names another root than /opt/ml. SageMaker's own toolkit reads it too; emulated hosts without namespaces need it."""
ADDRESSES_VARIABLE = "SAGEMAKER_EMULATOR_HOSTS"
"""`name=address,…` for hosts whose names do not resolve: emulated hosts without namespaces."""
LIMIT_PREFIX = "HOUSING_CLUSTER_"
_RENAMED_LIMITS = {"FAREWELL_SECONDS": "SHUTDOWN_ACK_TIMEOUT", "SILENT_SECONDS": "HEAD_UNRESPONSIVE_TIMEOUT"}
_REQUEST, _PIPES, _TOKEN = "request.json", "pipes.json", "ray_token"
_CONFIG = "resourceconfig.json"


@dataclass(frozen=True)
class JobHosts:
    """The hosts of the job. `names` are in natural order; `head` is the same on every host."""

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
    Raises `ClusterError` if there is no description, or it lacks this host, the group, or any host in the group.
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
            raise ClusterError(f"{path} is not as SageMaker writes it: {type(error).__name__}: {error}") from error
    raise ClusterError(
        f"this is not a host of a SageMaker job: there is neither {places[0][1]} nor {places[1][1]}. "
        f"{ROOT_VARIABLE} names another root than /opt/ml"
    )


def _hosts(
    kind: Literal["training", "processing"], root: Path, config: dict[str, Any], head_group: str | None
) -> JobHosts:
    current = str(config["current_host"])
    names = tuple(sorted({str(name) for name in config["hosts"]}, key=natural_order))
    if current not in names:
        raise ClusterError(f"the current host {current} is not among the hosts {', '.join(names)}")
    groups = {str(g["instance_group_name"]): [str(h) for h in g["hosts"]] for g in config.get("instance_groups") or []}
    candidates: Sequence[str] = names
    if head_group is not None and head_group not in groups:
        raise ClusterError(f"there is no instance group {head_group}; there are {sorted(groups) or 'none'}")
    if groups:
        group = head_group or min(groups, key=natural_order)
        candidates = [name for name in groups[group] if name in names]
        if not candidates:
            raise ClusterError(f"the instance group {group} has none of the hosts {', '.join(names)}")
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

    That is what its name resolves to. If the name does not resolve, or resolves to a loopback address, it is the
    address of the job's network interface. A single host may use `127.0.0.1`. None: not known yet.
    """
    address = lookup(hosts.current)
    if address is not None and (not address.startswith("127.") or ADDRESSES_VARIABLE in os.environ):
        return address
    interfaces = psutil.net_if_addrs()
    for found in interfaces.get(hosts.interface or "", []):
        if found.family == socket.AF_INET and not found.address.startswith("127."):
            return found.address
    return "127.0.0.1" if len(hosts.names) == 1 else None


@dataclass(frozen=True)
class JobFiles:
    """The files that the job's starter has put into the folder at `uri`. Arrow retries storage errors for a minute."""

    uri: str

    def request(self) -> StepRequest:
        """What to run. Raises `FileNotFoundError`."""
        return StepRequest.model_validate_json(storage.read_bytes(storage.join(self.uri, _REQUEST)))

    def pipes(self) -> dict[str, str] | None:
        """How to reach Dagster; None: not at all."""
        content = self._optional(_PIPES)
        return None if content is None else json.loads(content)

    def token(self) -> str | None:
        """The secret that the hosts share."""
        content = self._optional(_TOKEN)
        return None if content is None else content.decode().strip()

    def _optional(self, name: str) -> bytes | None:
        try:
            return storage.read_bytes(storage.join(self.uri, name))
        except FileNotFoundError:
            return None


class ClusterLimits(BaseModel):
    """How long hosts wait for what, in seconds. Each field is read from a variable `HOUSING_CLUSTER_<FIELD>`.

    After SIGTERM the platform waits for 120 seconds. `checkpoint_seconds`, `shutdown_ack_timeout` and twice
    `stop_seconds` should leave about 30 of them for the removal of the attempt's files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    names_seconds: float = Field(default=300.0, gt=0, description="Until the names of this host and the head resolve.")
    start_seconds: float = Field(default=180.0, gt=0, description="From Ray's start on the head until it answers.")
    join_seconds: float = Field(
        default=600.0,
        gt=0,
        description="For the other hosts to join: from when the head answers, and for each from its own start.",
    )
    head_unresponsive_timeout: float = Field(
        default=120.0, gt=0, description="Until a head that accepts connections and does not answer counts as lost."
    )
    unreachable_seconds: float = Field(
        default=60.0, gt=0, description="Until a head that accepts no connections counts as lost."
    )
    lost_host_seconds: float = Field(
        default=1800.0, gt=0, description="How long the step may go on after a host was lost."
    )
    checkpoint_seconds: float = Field(default=45.0, ge=0, description="For the step to save its work after SIGTERM.")
    shutdown_ack_timeout: float = Field(
        default=15.0, ge=0, description="How long the head waits for the workers to acknowledge the end."
    )
    stop_seconds: float = Field(default=10.0, gt=0, description="From SIGTERM to SIGKILL for Ray's own processes.")
    poll_seconds: float = Field(default=2.0, gt=0, description="The longest pause between two polls of anything.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> ClusterLimits:
        """The limits that the environment sets, defaults for the others.

        Raises pydantic's `ValidationError` for a value that is no positive number, `ValueError` for a former name.
        """
        for former, name in _RENAMED_LIMITS.items():
            if LIMIT_PREFIX + former in environment:
                raise ValueError(f"{LIMIT_PREFIX}{former} is now {LIMIT_PREFIX}{name}: rename it")
        names = {name: LIMIT_PREFIX + name.upper() for name in cls.model_fields}
        return cls.model_validate({name: environment[v] for name, v in names.items() if v in environment})


class Deadline:
    """A point in time on the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return time.monotonic() >= self._end

    @property
    def left(self) -> float:
        """Seconds left; 0 if it is over."""
        return max(0.0, self._end - time.monotonic())


def pauses(longest: float, shortest: float = 0.1, growth: float = 1.5) -> Iterator[float]:
    """Growing pauses between attempts, in seconds, up to `longest`, without end."""
    pause = min(shortest, longest)
    while True:
        yield pause
        pause = min(pause * growth, longest)
