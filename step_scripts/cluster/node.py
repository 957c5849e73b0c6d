"""A host's part in the cluster of its job: what head and workers share and tell each other, and the worker's part."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from step_scripts.cluster.job import (
    ClusterError,
    ClusterLimits,
    JobFiles,
    JobHosts,
    own_address,
    pauses,
    resolve,
)
from step_scripts.runner.processes import Children, StopSignal
from step_scripts.runner.ray_environment import environment_set, is_open

# To connect to a head that accepts connections and says nothing, Ray takes 40 seconds: 5, 5 and 30. It reads these
# limits when it is imported; its processes and the driver keep Ray's own.
with environment_set({"RAY_gcs_rpc_server_connect_timeout_s": "1", "RAY_py_gcs_connect_timeout_s": "2"}):
    # Ray's public API reaches the control store only from a driver, which Ray kills when the head is lost; a host has
    # to live on to report that loss.
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  # a compiled module
    from ray.exceptions import AuthenticationError, RayError

_TAIL_LINES = 20
_NOISE = ("[state-dump]", "scripts.py:")  # what Ray prints after the lines that matter
_SHORT_PAUSE = 0.2
_ANSWER_SECONDS = 2.0
_STARTED = b"Ray runtime started"
_NAMESPACE = b"housing_cluster"
_OUTCOME = b"outcome"
_ACKNOWLEDGED = b"acknowledged/"
_ALIVE = 0  # GcsNodeInfo.ALIVE
_RAY_COMMAND = """
from ray.scripts.scripts import main
from step_scripts.runner.ray_environment import only_needed_processes
with only_needed_processes():
    main()
"""
_log = logging.getLogger(__name__)
Found = TypeVar("Found")


class Stopped(Exception):
    """SIGTERM has come."""


class HeadUnavailable(Exception):
    """The head cannot be asked at the moment: it accepts connections, and does not answer in time."""


class HeadUnreachable(HeadUnavailable):
    """Nothing accepts connections at the head's address."""


class TokenRefused(Exception):
    """The head does not know this host's token. Trying again does not help."""


class ClusterStatusClient:
    """The status of a job's cluster in Ray's control store (GCS) on the head: its members, and how the step ended.

    The head publishes the outcome there, `{"failure": …}` with None if the step succeeded; the workers read it and
    acknowledge it. A call takes about 4 seconds at most. Every method raises `HeadUnavailable` or `TokenRefused` if the
    head does not answer.
    """

    def __init__(self, address: str, port: int) -> None:
        self.address, self.port = address, port
        self._client: Any = None
        self.node_ports: dict[str, int] = {}

    def nodes(self) -> dict[str, str | None]:
        """Address of each host that has ever joined, by name; None for a host that is gone.

        Sets `node_ports` to the ports of Ray on the hosts that are alive.
        """
        found: dict[str, str | None] = {}
        for node in self._call("get_all_node_info").values():
            if node.state == _ALIVE:
                found[node.node_name] = node.node_manager_address
                self.node_ports[node.node_name] = node.node_manager_port
            else:
                found.setdefault(node.node_name, None)
        return found

    def publish(self, outcome: dict[str, Any]) -> None:
        """Tell all hosts how the step has ended."""
        value = json.dumps(outcome).encode()
        self._call("internal_kv_put", _OUTCOME, value, True, _NAMESPACE)

    def outcome(self) -> dict[str, Any] | None:
        """How the step ended; None while it runs."""
        value = self._call("internal_kv_get", _OUTCOME, _NAMESPACE)
        return None if value is None else json.loads(value)

    def acknowledge(self, host: str) -> None:
        """Tell the head that `host` has read the outcome."""
        self._call("internal_kv_put", _ACKNOWLEDGED + host.encode(), b"1", True, _NAMESPACE)

    def acknowledged(self) -> set[str]:
        """The hosts that have read the outcome."""
        keys = self._call("internal_kv_keys", _ACKNOWLEDGED, _NAMESPACE)
        return {key.removeprefix(_ACKNOWLEDGED).decode() for key in keys}

    def _call(self, method: str, *arguments: object) -> Any:
        # Ray's client waits long for a head that is gone, and finally ends the whole process.
        if not is_open(self.address, self.port, _ANSWER_SECONDS):
            self._client = None
            raise HeadUnreachable(f"nothing answers at {self.address}:{self.port}")
        try:
            if self._client is None:
                self._client = GcsClient(address=f"{self.address}:{self.port}")
            return getattr(self._client, method)(*arguments, timeout=_ANSWER_SECONDS)
        except AuthenticationError as error:
            raise TokenRefused(str(error)) from error
        except (RayError, TimeoutError, OSError) as error:
            self._client = None
            raise HeadUnavailable(f"{type(error).__name__}: {error}") from error


