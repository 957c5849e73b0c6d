"""The head's part in the cluster of a job: waits for all hosts, runs the step, publishes how it ended."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from typing import Any

from step_scripts.cluster.job import (
    ClusterError,
    failure_of,
    own_address,
    pauses,
    resolve,
)
from step_scripts.cluster.node import ClusterStatusClient, HeadUnavailable, Node, Stopped
from step_scripts.runner import storage
from step_scripts.runner.execution import find_result
from step_scripts.runner.processes import how_ended
from step_scripts.runner.ray_environment import is_open

_log = logging.getLogger(__name__)


class Head(Node):
    """Runs Ray's control store and the step's driver."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._request = self.files.request()
        self._attempt = os.environ.get("HOUSING_ATTEMPT") or "attempt"
        self._answer: dict[str, Any] | None = None
        self._channel, theirs = multiprocessing.Pipe()
        # Started first: it imports what it needs while the cluster forms.
        command = [sys.executable, "-m", "step_scripts.runner.worker", str(theirs.fileno())]
        with theirs:
            self._driver = self.children.start(command, os.environ, inherit=[theirs.fileno()])
        self._status: ClusterStatusClient | None = None  # once it answers
        self._addresses: dict[str, str] = {}
        self._lost: dict[str, str] = {}

    def run(self) -> dict[str, Any] | None:
        """Run the step on the cluster, tell the other hosts how it ended. Returns its failure; raises `Stopped`."""
        stopped = False
        try:
            failure = self._form_and_run()
        except Stopped:
            stopped, failure = True, self._stop_step()
        except Exception as error:  # noqa: BLE001  # becomes the job's failure, which the workers repeat
            failure = failure_of(error)
            _log.error("failed: %s", failure["message"], exc_info=error if "traceback" in failure else None)
            self._end_driver(0)
        self._publish(failure)
        if failure is not None:
            self._remove_attempt()
            if stopped:
                raise Stopped
        elif self.hosts.kind == "training":
            model = {"manifest_uri": self._request.manifest_uri, "request_digest": self._request.digest}
            storage.write_json(str(self.hosts.root / "model" / "manifest.json"), model)
        return failure

    def _form_and_run(self) -> dict[str, Any] | None:
        """Form the cluster, and run the step on it. Returns the step's failure; raises `ClusterError`, `Stopped`."""
        address = self.find_address(self.hosts.current, lambda: own_address(self.hosts))
        ray = self.start_ray(address, "--head", "--port", str(self.port), "--include-dashboard=false")
        status = ClusterStatusClient(address, self.port)
        self._await_hosts(status, ray)
        hosts = ", ".join(f"{name} {place}" for name, place in self._addresses.items())
        note = f"Ray cluster of {len(self._addresses)} hosts: {hosts}"
        _log.info("%s", note)
        task = {"request": self._request.model_dump(mode="json"), "pipes": self.files.pipes(), "attempt": self._attempt}
        self._tell_driver({**task, "address": f"{address}:{self.port}", "note": note})
        return self._follow(status, ray)

    def _await_hosts(self, status: ClusterStatusClient, ray: subprocess.Popen[bytes]) -> None:
        """Wait until Ray on the head answers, and all hosts have joined."""
        problem = "it has not joined its own cluster"

        def poll(wanted: set[str]) -> bool | None:
            nonlocal problem
            if ray.poll() is not None:
                raise ClusterError(f"Ray did not start on the head {self.hosts.current}: {self.ray_output()}")
            try:
                nodes = status.nodes()
            except HeadUnavailable as error:
                problem = str(error)
                return None
            now = {name: place for name in self.hosts.names if (place := nodes.get(name)) is not None}
            for name in now.keys() - self._addresses.keys():
                _log.info("%s has joined (%d of %d)", name, len(now), len(self.hosts.names))
            self._addresses = now
            return True if wanted <= now.keys() else None

        if self.poll(lambda: poll({self.hosts.current}), self.limits.start_seconds) is None:
            raise ClusterError(
                f"Ray on the head {self.hosts.current} did not answer within {self.limits.start_seconds:g} s "
                f"(HOUSING_CLUSTER_START_SECONDS): {problem}; {self.ray_output()}"
            )
        self._status = status
        if self.poll(lambda: poll(set(self.hosts.names)), self.limits.join_seconds) is None:
            missing = [name for name in self.hosts.names if name not in self._addresses]
            unknown = [name for name in missing if resolve(name) is None]
            raise ClusterError(
                f"{len(missing)} of {len(self.hosts.names)} hosts did not join within {self.limits.join_seconds:g} s "
                f"(HOUSING_CLUSTER_JOIN_SECONDS): {', '.join(missing)}"
                + (f"; names that do not resolve: {', '.join(unknown)}" if unknown else "")
            )

    def _follow(self, status: ClusterStatusClient, ray: subprocess.Popen[bytes]) -> dict[str, Any] | None:
        """Wait for the step's end. Returns its failure."""
        silent_since: float | None = None
        lost_since: float | None = None
        for pause in pauses(self.limits.poll_seconds):
            self._receive()
            if self._driver.poll() is not None:
                break
            if ray.poll() is not None:
                raise ClusterError(f"Ray on the head {self.hosts.current} ended: {self.ray_output()}")
            try:
                self._find_lost_hosts(status)
                silent_since = None
            except HeadUnavailable as error:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since >= self.limits.head_unresponsive_timeout:
                    raise ClusterError(f"Ray on the head does not answer: {error}") from error
            if self._lost and lost_since is None:
                lost_since = time.monotonic()
            if lost_since is not None and time.monotonic() - lost_since >= self.limits.lost_host_seconds:
                raise ClusterError(
                    f"{self._lost_hosts()}, and the step has not ended within {self.limits.lost_host_seconds:g} s "
                    "since (HOUSING_CLUSTER_LOST_HOST_SECONDS)"
                )
            self.pause(pause)
        failure = self._step_failure()
        if failure is not None and failure["kind"] == "crash" and len(self.hosts.names) > 1:
            with contextlib.suppress(HeadUnavailable):
                self._find_lost_hosts(status, probe=True)
            if self._lost:
                failure["message"] = f"{self._lost_hosts()}; then: {failure['message']}"
        return failure

    def _find_lost_hosts(self, status: ClusterStatusClient, probe: bool = False) -> None:
        """Record hosts that are gone. With `probe`, connect to each: Ray takes a while to notice a loss."""
        nodes = status.nodes()
        for name, address in self._addresses.items():
            gone = nodes.get(name) is None or (probe and not is_open(address, status.node_ports[name]))
            if gone and name not in self._lost:
                self._lost[name] = address
                message = f"host {name} ({address}) was lost during the run; Ray goes on without it where it can"
                _log.warning("%s", message)
                self._tell_driver({"warning": message})

    def _lost_hosts(self) -> str:
        names = ", ".join(f"{name} ({address})" for name, address in self._lost.items())
        return f"host {names} was lost during the run" if len(self._lost) == 1 else f"hosts {names} were lost"

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError):  # that it has ended is noticed elsewhere
            if self._answer is None and self._channel.poll():
                self._answer = json.loads(self._channel.recv_bytes())

    def _step_failure(self) -> dict[str, Any] | None:
        """How the step has failed, once its process has ended; None if it succeeded."""
        self._receive()
        if self._answer is not None:
            return self._answer.get("error")
        message = f"before the step had ended, its process {how_ended(self._driver.returncode)}"
        return {"kind": "crash", "message": message}

    def _stop_step(self) -> dict[str, Any] | None:
        """After SIGTERM: let the step save its work. Returns None if it succeeded at the last moment."""
        _log.warning("SIGTERM: the step has %g s to save its work", self.limits.checkpoint_seconds)
        self._end_driver(self.limits.checkpoint_seconds)
        if self._step_failure() is None:
            return None
        return {"kind": "crash", "message": "the job was stopped, or its machine was taken away (SIGTERM)"}

    def _publish(self, failure: dict[str, Any] | None) -> None:
        """Publish the outcome; wait until the hosts that are alive have acknowledged it."""
        if self._status is None:
            return
        deadline = time.monotonic() + self.limits.shutdown_ack_timeout
        try:
            self._status.publish({"failure": failure})
            for pause in pauses(0.5):
                alive = {name for name, address in self._status.nodes().items() if address is not None}
                waiting = sorted(alive - self._status.acknowledged() - {self.hosts.current} - self._lost.keys())
                if not waiting:
                    return
                if (left := deadline - time.monotonic()) <= 0:
                    _log.warning("%s may not know how the step has ended", ", ".join(waiting))
                    return
                self.stop.wait(min(pause, left))
        except HeadUnavailable as error:
            _log.warning("the other hosts could not be told how the step has ended: %s", error)

    def _remove_attempt(self) -> None:
        """Remove the files of an attempt whose process could not remove them."""
        try:
            if find_result(self._request) is None:
                storage.delete_folder(storage.join(self._request.output_uri, self._attempt))
        except OSError as error:
            _log.warning("files of the failed attempt remain below %s: %s", self._request.output_uri, error)

    def _end_driver(self, seconds: float) -> None:
        self._driver.terminate()
        try:
            self._driver.wait(seconds)
        except subprocess.TimeoutExpired:
            self._driver.kill()
            self._driver.wait()

    def _tell_driver(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._channel.send_bytes(json.dumps(message).encode())
