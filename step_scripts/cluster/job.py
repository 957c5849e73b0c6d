"""A SageMaker job as its container sees it: hosts, files in the job's folder, time limits, the reason of a failure.

SageMaker writes `resourceconfig.json` on every host before it starts the container: in `input/config` below the root
of a training job, in `config` below the root of a processing job. It sorts the hosts as text (`algo-10` before
`algo-2`). Names may take a while to resolve.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import Field

from step_scripts.runner import execution, storage
from step_scripts.runner.contract import FrozenModel, StepRequest

SUCCEEDED, FAILED, STOPPED = 0, 1, 128 + signal.SIGTERM
"""Exit statuses."""
LONGEST_FAILURE = 960
"""Characters. SageMaker keeps 1024, and adds text of its own before and after."""
ADDRESSES_VARIABLE = "SAGEMAKER_EMULATOR_HOSTS"
"""`name=address,…` for hosts whose names do not resolve: emulated hosts without namespaces."""
_LIMIT_PREFIX = "HOUSING_CLUSTER_"
_RENAMED_LIMITS = {"FAREWELL_SECONDS": "SHUTDOWN_ACK_TIMEOUT", "SILENT_SECONDS": "HEAD_UNRESPONSIVE_TIMEOUT"}
_CONFIG = "resourceconfig.json"
_FAILURE_KEY = "step_error"


class ClusterError(Exception):
    """The cluster of the job's hosts could not be formed, or broke. The message says it all: no traceback is kept."""


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
    def failure_file(self) -> Path:
        """Where SageMaker looks for the reason of a failure."""
        return self.root / "output" / ("failure" if self.kind == "training" else "message")


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts `algo-2` before `algo-10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def ml_root(environment: Mapping[str, str] = os.environ) -> Path:
    """`/opt/ml`, or what `SAGEMAKER_BASE_DIR` names, which SageMaker's own toolkit reads too."""
    return Path(environment.get("SAGEMAKER_BASE_DIR") or "/opt/ml")


def read_hosts(root: Path, head_group: str | None = None) -> JobHosts:
    """The hosts described below `root`.

    The head is the first host of the instance group `head_group`; without it, of the first group in natural order.
    Raises `ClusterError` if there is no description, or it lacks this host, the group, or any host in the group.
    """
    training, processing = root / "input" / "config" / _CONFIG, root / "config" / _CONFIG
    if not (training.exists() or processing.exists()):
        raise ClusterError(
            f"this is not a host of a SageMaker job: there is neither {training} nor {processing}. "
            "SAGEMAKER_BASE_DIR names another root than /opt/ml"
        )
    kind, path = ("training", training) if training.exists() else ("processing", processing)
    try:
        config = json.loads(path.read_text())
        current, interface = str(config["current_host"]), config.get("network_interface_name")
        names = tuple(sorted({str(name) for name in config["hosts"]}, key=natural_order))
        groups = {str(g["instance_group_name"]): set(map(str, g["hosts"])) for g in config.get("instance_groups") or []}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ClusterError(f"{path} is not as SageMaker writes it: {type(error).__name__}: {error}") from error
    if current not in names:
        raise ClusterError(f"the current host {current} is not among the hosts {', '.join(names)}")
    if head_group is not None and head_group not in groups:
        raise ClusterError(f"there is no instance group {head_group}; there are {sorted(groups) or 'none'}")
    group = head_group or min(groups, key=natural_order, default=None)
    candidates = [name for name in names if group is None or name in groups[group]]
    if not candidates:
        raise ClusterError(f"the instance group {group} has none of the hosts {', '.join(names)}")
    return JobHosts(kind, root, current, names, candidates[0], interface)


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
        return StepRequest.model_validate_json(storage.read_bytes(storage.join(self.uri, "request.json")))

    def pipes(self) -> dict[str, str] | None:
        """How to reach Dagster; None: not at all."""
        content = self._optional("pipes.json")
        return None if content is None else json.loads(content)

    def token(self) -> str | None:
        """The secret that the hosts share."""
        content = self._optional("ray_token")
        return None if content is None else content.decode().strip()

    def _optional(self, name: str) -> bytes | None:
        try:
            return storage.read_bytes(storage.join(self.uri, name))
        except FileNotFoundError:
            return None


class ClusterLimits(FrozenModel):
    """How long hosts wait for what, in seconds. Each field is read from a variable `HOUSING_CLUSTER_<FIELD>`.

    After SIGTERM the platform waits for 120 seconds. `checkpoint_seconds`, `shutdown_ack_timeout` and twice
    `stop_seconds` should leave about 30 of them for the removal of the attempt's files.
    """

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
            if _LIMIT_PREFIX + former in environment:
                raise ValueError(f"{_LIMIT_PREFIX}{former} is now {_LIMIT_PREFIX}{name}: rename it")
        names = {name: _LIMIT_PREFIX + name.upper() for name in cls.model_fields}
        return cls.model_validate({name: environment[v] for name, v in names.items() if v in environment})


def pauses(longest: float, shortest: float = 0.1, growth: float = 1.5) -> Iterator[float]:
    """Growing pauses between attempts, in seconds, up to `longest`, without end."""
    pause = min(shortest, longest)
    while True:
        yield pause
        pause = min(pause * growth, longest)


def failure_of(error: BaseException) -> dict[str, Any]:
    """An exception as plain data."""
    return {"kind": "crash", "message": str(error)} if isinstance(error, ClusterError) else execution.failure_of(error)


def failure_text(failure: dict[str, Any]) -> str:
    """The failure in at most `LONGEST_FAILURE` characters, reason first.

    An input error is JSON, `{"step_error": {…}}`, without the details if they do not fit. Any other failure is the
    message, followed by the end of the traceback if there is one.
    """
    message = str(failure["message"])
    if failure["kind"] != "input":
        message = message[:LONGEST_FAILURE]
        trace = str(failure.get("traceback") or "").strip()
        room = LONGEST_FAILURE - len(message) - 1
        return f"{message}\n{trace[-room:]}" if trace and room > 80 else message
    content = {"kind": "input", "message": message}
    details = failure.get("details")
    if details and len(text := _failure_json({**content, "details": details})) <= LONGEST_FAILURE:
        return text
    while len(text := _failure_json(content)) > LONGEST_FAILURE:  # escaping lengthens characters, hence a loop
        message = message[: len(message) - max(1, (len(text) - LONGEST_FAILURE) // 6) - 1]
        content["message"] = message + "…"
    return text


def _failure_json(content: dict[str, Any]) -> str:
    return json.dumps({_FAILURE_KEY: content}, ensure_ascii=False, default=str)


def failure_from(text: str) -> dict[str, Any] | None:
    """The input error in a text such as a job's FailureReason; None if the text holds none."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        start = text.index(f'{{"{_FAILURE_KEY}"')
        found = json.JSONDecoder().raw_decode(text, start)[0][_FAILURE_KEY]
        return {"kind": found["kind"], "message": found["message"], "details": found.get("details") or {}}
    return None


def write_failure(path: Path, failure: dict[str, Any]) -> None:
    """Write the file that SageMaker reads after the job."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(failure_text(failure), encoding="utf-8")
