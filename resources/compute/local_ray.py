"""Steps on Ray on this machine, or on a cluster given by its address.

The Ray driver is a child process: it serves all steps of a run in one Ray session, a crash of it does not take the
run's process along, and a termination does not wait for Ray, because the run's main thread only waits for a socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
from pydantic import Field, PrivateAttr

from resources.compute.base import ComputeBackend, failure_of
from resources.inventory import NotOwned, OwnedItem, remove_empty, remove_step_results, step_results
from step_scripts import storage
from step_scripts.contract import StepRequest, StepResult
from step_scripts.ray_session import RaySettings

_POLL_SECONDS = 0.2
_TERMINATION_SECONDS = 4.0


@dataclass
class _Worker:
    """The driver process, this end of its control socket, and the folder of everything temporary."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    folder: Path
    private: bool
    received: bytes = b""

    def send(self, message: dict[str, Any]) -> None:
        """Send `message`. That the process has ended is seen when its reply is waited for."""
        with contextlib.suppress(ConnectionError):
            self.channel.sendall(json.dumps(message).encode() + b"\n")

    def reply(self) -> dict[str, Any] | None:
        """The next reply; `None` if the process has ended. The main thread can be interrupted while it waits."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.channel, selectors.EVENT_READ)
            while True:
                line, newline, rest = self.received.partition(b"\n")
                if newline:
                    self.received = rest
                    return json.loads(line)
                if selector.select(_POLL_SECONDS):
                    data = self.channel.recv(1 << 16)
                    if not data:
                        return None
                    self.received += data

    def stop(self) -> None:
        """End the process and all that it started, and remove its folder. Takes at most about 5 seconds.

        A private Ray session holds nothing that anybody needs: its processes are killed, which takes a tenth of the
        second and a half that Ray takes to end them one after the other.
        """
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            driver = psutil.Process(self.process.pid)
            if self.private:
                driver.suspend()  # so that it starts nothing while its children are listed
            family = [driver, *driver.children(recursive=True)]
        for process in family if self.private else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.channel.close()  # the driver ends Ray and itself when it sees this
        _await_end(family)
        self.process.poll()
        shutil.rmtree(self.folder, ignore_errors=True)


def _await_end(family: Sequence[psutil.Process]) -> None:
    """Wait for processes that have been told to end; by force where that takes too long."""
    _, alive = psutil.wait_procs(family, timeout=_TERMINATION_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=1.0)


def _end_family(driver: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [driver, *driver.children(recursive=True)]
        driver.terminate()
        _await_end(family)


def _as_item(driver: psutil.Process, environment: dict[str, str]) -> OwnedItem:
    started = driver.create_time()
    return OwnedItem(
        kind="job",
        name=f"process {driver.pid}",
        location=f"process {driver.pid} of {started:.2f}",
        created_at=datetime.fromtimestamp(started, UTC),
        run_id=environment.get("HOUSING_RUN_ID"),
        temporary=True,
        detail="Ray driver",
    )


class LocalRay(ComputeBackend):
    """One Ray session a run, started with the first step that is not answered from the cache."""

    address: str | None = Field(
        default=None, description="Address of an existing Ray cluster. It is used, and never shut down."
    )
    num_cpus: int | None = Field(default=None, ge=1, description="CPUs that Ray may use. Empty: all of the machine.")
    object_store_memory: int | None = Field(
        default=None, ge=80 << 20, description="Size of Ray's object store, bytes. Empty: Ray's default."
    )

    _worker: _Worker | None = PrivateAttr(default=None)

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[LocalRay]:
        """End the Ray session with the run, however the run ends."""
        try:
            yield self
        finally:
            self._stop()

    def inventory(self) -> Sequence[OwnedItem]:
        """See `ComputeBackend.inventory`. What is running now are the driver processes of runs."""
        running = [_as_item(process, environment) for process, environment in self._drivers()]
        return [*running, *step_results(self.artifact_root)]

    def remove(self, item: OwnedItem) -> None:
        """See `ComputeBackend.remove`. A driver process is ended with all that it started."""
        if item.kind == "job":
            for process, environment in self._drivers():
                if _as_item(process, environment).location == item.location:
                    _end_family(process)
                    shutil.rmtree(environment["HOUSING_RAY_FOLDER"], ignore_errors=True)
        elif item.location.startswith(f"{self.artifact_root.rstrip('/')}/"):
            remove_step_results(self.artifact_root, item.location)
            remove_empty(self.artifact_root)
        else:
            raise NotOwned(f"{item.location} is not below {self.artifact_root}")

    def _drivers(self) -> list[tuple[psutil.Process, dict[str, str]]]:
        """Driver processes with this backend's artifacts, of whatever run, with their environments."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if "step_scripts.worker" in process.cmdline():
                    environment = process.environ()
                    if environment.get("HOUSING_ARTIFACTS") == self.artifact_root:
                        found.append((process, environment))
        return found

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()

    def _start(self, run_id: str) -> _Worker:
        ours, theirs = socket.socketpair()
        # Short, because Ray puts sockets below it: a socket's path is limited to 107 bytes.
        parent = "/tmp" if Path("/tmp").is_dir() else None
        folder = Path(tempfile.mkdtemp(prefix="housing-", dir=parent))
        settings = RaySettings(
            address=self.address, num_cpus=self.num_cpus, object_store_memory=self.object_store_memory
        )
        environment = os.environ | {
            "HOUSING_RAY_SETTINGS": settings.model_dump_json(),
            "HOUSING_RAY_FOLDER": str(folder),
            "TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            # By these an abandoned process is found.
            "HOUSING_ARTIFACTS": self.artifact_root,
            "HOUSING_RUN_ID": run_id,
        }
        environment.pop("RAY_ADDRESS", None)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "step_scripts.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the run alone, which then ends this process in order
            )
        return _Worker(process, ours, folder, private=self.address is None)

    def prepare(self, context: dg.AssetExecutionContext) -> None:
        """Start Ray now if there is no earlier result that could make it unnecessary."""
        if self._worker is None and not (self.use_cache and storage.exists(self.artifact_root)):
            self._worker = self._start(context.run.run_id)
            self._worker.send({"prepare": True})

    def _execute(self, context: dg.AssetExecutionContext, request: StepRequest) -> StepResult:
        attempt = uuid.uuid4().hex[:12]
        try:
            if self._worker is None:
                self._worker = self._start(context.run.run_id)
            with dg.open_pipes_session(
                context=context,
                context_injector=dg.PipesTempFileContextInjector(),
                message_reader=dg.PipesTempFileMessageReader(),
            ) as session:
                pipes = session.get_bootstrap_env_vars()
                self._worker.send({"request": request.model_dump(mode="json"), "attempt": attempt, "pipes": pipes})
                reply = self._worker.reply()
        except BaseException:
            # Any way out but the normal one (termination above all): nothing may go on running behind the run's back.
            self._stop()
            storage.delete(storage.join(request.output_uri, attempt))
            raise
        if reply is None:
            reply = {"error": {"kind": "crash", "message": self._how_it_ended(), "traceback": "see the run's output"}}
            self._stop()
            storage.delete(storage.join(request.output_uri, attempt))
        if "error" in reply:
            raise failure_of(request.step, reply["error"])
        return StepResult.model_validate(reply["result"])

    def _how_it_ended(self) -> str:
        assert self._worker is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._worker.process.wait(1.0)
        status = self._worker.process.returncode
        if status is None or status >= 0:
            return f"the Ray driver process ended with status {status}"
        name = signal.Signals(-status).name
        hint = "; probably out of memory: use a machine with more, or smaller pieces" if name == "SIGKILL" else ""
        return f"the Ray driver process was ended by {name}{hint}"