@dataclass
class Node:
    """A host's part. `folder` is private to this host."""

    hosts: JobHosts
    files: JobFiles
    limits: ClusterLimits
    stop: StopSignal
    children: Children
    folder: Path

    def __post_init__(self) -> None:
        self.port = int(os.environ.get("HOUSING_RAY_PORT", "6379"))
        self._ray_log = self.folder / "ray_start.log"

    def pause(self, seconds: float) -> None:
        """Wait; raises `Stopped` on SIGTERM."""
        self.stop.wait(seconds)
        self.children.reap()
        if self.stop.stop_requested:
            raise Stopped

    def poll(
        self, poll: Callable[[], Found | None], seconds: float, often: Callable[[], bool] = lambda: False
    ) -> Found | None:
        """Poll until the result is not None; None after so many seconds. With short pauses while `often()`."""
        deadline = time.monotonic() + seconds
        for pause in pauses(self.limits.poll_seconds):
            if (found := poll()) is not None:
                return found
            if (left := deadline - time.monotonic()) <= 0:
                return None
            self.pause(min(_SHORT_PAUSE if often() else pause, left))
        raise AssertionError("unreachable")

    def find_address(self, name: str, lookup: Callable[[], str | None]) -> str:
        """The address of a host, once it is known. Raises `ClusterError`."""
        address = self.poll(lookup, self.limits.names_seconds)
        if address is None:
            raise ClusterError(
                f"the name of host {name} did not resolve within {self.limits.names_seconds:g} s "
                "(HOUSING_CLUSTER_NAMES_SECONDS)"
            )
        return address

    def start_ray(self, address: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start Ray on this host. The process lives as long as Ray's own processes, and ends them when it ends."""
        command = [sys.executable, "-c", _RAY_COMMAND, "start", "--block", *arguments]
        command += ["--node-ip-address", address, "--node-name", self.hosts.current]
        command += ["--disable-usage-stats"]
        command += ["--temp-dir", str(self.folder / "r")]  # a folder in ours, because Ray opens it to all users
        if cpus := os.environ.get("HOUSING_NODE_CPUS"):
            command += ["--num-cpus", cpus]
        if size := os.environ.get("HOUSING_OBJECT_STORE_BYTES"):
            command += ["--object-store-memory", size]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # `ray_has_started` reads what it prints
        return self.children.start(command, environment, self._ray_log)

    def ray_has_started(self) -> bool:
        """Whether Ray on this host reports that it runs, which needs the head's control store."""
        return self._ray_log.exists() and _STARTED in self._ray_log.read_bytes()

    def ray_output(self) -> str:
        """The last two lines of Ray's output on this host; the last 20 lines go to the log."""
        lines = self._ray_log.read_text(errors="replace").splitlines() if self._ray_log.exists() else []
        useful = [line.strip() for line in lines if line.strip() and not any(word in line for word in _NOISE)]
        for line in useful[-_TAIL_LINES:]:
            _log.info("| %s", line)
        return " ".join(useful[-2:]) or "it printed nothing"


class Worker(Node):
    """Joins the head's cluster, and leaves when it has read how the step ended."""

    def run(self) -> dict[str, Any] | None:
        """Join, wait for the outcome, acknowledge it. Returns the step's failure; raises `ClusterError`, `Stopped`."""
        deadline = time.monotonic() + self.limits.join_seconds
        head = self.find_address(self.hosts.head, lambda: resolve(self.hosts.head))
        address = self.find_address(self.hosts.current, lambda: own_address(self.hosts))
        self._status = ClusterStatusClient(head, self.port)
        joined = self._join(address, deadline - time.monotonic())
        outcome = joined if isinstance(joined, dict) else self._watch(joined)
        self._acknowledge()
        if (failure := outcome["failure"]) is not None:
            _log.error("the head reports: %s", failure["message"])
            if self.stop.stop_requested:
                raise Stopped
        return failure

    def _join(self, address: str, seconds: float) -> subprocess.Popen[bytes] | dict[str, Any]:
        """Start Ray here and join the head's cluster. Returns the outcome if the step ended first."""
        name = self.hosts.current
        node: subprocess.Popen[bytes] | None = None
        state = "nothing accepted connections at its address"

        def poll() -> subprocess.Popen[bytes] | dict[str, Any] | None:
            nonlocal node, state
            try:
                if (outcome := self._status.outcome()) is not None:
                    return outcome
                joined = self._status.nodes().get(name) is not None
            except HeadUnavailable as error:
                state = str(error)
                # If Ray has started here, the head was there and is lost: `_watch` reports that.
                return node if node is not None and self.ray_has_started() else None
            except TokenRefused as error:
                raise ClusterError(f"the head {self.hosts.head} refuses the Ray token of host {name}") from error
            if node is not None and node.poll() is not None:
                state = f"Ray did not start there: {self.ray_output()}"
                _log.warning("trying again: %s", state)
                node = None
            if node is None:
                node = self.start_ray(address, "--address", f"{self._status.address}:{self.port}")
            return node if joined else None

        found = self.poll(poll, seconds, often=lambda: node is not None)
        if found is None:
            raise ClusterError(
                f"host {name} could not join the head {self.hosts.head} within {self.limits.join_seconds:g} s "
                f"(HOUSING_CLUSTER_JOIN_SECONDS): {state}"
            )
        if isinstance(found, subprocess.Popen):
            _log.info("joined as %s", address)
        return found

    def _watch(self, node: subprocess.Popen[bytes]) -> dict[str, Any]:
        """Wait for the outcome. Raises `Stopped` if SIGTERM came, and the head has gone or taken too long to end."""
        silent_since: dict[type[HeadUnavailable], float] = {}
        leave_at: float | None = None
        for pause in pauses(self.limits.poll_seconds):
            if self.stop.stop_requested and leave_at is None:
                # The step may need this host while it saves its work.
                leave_at = time.monotonic() + self.limits.checkpoint_seconds + self.limits.shutdown_ack_timeout
            try:
                if (outcome := self._status.outcome()) is not None:
                    return outcome
                silent_since.clear()
            except HeadUnavailable as error:
                unreachable, limits = isinstance(error, HeadUnreachable), self.limits
                if leave_at is not None and unreachable:
                    raise Stopped from error
                if type(error) not in silent_since:
                    silent_since[type(error)] = time.monotonic()
                    _log.warning("%s", error)
                seconds = limits.unreachable_seconds if unreachable else limits.head_unresponsive_timeout
                if time.monotonic() - silent_since[type(error)] >= seconds:
                    raise ClusterError(f"lost the head {self.hosts.head}: {error}, for {seconds:g} s") from error
            if leave_at is not None and time.monotonic() >= leave_at:
                raise Stopped
            if node.poll() is not None and leave_at is None:
                if silent_since:
                    where = f"{self._status.address}:{self.port}"
                    raise ClusterError(f"lost the head {self.hosts.head}: Ray on this host ended without it ({where})")
                raise ClusterError(f"Ray on host {self.hosts.current} ended: {self.ray_output()}")
            self.stop.wait(_SHORT_PAUSE if leave_at else pause)
            self.children.reap()
        raise AssertionError("unreachable")

    def _acknowledge(self) -> None:
        try:
            self._status.acknowledge(self.hosts.current)
        except HeadUnavailable as error:  # it has not waited
            _log.info("the head has gone already: %s", error)
