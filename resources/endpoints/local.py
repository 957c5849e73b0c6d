"""Endpoints on this machine: one serving process each, which outlives the run that deployed it.

`<root>/<name>` is the endpoint's state folder (see `step_scripts.serving.deployment`); `<root>/.<name>.lock` is locked
while a deployment is in progress. `python -m resources.endpoints.local stop|status --root ROOT` for people.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from resources.endpoints.base import (
    PROBE_ID,
    DeploymentLog,
    EndpointDeploymentFailed,
    EndpointHost,
    EndpointNotFound,
    EndpointStatus,
    InvocationFailed,
    SmokeTest,
    SmokeTestFailed,
    SmokeTestResult,
    require_approved,
)
from resources.endpoints.captured_files import CapturedFile, captured_below, remove_captured
from resources.endpoints.hot_swap import hot_swap, read_deployment, rollback_on_failure
from resources.endpoints.server_process import (
    ServerUnreachable,
    candidate,
    end_processes,
    end_server,
    find_server,
    invoke_server,
    log_tail,
    orphan_servers,
    ping,
    start_detached,
    wait_until_serving,
)
from resources.inventory import NotOwned, OwnedItem, discarded_items, remove_discarded
from resources.model_registry.base import ModelVersion
from step_scripts.runner import storage
from step_scripts.runner.contract import DamagedArtifactError, check_files
from step_scripts.runner.local_files import file_lock, private_folder
from step_scripts.runner.wording import counted
from step_scripts.serving.deployment import (
    CAPTURE_FOLDER,
    DEPLOYMENT_FILE,
    CaptureCounts,
    CaptureSettings,
    DeploymentRecord,
    ServerRecord,
)
from step_scripts.table.spec import TableSpec

if TYPE_CHECKING:
    from step_scripts.serving.captured_requests import CapturedRows

PREFERRED_PORT = 8080
_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
_HOST = "127.0.0.1"
_FAILURES = (ServerUnreachable, SmokeTestFailed, InvocationFailed, DamagedArtifactError, TimeoutError)


class LocalDataCapture(dg.Config):
    """Requests and answers, kept in the endpoint's folder in SageMaker's form."""

    sampling_percentage: float = Field(default=100.0, gt=0, le=100, description="Share of the requests, percent.")
    megabytes: float = Field(default=100.0, gt=0, description="Bound of all files; the oldest make room.")


class LocalEndpointHost(EndpointHost):
    """Serving processes on the loopback interface, with their state below `root`."""

    root: str = Field(description="Folder of the endpoints' state and logs.")
    port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description=f"Port to serve on. Empty: {PREFERRED_PORT}, or any free one where that is in use.",
    )
    data_capture: LocalDataCapture | None = Field(default=None, description="Keep requests and answers. Empty: no.")
    start_timeout_seconds: float = Field(default=60.0, gt=0, description="How long a server may take to start.")
    swap_timeout_seconds: float = Field(default=60.0, gt=0, description="How long a change of model may take.")
    stop_timeout_seconds: float = Field(default=30.0, gt=0, description="After that a server is ended by force.")
    lock_timeout_seconds: float = Field(default=180.0, gt=0, description="How long to wait for another deployment.")

    def deploy(self, name: str, version: ModelVersion, smoke_test: SmokeTest, log: DeploymentLog) -> EndpointStatus:
        """See `EndpointHost.deploy`. A version that is served already is only tested."""
        require_approved(version)
        folder = self._folder(name)
        with file_lock(self._lock_path(name), self.lock_timeout_seconds, f"deploying to endpoint {name}"):
            made = not folder.exists()
            private_folder(folder)
            try:
                return self._deploy(folder, name, version, smoke_test, log)
            except _FAILURES as error:
                kept = self.describe(name)
                now = f"{kept.version} keeps serving" if kept and kept.state == "InService" else "nothing is served"
                raise EndpointDeploymentFailed(
                    f"{version.reference} was not deployed to endpoint {name}; {now}. {error}\n"
                    f"Log of the server ({folder}):\n{log_tail(folder)}"
                ) from error
            finally:
                if made and not (folder / DEPLOYMENT_FILE).exists():
                    shutil.rmtree(folder, ignore_errors=True)

    def describe(self, name: str) -> EndpointStatus | None:
        """See `EndpointHost.describe`. `OutOfService`: the process has ended or does not answer."""
        folder = self._folder(name)
        record = read_deployment(folder)
        if record is None:
            return None
        server = find_server(folder)
        served = ping(server) if server else None
        return EndpointStatus(
            name=name,
            state="InService" if served else "OutOfService",
            url=f"http://{record.host}:{server.port if server else record.port}/endpoints/{name}/invocations",
            version=served["version"] if served else record.version,
            model_digest=served["model_digest"] if served else record.model.digest,
            pid=server.pid if server else None,
            started_at=server.started_at if server else None,
            deployed_at=record.deployed_at,
            previous_version=record.previous_version,
            captured=CaptureCounts(**served["captured"]) if served and "captured" in served else None,
        )

    def invoke(
        self, name: str, body: bytes, content_type: str, accept: str = "*/*", inference_id: str | None = None
    ) -> bytes:
        """See `EndpointHost.invoke`."""
        if (server := find_server(self._folder(name))) is None:
            known = ", ".join(s.name for s in self.list() if s.state == "InService") or "none"
            raise EndpointNotFound(f"endpoint {name} is not served; served are: {known} (in {self.root})")
        return invoke_server(server, name, body, content_type, accept, inference_id)

    def captured(self, name: str, table: TableSpec, since: datetime, limit: int) -> CapturedRows | None:
        """See `EndpointHost.captured`."""
        from step_scripts.serving.captured_requests import read_captured

        folder = self._folder(name)
        record = read_deployment(folder)
        if record is None or record.capture is None:
            return None
        return read_captured(str(folder / CAPTURE_FOLDER), table, since, limit, without=PROBE_ID)

    def captured_files(self) -> Sequence[CapturedFile]:
        """See `EndpointHost.captured_files`. The serving process bounds their size itself, but not their age."""
        return [f for name in self._names() for f in captured_below(str(self._folder(name) / CAPTURE_FOLDER), name)]

    def remove_captured(self, files: Sequence[CapturedFile]) -> None:
        """See `EndpointHost.remove_captured`."""
        remove_captured(files, str(Path(self.root).absolute()))

    def delete(self, name: str) -> None:
        """See `EndpointHost.delete`."""
        folder = self._folder(name)
        with file_lock(self._lock_path(name), self.lock_timeout_seconds, f"deleting endpoint {name}"):
            end_server(folder, self.stop_timeout_seconds)
            storage.discard_folder(folder)

    def stop(self, name: str) -> bool:
        """End the serving process, keep the endpoint: its next deployment uses the same port. False if none ran."""
        with file_lock(self._lock_path(name), self.lock_timeout_seconds, f"stopping endpoint {name}"):
            return end_server(self._folder(name), self.stop_timeout_seconds)

    def list(self) -> Sequence[EndpointStatus]:
        """See `EndpointHost.list`."""
        return [status for name in self._names() if (status := self.describe(name)) is not None]

    def inventory(self) -> Sequence[OwnedItem]:
        """See `EndpointHost.inventory`; with servers whose state folder is gone."""
        items = [item for name in self._names() if (item := self._item(name)) is not None]
        items += discarded_items(self.root, "endpoint")
        known = {item.name for item in items}
        for name, process in orphan_servers(Path(self.root).absolute()):
            if name in known or not _NAME.fullmatch(name):
                continue
            started = datetime.fromtimestamp(process.create_time(), UTC)
            detail = f"process {process.pid} serves it, and its folder is gone"
            items.append(
                OwnedItem(
                    kind="endpoint",
                    name=name,
                    location=str(self._folder(name)),
                    created_at=started,
                    temporary=True,
                    detail=detail,
                )
            )
        return items

    def remove(self, item: OwnedItem) -> None:
        """See `EndpointHost.remove`. Ends the serving process."""
        if item.discarded:
            remove_discarded(self.root, item)
            return
        if item.kind != "endpoint" or item.location != str(self._folder(item.name)):
            raise NotOwned(f"{item.location} is no endpoint of this host ({self.root})")
        if not item.temporary:
            self.delete(item.name)
        for name, process in orphan_servers(Path(self.root).absolute()):
            if name == item.name:
                end_processes([process])

    def _item(self, name: str) -> OwnedItem | None:
        location = str(self._folder(name))
        try:
            status = self.describe(name)
        except EndpointDeploymentFailed as error:  # it does not hide the others
            return OwnedItem(kind="endpoint", name=name, location=location, detail=str(error))
        if status is None:
            return None
        detail = f"{status.state}, {status.version}" + (f", process {status.pid}" if status.pid else "")
        return OwnedItem(kind="endpoint", name=name, location=location, created_at=status.deployed_at, detail=detail)

    def _names(self) -> Sequence[str]:
        root = Path(self.root)
        return sorted(p.name for p in root.iterdir() if _NAME.fullmatch(p.name)) if root.is_dir() else []

    def _folder(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of an endpoint: 1 to 63 letters, digits and inner hyphens")
        return Path(self.root).absolute() / name

    def _lock_path(self, name: str) -> Path:
        folder = self._folder(name)
        return folder.with_name(f".{name}.lock")

    def _deploy(
        self, folder: Path, name: str, version: ModelVersion, smoke_test: SmokeTest, log: DeploymentLog
    ) -> EndpointStatus:
        check_files(version.artifact, "all")
        current, server = read_deployment(folder), find_server(folder)
        served = ping(server) if server else None
        if current and server and not served:
            log.warning(f"The server of endpoint {name} (process {server.pid}) does not answer: it is replaced.")
        elif current and not server:
            log.warning(f"The server of endpoint {name} has ended since {current.version} was deployed.")
        captures = current is not None and current.capture == self._capture
        if server and served and captures and self._serves(served, server, version):
            log.info(f"Endpoint {name} serves {version.reference} already.")
            return self._status(name, _smoke(server, name, smoke_test))
        record = self._record(name, version, current, server)
        first = current is None and server is None  # it has no callers yet: it is tested as it is
        if not first:
            self._smoke_test_on_candidate(folder, record, smoke_test, log)
        with rollback_on_failure(folder, current, server if served else None, self.swap_timeout_seconds, log):
            if server and served and record.port in (0, server.port):
                hot_swap(folder, server, record, self.swap_timeout_seconds)
            else:
                record.write(folder / DEPLOYMENT_FILE)
                if end_server(folder, self.stop_timeout_seconds):
                    log.info(f"The server of endpoint {name} is started again, on port {record.port}.")
                server = self._start(folder, record)
            result = _smoke(server, name, smoke_test)
            if first:
                log.info(_measured(record, result))
        log.info(f"Endpoint {name} serves {version.reference} at http://{server.host}:{server.port}.")
        return self._status(name, result)

    def _serves(self, served: dict[str, str], server: ServerRecord, version: ModelVersion) -> bool:
        return (
            served["version"] == version.reference
            and served["model_digest"] == version.artifact.digest
            and self.port in (None, server.port)
        )

    def _record(
        self, name: str, version: ModelVersion, current: DeploymentRecord | None, server: ServerRecord | None
    ) -> DeploymentRecord:
        kept = server.port if server else current.port if current else PREFERRED_PORT
        port = self.port if self.port is not None else kept
        if self.port is not None and (server is None or server.port != port):
            _require_free(_HOST, port, name)
        previous = current and (current.version if current.version != version.reference else current.previous_version)
        return DeploymentRecord(
            deployment_id=uuid.uuid4().hex,
            endpoint_name=name,
            version=version.reference,
            model=version.artifact,
            host=_HOST,
            port=port,
            port_is_required=self.port is not None,
            deployed_at=datetime.now(UTC),
            previous_version=previous,
            capture=self._capture,
        )

    @property
    def _capture(self) -> CaptureSettings | None:
        return CaptureSettings(**self.data_capture.model_dump()) if self.data_capture else None

    def _smoke_test_on_candidate(
        self, folder: Path, record: DeploymentRecord, smoke_test: SmokeTest, log: DeploymentLog
    ) -> None:
        """Run the smoke test on a server of its own, which has no other callers."""
        for leftover in folder.glob(".candidate-*"):  # of a deployment that was killed; its server ended with it
            shutil.rmtree(leftover, ignore_errors=True)
        trial = folder / f".candidate-{record.deployment_id}"
        private_folder(trial)
        try:
            unlisted = record.model_copy(update={"port": 0, "port_is_required": False, "capture": None})
            unlisted.write(trial / DEPLOYMENT_FILE)
            try:
                with candidate(trial, self.start_timeout_seconds) as server:
                    result = _smoke(server, record.endpoint_name, smoke_test)
            except (ServerUnreachable, TimeoutError) as error:
                raise ServerUnreachable(f"{error}:\n{log_tail(trial)}") from error
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        log.info(_measured(record, result))

    def _start(self, folder: Path, record: DeploymentRecord) -> ServerRecord:
        start_detached(folder)
        server = wait_until_serving(folder, self.start_timeout_seconds)
        # The port that it got is the one to ask for from now on.
        record.model_copy(update={"port": server.port}).write(folder / DEPLOYMENT_FILE)
        return server

    def _status(self, name: str, result: SmokeTestResult) -> EndpointStatus:
        status = self.describe(name)
        if status is None or status.state != "InService":
            raise ServerUnreachable(f"the server of endpoint {name} ended after its smoke test")
        return status.model_copy(update={"smoke_test": result})


def _require_free(host: str, port: int, name: str) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise EndpointDeploymentFailed(
            f"endpoint {name} cannot be served on port {port}, which is configured: {os.strerror(error.errno or 0)}. "
            "Configure another port, leave it empty, or end the program that uses it."
        ) from error


def _measured(record: DeploymentRecord, result: SmokeTestResult) -> str:
    return (
        f"Smoke test of {record.version}: {counted(result.rows, 'row')}, "
        f"largest difference {result.largest_difference:g}, "
        f"{result.median_ms:g} ms a row."
    )


def _smoke(server: ServerRecord, name: str, smoke_test: SmokeTest) -> SmokeTestResult:
    return smoke_test.run(lambda body: invoke_server(server, name, body, "text/csv", "text/csv", PROBE_ID))


def main(arguments: Sequence[str]) -> int:
    """`status` or `stop` for all endpoints below a root. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m resources.endpoints.local", description="Local endpoints.")
    parser.add_argument("command", choices=["status", "stop"])
    parser.add_argument("--root", required=True, help="folder of the endpoints' state")
    options = parser.parse_args(arguments)
    host = LocalEndpointHost(root=options.root)
    endpoints = host.list()
    for status in endpoints:
        if options.command == "stop":
            outcome = "stopped" if host.stop(status.name) else "was not running"
        else:
            outcome = f"{status.state}, {status.version}, {status.url}, process {status.pid}"
        sys.stdout.write(f"{status.name}: {outcome}\n")
    if not endpoints:
        sys.stdout.write(f"no endpoints in {options.root}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
