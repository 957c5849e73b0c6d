"""The head's part in the cluster of a job: waits for all hosts, runs the step, publishes how it ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from typing import Any

from step_scripts.cluster.driver import Assignment
from step_scripts.cluster.end import End, HeadLink, HeadSilent, HeadUnreachable
from step_scripts.cluster.failure import ClusterError, failure_of, write_failure
from step_scripts.cluster.job_hosts import own_address, resolve
from step_scripts.cluster.limits import Deadline, pauses
from step_scripts.cluster.roles import FAILED, STOPPED, SUCCEEDED, HostTools, Role, Stopped
from step_scripts.runner import storage
from step_scripts.runner.contract import write_json
from step_scripts.runner.execution import find_result
from step_scripts.runner.ports import is_open

_log = logging.getLogger(__name__)


class Head(Role):
    """Holds the control store and the step's driver."""

    def __init__(self, tools: HostTools) -> None:
        super().__init__(tools)
        self._request = tools.files.request()
        self._attempt = os.environ.get("HOUSING_ATTEMPT") or "attempt"
        self._outcome = tools.folder / "outcome.json"
        self._link: HeadLink | None = None
        self._lost: dict[str, str] = {}

    def run(self) -> int:
        """Run the step on the cluster, and tell the others how it ended."""
        stopped = False
        driver = self._start_driver()
        try:
            failure = self._form_and_run(driver)
        except Stopped:
            stopped, failure = True, self._save(driver)
        except Exception as error:  # noqa: BLE001  # becomes the job's failure, and the workers are told
            failure = failure_of(error)
            _log.error("failed: %s", failure["message"], exc_info=None if isinstance(error, ClusterError) else error)
            self.tools.children.end(driver, 0)
        if failure is not None and not stopped:
            write_failure(self.hosts.failure_file, failure)
        self._tell(End(failure))
        if failure is not None:
            self._remove_attempt()
            return STOPPED if stopped else FAILED
        if self.hosts.kind == "training":
            model = str(self.hosts.root / "model" / "manifest.json")
            write_json(model, {"manifest_uri": self._request.manifest_uri, "request_digest": self._request.digest})
        return SUCCEEDED

    def _start_driver(self) -> subprocess.Popen[bytes]:
        driver = self.tools.children.start([sys.executable, "-m", "step_scripts.cluster.driver"], os.environ)
        assignment = Assignment(
            request=self._request, attempt=self._attempt, pipes=self.tools.files.pipes(), outcome=self._outcome
        )
        self._tell_driver(driver, assignment.model_dump_json())
        return driver

    def _form_and_run(self, driver: subprocess.Popen[bytes]) -> dict[str, Any] | None:
        """Form the cluster, and run the step on it. Returns the step's failure; raises `ClusterError`, `Stopped`."""
        address = self.find_address(self.hosts.current, lambda: own_address(self.hosts))
        node = self.start_ray(address, "--head", "--port", str(self.port), "--include-dashboard=false", "--no-monitor")
        link = HeadLink(address, self.port)
        addresses = self._await_hosts(link, node)
        note = f"Ray cluster of {len(addresses)} hosts: " + ", ".join(f"{n} {a}" for n, a in addresses.items())
        _log.info("%s", note)
        self._tell_driver(driver, json.dumps({"address": f"{address}:{self.port}", "note": note}))
        return self._follow(link, node, driver, addresses)

    def _await_hosts(self, link: HeadLink, node: subprocess.Popen[bytes]) -> dict[str, str]:
        """Addresses of all hosts, once Ray on the head answers and all have joined."""
        there: dict[str, str] = {}
        trouble = "it has not joined its own cluster"

        def look() -> dict[str, str] | None:
            nonlocal there, trouble
            if node.poll() is not None:
                raise ClusterError(f"Ray did not start on the head {self.hosts.current}: {self.ray_output()}")
            try:
                nodes = link.nodes()
            except (HeadUnreachable, HeadSilent) as error:
                trouble = str(error)
                return None
            now = {name: place for name in self.hosts.names if (place := nodes.get(name)) is not None}
            for name in now.keys() - there.keys():
                _log.info("%s is there (%d of %d)", name, len(now), len(self.hosts.names))
            there = now
            return now if self.hosts.current in now else None

        def look_for_all() -> dict[str, str] | None:
            found = look()
            return found if found is not None and len(found) == len(self.hosts.names) else None

        if self.until(look, Deadline(self.limits.start_seconds)) is None:
            raise ClusterError(
                f"Ray on the head {self.hosts.current} did not answer within {self.limits.start_seconds:g} s "
                f"(HOUSING_CLUSTER_START_SECONDS): {trouble}; {self.ray_output()}"
            )
        self._link = link
        found = self.until(look_for_all, Deadline(self.limits.join_seconds))
        if found is None:
            missing = [name for name in self.hosts.names if name not in there]
            unknown = [name for name in missing if resolve(name) is None]
            raise ClusterError(
                f"{len(missing)} of {len(self.hosts.names)} hosts did not join within {self.limits.join_seconds:g} s "
                f"(HOUSING_CLUSTER_JOIN_SECONDS): {', '.join(missing)}"
                + (f"; names that do not resolve: {', '.join(unknown)}" if unknown else "")
            )
        return found

    def _follow(
        self, link: HeadLink, node: subprocess.Popen[bytes], driver: subprocess.Popen[bytes], addresses: dict[str, str]
    ) -> dict[str, Any] | None:
        """Wait for the step's end; its failure."""
        silent: Deadline | None = None
        losing: Deadline | None = None
        for pause in pauses(self.limits.poll_seconds):
            if driver.poll() is not None:
                break
            if node.poll() is not None:
                raise ClusterError(f"Ray on the head {self.hosts.current} ended: {self.ray_output()}")
            try:
                self._note_lost(link, driver, addresses)
                silent = None
            except (HeadUnreachable, HeadSilent) as error:
                silent = silent or Deadline(self.limits.silent_seconds)
                if silent.passed:
                    raise ClusterError(f"Ray on the head does not answer: {error}") from error
            if self._lost and losing is None:
                losing = Deadline(self.limits.lost_host_seconds)
            if losing is not None and losing.passed:
                raise ClusterError(
                    f"{self._lost_hosts()}, and the step has not ended within {losing.seconds:g} s since "
                    "(HOUSING_CLUSTER_LOST_HOST_SECONDS)"
                )
            self.pause(pause)
        failure = self._step_failure(driver)
        if failure is not None and failure["kind"] == "crash" and len(addresses) > 1:
            with contextlib.suppress(HeadUnreachable, HeadSilent):
                self._note_lost(link, driver, addresses, probe=True)
            if self._lost:
                failure["message"] = f"{self._lost_hosts()}; then: {failure['message']}"
        return failure

    def _note_lost(
        self, link: HeadLink, driver: subprocess.Popen[bytes], addresses: dict[str, str], probe: bool = False
    ) -> None:
        """Find hosts that are gone. With `probe`, do not rely on Ray, which takes its time to be sure."""
        nodes = link.nodes()
        for name, address in addresses.items():
            gone = nodes.get(name) is None or (probe and not is_open(address, link.node_ports[name]))
            if gone and name not in self._lost:
                self._lost[name] = address
                message = f"host {name} ({address}) was lost during the run; Ray goes on without it where it can"
                _log.warning("%s", message)
                if driver.poll() is None:
                    self._tell_driver(driver, json.dumps({"warning": message}))

    def _lost_hosts(self) -> str:
        names = ", ".join(f"{name} ({address})" for name, address in self._lost.items())
        return f"host {names} was lost during the run" if len(self._lost) == 1 else f"hosts {names} were lost"

    def _step_failure(self, driver: subprocess.Popen[bytes]) -> dict[str, Any] | None:
        try:
            return json.loads(self._outcome.read_text())["failure"]
        except FileNotFoundError:
            code = driver.poll()
        if code is not None and code < 0:
            hint = "; perhaps the host ran out of memory" if code == -signal.SIGKILL else ""
            message = f"the step's process was killed by {signal.Signals(-code).name}{hint}"
        else:
            message = f"the step's process ended with status {code} before the step had ended"
        return {"kind": "crash", "message": message}

    def _save(self, driver: subprocess.Popen[bytes]) -> dict[str, Any] | None:
        """After SIGTERM: let the step save its work. Returns None if it succeeded at the last moment."""
        _log.warning("SIGTERM: the step has %g s to save its work", self.limits.checkpoint_seconds)
        self.tools.children.end(driver, self.limits.checkpoint_seconds)
        if self._outcome.exists() and self._step_failure(driver) is None:
            return None
        return {"kind": "crash", "message": "the job was stopped, or its machine was taken away (SIGTERM)"}

    def _tell(self, end: End) -> None:
        """Publish the end; wait until the hosts that are there know it."""
        if self._link is None:
            return
        deadline = Deadline(self.limits.farewell_seconds)
        try:
            self._link.publish(end)
            for pause in pauses(0.5):
                there = {name for name, address in self._link.nodes().items() if address is not None}
                waiting = sorted(there - self._link.confirmed() - {self.hosts.current} - self._lost.keys())
                if not waiting:
                    return
                if deadline.passed:
                    _log.warning("%s may not know how the step has ended", ", ".join(waiting))
                    return
                self.tools.alarm.wait(min(pause, deadline.left))
        except (HeadUnreachable, HeadSilent) as error:
            _log.warning("the other hosts could not be told how the step has ended: %s", error)

    def _remove_attempt(self) -> None:
        """Remove the files of an attempt whose process could not do that itself."""
        try:
            if find_result(self._request) is None:
                storage.delete(storage.join(self._request.output_uri, self._attempt))
        except OSError as error:
            _log.warning("files of the failed attempt remain below %s: %s", self._request.output_uri, error)

    def _tell_driver(self, driver: subprocess.Popen[bytes], line: str) -> None:
        assert driver.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is noticed elsewhere
            driver.stdin.write(line.encode() + b"\n")
            driver.stdin.flush()
