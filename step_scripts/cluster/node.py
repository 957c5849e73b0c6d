"""A host's part in the cluster of its job: what head and workers share, and the worker's part."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from step_scripts.cluster.job import (
    FAILED,
    STOPPED,
    SUCCEEDED,
    ClusterError,
    ClusterLimits,
    Deadline,
    JobFiles,
    JobHosts,
    own_address,
    pauses,
    resolve,
    write_failure,
)
from step_scripts.cluster.status import (
    ClusterStatusClient,
    HeadUnavailable,
    HeadUnreachable,
    HeadUnresponsive,
    JobOutcome,
    TokenRefused,
)
from step_scripts.runner.processes import Children, StopSignal

_TAIL_LINES = 20
_NOISE = ("[state-dump]", "scripts.py:")  # what Ray prints after the lines that matter
_SHORT_PAUSE = 0.2
_STARTED = b"Ray runtime started"
_log = logging.getLogger(__name__)
Found = TypeVar("Found")


class Stopped(Exception):
    """SIGTERM has come."""


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

    def run(self) -> int:
        """Do the part; returns the exit status. Raises the error that keeps it from being done."""
        raise NotImplementedError

    def pause(self, seconds: float) -> None:
        """Wait; raises `Stopped` on SIGTERM."""
        self.stop.wait(seconds)
        self.children.reap()
        if self.stop.stop_requested:
            raise Stopped

    def poll(
        self, poll: Callable[[], Found | None], deadline: Deadline, often: Callable[[], bool] = lambda: False
    ) -> Found | None:
        """Poll until the result is not None; None if the deadline passes first. With short pauses while `often()`."""
        for pause in pauses(self.limits.poll_seconds):
            if (found := poll()) is not None:
                return found
            if deadline.passed:
                return None
            self.pause(min(_SHORT_PAUSE if often() else pause, deadline.left))
        raise AssertionError("unreachable")

    def find_address(self, name: str, lookup: Callable[[], str | None]) -> str:
        """The address of a host, once it is known. Raises `ClusterError`."""
        address = self.poll(lookup, Deadline(self.limits.names_seconds))
        if address is None:
            raise ClusterError(
                f"the name of host {name} did not resolve within {self.limits.names_seconds:g} s "
                "(HOUSING_CLUSTER_NAMES_SECONDS)"
            )
        return address

    def start_ray(self, address: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start Ray on this host. The process lives as long as Ray's own processes, and ends them when it ends."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
        command += ["--node-ip-address", address, "--node-name", self.hosts.current]
        # A folder in ours, because Ray opens it to all users.
        command += ["--temp-dir", str(self.folder / "r")]
        command += ["--disable-usage-stats", "--include-log-monitor=false"]
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

    def run(self) -> int:
        """Join, wait for the outcome, acknowledge it."""
        joining = Deadline(self.limits.join_seconds)
        try:
            head = self.find_address(self.hosts.head, lambda: resolve(self.hosts.head))
            address = self.find_address(self.hosts.current, lambda: own_address(self.hosts))
            self._status = ClusterStatusClient(head, self.port)
            joined = self._join(address, joining)
        except Stopped:
            return STOPPED
        outcome = joined if isinstance(joined, JobOutcome) else self._watch(joined)
        if outcome is None:
            return STOPPED
        self._acknowledge()
        if outcome.failure is None:
            return SUCCEEDED
        _log.error("the head reports: %s", outcome.failure["message"])
        if self.stop.stop_requested:
            return STOPPED
        write_failure(self.hosts.failure_file, outcome.failure)
        return FAILED

    def _join(self, address: str, deadline: Deadline) -> subprocess.Popen[bytes] | JobOutcome:
        """Start Ray here and join the head's cluster. Returns the outcome if the step ended first."""
        name = self.hosts.current
        node: subprocess.Popen[bytes] | None = None
        state = "nothing accepted connections at its address"

        def poll() -> subprocess.Popen[bytes] | JobOutcome | None:
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

        found = self.poll(poll, deadline, often=lambda: node is not None)
        if found is None:
            raise ClusterError(
                f"host {name} could not join the head {self.hosts.head} within {self.limits.join_seconds:g} s "
                f"(HOUSING_CLUSTER_JOIN_SECONDS): {state}"
            )
        if isinstance(found, subprocess.Popen):
            _log.info("joined as %s", address)
        return found

    def _watch(self, node: subprocess.Popen[bytes]) -> JobOutcome | None:
        """Wait for the outcome. None: SIGTERM came, and the head has gone or taken too long to end."""
        timeouts = {
            HeadUnreachable: self.limits.unreachable_seconds,
            HeadUnresponsive: self.limits.head_unresponsive_timeout,
        }
        lost_at: dict[type[HeadUnavailable], Deadline] = {}
        leave_at: Deadline | None = None
        for pause in pauses(self.limits.poll_seconds):
            if self.stop.stop_requested and leave_at is None:
                # The step may need this host while it saves its work.
                leave_at = Deadline(self.limits.checkpoint_seconds + self.limits.shutdown_ack_timeout)
            try:
                if (outcome := self._status.outcome()) is not None:
                    return outcome
                lost_at.clear()
            except HeadUnavailable as error:
                if leave_at is not None and isinstance(error, HeadUnreachable):
                    return None
                if type(error) not in lost_at:
                    lost_at[type(error)] = Deadline(timeouts[type(error)])
                    _log.warning("%s", error)
                if (lost := lost_at[type(error)]).passed:
                    reason = f"{error}, for {lost.seconds:g} s"
                    raise ClusterError(f"lost the head {self.hosts.head}: {reason}") from error
            if leave_at is not None and leave_at.passed:
                return None
            if node.poll() is not None and leave_at is None:
                if lost_at:
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
