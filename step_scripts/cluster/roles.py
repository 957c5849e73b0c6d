"""What a host does in the cluster of its job: what head and workers share, and the workers' part."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from step_scripts.cluster.child_processes import ChildProcesses
from step_scripts.cluster.end import End, HeadLink, HeadSilent, HeadUnreachable, TokenRefused
from step_scripts.cluster.failure import ClusterError, write_failure
from step_scripts.cluster.job_files import JobFiles
from step_scripts.cluster.job_hosts import JobHosts, own_address, resolve
from step_scripts.cluster.limits import ClusterLimits, Deadline, pauses
from step_scripts.runner.interruption import Alarm

SUCCEEDED, FAILED, STOPPED = 0, 1, 143
_TAIL_LINES = 20
_NOISE = ("[state-dump]", "scripts.py:")  # what Ray prints behind what matters
_QUICK = 0.2
_RAY_LOG = "ray_start.log"
_STARTED = b"Ray runtime started"
_log = logging.getLogger(__name__)
Found = TypeVar("Found")


class Stopped(Exception):
    """SIGTERM has come."""


@dataclass
class HostTools:
    """What both roles work with. `folder` is this host's own."""

    hosts: JobHosts
    files: JobFiles
    limits: ClusterLimits
    alarm: Alarm
    children: ChildProcesses
    folder: Path


class Role(ABC):
    """A host's part."""

    def __init__(self, tools: HostTools) -> None:
        self.tools = tools
        self.hosts, self.limits = tools.hosts, tools.limits
        self.port = int(os.environ.get("HOUSING_RAY_PORT", "6379"))
        self.joining = Deadline(tools.limits.join_seconds)

    @abstractmethod
    def run(self) -> int:
        """Do the part; returns the exit status. Raises what keeps it from being done."""

    def pause(self, seconds: float) -> None:
        """Wait; raises `Stopped` on SIGTERM."""
        self.tools.alarm.wait(seconds)
        self.tools.children.reap()
        if self.tools.alarm.stop_requested:
            raise Stopped

    def until(
        self, look: Callable[[], Found | None], deadline: Deadline, hurry: Callable[[], bool] = lambda: False
    ) -> Found | None:
        """Look again and again until there is something; None if the deadline passes first. Often while `hurry()`."""
        for pause in pauses(self.limits.poll_seconds):
            if (found := look()) is not None:
                return found
            if deadline.passed:
                return None
            self.pause(min(_QUICK if hurry() else pause, deadline.left))
        raise AssertionError("unreachable")

    def find_address(self, name: str, lookup: Callable[[], str | None]) -> str:
        """The address of a host, once it is known. Raises `ClusterError`."""
        address = self.until(lookup, Deadline(self.limits.names_seconds))
        if address is None:
            raise ClusterError(
                f"the name of host {name} did not resolve within {self.limits.names_seconds:g} s "
                "(HOUSING_CLUSTER_NAMES_SECONDS)"
            )
        return address

    def start_ray(self, address: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start Ray on this host. The process lasts as long as Ray's own processes do, and takes them along."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
        command += ["--node-ip-address", address, "--node-name", self.hosts.current]
        # A folder in ours, because Ray opens it to all users.
        command += ["--disable-usage-stats", "--temp-dir", str(self.tools.folder / "r"), "--include-log-monitor=false"]
        if cpus := os.environ.get("HOUSING_NODE_CPUS"):
            command += ["--num-cpus", cpus]
        if size := os.environ.get("HOUSING_OBJECT_STORE_BYTES"):
            command += ["--object-store-memory", size]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # `ray_has_started` reads what it prints
        return self.tools.children.start(command, environment, self.tools.folder / _RAY_LOG)

    def ray_has_started(self) -> bool:
        """Whether Ray on this host says that it runs. It cannot without the answers of the head's control store."""
        try:
            return _STARTED in (self.tools.folder / _RAY_LOG).read_bytes()
        except FileNotFoundError:
            return False

    def ray_output(self) -> str:
        """The last words of Ray on this host; all it printed goes to the log."""
        try:
            lines = (self.tools.folder / _RAY_LOG).read_text(errors="replace").strip().splitlines()
        except FileNotFoundError:
            return "it printed nothing"
        telling = [line.strip() for line in lines if line.strip() and not any(word in line for word in _NOISE)]
        for line in telling[-_TAIL_LINES:]:
            _log.info("| %s", line)
        return " ".join(telling[-2:]) or "it printed nothing"


class Worker(Role):
    """Joins the head's cluster, and leaves when it knows how the step has ended."""

    def run(self) -> int:
        """Join, wait for the end, confirm it."""
        try:
            head = self.find_address(self.hosts.head, lambda: resolve(self.hosts.head))
            address = self.find_address(self.hosts.current, lambda: own_address(self.hosts))
            self._link = HeadLink(head, self.port)
            node = self._join(address)
        except Stopped:
            return STOPPED
        end = self._watch(node) if isinstance(node, subprocess.Popen) else node
        if end is None:
            return STOPPED
        self._confirm()
        if end.failure is None:
            return SUCCEEDED
        _log.error("the head says: %s", end.failure["message"])
        if self.tools.alarm.stop_requested:
            return STOPPED
        write_failure(self.hosts.failure_file, end.failure)
        return FAILED

    def _join(self, address: str) -> subprocess.Popen[bytes] | End:
        """Start Ray here and become part of the head's cluster; or the end, if that came first."""
        name = self.hosts.current
        node: subprocess.Popen[bytes] | None = None
        state = "nothing accepted connections at its address"

        def look() -> subprocess.Popen[bytes] | End | None:
            nonlocal node, state
            try:
                if (end := self._link.end()) is not None:
                    return end
                joined = self._link.nodes().get(name) is not None
            except (HeadUnreachable, HeadSilent) as error:
                state = str(error)
                # The head was there already: it was lost, and there is nothing to join any more.
                return node if node is not None and self.ray_has_started() else None
            except TokenRefused as error:
                raise ClusterError(f"the head {self.hosts.head} refuses the Ray token of host {name}") from error
            if node is not None and node.poll() is not None:
                state = f"Ray did not start there: {self.ray_output()}"
                _log.warning("trying again: %s", state)
                node = None
            if node is None:
                node = self.start_ray(address, "--address", f"{self._link.address}:{self._link.port}")
            return node if joined else None

        joined = self.until(look, self.joining, hurry=lambda: node is not None)
        if joined is None:
            raise ClusterError(
                f"host {name} could not join the head {self.hosts.head} within {self.limits.join_seconds:g} s "
                f"(HOUSING_CLUSTER_JOIN_SECONDS): {state}"
            )
        if isinstance(joined, subprocess.Popen):
            _log.info("joined as %s", address)
        return joined

    def _watch(self, node: subprocess.Popen[bytes]) -> End | None:
        """Wait for the end. None: SIGTERM came, and the head has gone or taken too long to end."""
        trouble: dict[type[Exception], Deadline] = {}
        leaving: Deadline | None = None
        alarm, limits = self.tools.alarm, self.limits
        for pause in pauses(limits.poll_seconds):
            if alarm.stop_requested and leaving is None:
                # The step may need this host while it saves its work.
                leaving = Deadline(limits.checkpoint_seconds + limits.farewell_seconds)
            try:
                if (end := self._link.end()) is not None:
                    return end
                trouble.clear()
            except (HeadUnreachable, HeadSilent) as error:
                if leaving is not None and isinstance(error, HeadUnreachable):
                    return None
                if type(error) not in trouble:
                    gone = isinstance(error, HeadUnreachable)
                    trouble[type(error)] = Deadline(limits.unreachable_seconds if gone else limits.silent_seconds)
                    _log.warning("%s", error)
                if (borne := trouble[type(error)]).passed:
                    raise ClusterError(f"lost the head {self.hosts.head}: {error}, for {borne.seconds:g} s") from error
            if leaving is not None and leaving.passed:
                return None
            if node.poll() is not None and leaving is None:
                if trouble:
                    where = f"{self._link.address}:{self.port}"
                    raise ClusterError(f"lost the head {self.hosts.head}: Ray on this host ended without it ({where})")
                raise ClusterError(f"Ray on host {self.hosts.current} ended: {self.ray_output()}")
            alarm.wait(_QUICK if leaving else pause)
            self.tools.children.reap()
        raise AssertionError("unreachable")

    def _confirm(self) -> None:
        try:
            self._link.confirm(self.hosts.current)
        except (HeadUnreachable, HeadSilent) as error:  # it has not waited
            _log.info("the head has gone already: %s", error)
