"""One deployment of a model version to a local endpoint: test beside what serves, change over, test, go back."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from resources.endpoints import server_process as servers
from resources.endpoints.base import PROBE_ID, EndpointDeploymentFailed, SmokeTest, SmokeTestResult
from resources.model_registry.base import ModelVersion
from step_scripts.runner.contract import check_files
from step_scripts.runner.local_files import private_folder
from step_scripts.serving.deployment import (
    DEPLOYMENT_FILE,
    SERVER_FILE,
    CaptureSettings,
    DeploymentRecord,
    ServerRecord,
)

if TYPE_CHECKING:
    from resources.endpoints.local import LocalEndpointHost

_PREFERRED_PORT = 8080
_HOST = "127.0.0.1"


class LocalRollout:
    """Brings `version` to endpoint `name`, whose state folder exists and is locked."""

    def __init__(
        self, host: LocalEndpointHost, name: str, version: ModelVersion, smoke_test: SmokeTest, log: logging.Logger
    ) -> None:
        self.host = host
        self.folder = host.folder(name)
        self.name = name
        self.version = version
        self.smoke_test = smoke_test
        self.log = log
        self.capture = CaptureSettings(**host.data_capture.model_dump()) if host.data_capture else None
        self.previous = read_deployment(self.folder)
        self.server = servers.find_server(self.folder)

    def run(self) -> SmokeTestResult:
        """Have the version served; returns its smoke test. If that fails, what was served before is served again."""
        check_files(self.version.artifact, "all")
        previous, server = self.previous, self.server
        served = servers.ping(server) if server else None
        if previous and server and not served:
            self.log.warning(
                f"The server of endpoint {self.name} (process {server.pid}) does not answer: it is replaced."
            )
        elif previous and not server:
            self.log.warning(f"The server of endpoint {self.name} has ended since {previous.version} was deployed.")
        if server and served and self._is_served(served, server):
            self.log.info(f"Endpoint {self.name} serves {self.version.reference} already.")
            return self._smoke(server)
        record = self._record()
        first = previous is None and server is None  # it has no callers yet: it is tested as it is
        if not first:
            self._smoke_test_on_candidate(record)
        running = server if served else None
        try:
            server = self._serve(record, running)
            result = self._smoke(server)
        except BaseException:
            self._go_back(running)
            raise
        if first:
            self.log.info(result.of(record.version))
        self.log.info(f"Endpoint {self.name} serves {record.version} at http://{server.host}:{server.port}.")
        return result

    def _is_served(self, served: dict[str, str], server: ServerRecord) -> bool:
        return (
            served["version"] == self.version.reference
            and served["model_digest"] == self.version.artifact.digest
            and self.host.port in (None, server.port)
            and self.previous is not None
            and self.previous.capture == self.capture
        )

    def _record(self) -> DeploymentRecord:
        previous, server, port = self.previous, self.server, self.host.port
        if port is None:
            port = server.port if server else previous.port if previous else _PREFERRED_PORT
        elif server is None or server.port != port:
            _require_free(port, self.name)
        before = None
        if previous is not None:
            again = previous.version == self.version.reference
            before = previous.previous_version if again else previous.version
        return DeploymentRecord(
            deployment_id=uuid.uuid4().hex,
            endpoint_name=self.name,
            version=self.version.reference,
            model=self.version.artifact,
            host=_HOST,
            port=port,
            port_is_required=self.host.port is not None,
            deployed_at=datetime.now(UTC),
            previous_version=before,
            capture=self.capture,
        )

    def _smoke_test_on_candidate(self, record: DeploymentRecord) -> None:
        """Run the smoke test on a server of its own, which has no other callers."""
        for leftover in self.folder.glob(".candidate-*"):  # of a deployment that was killed; its server ended with it
            shutil.rmtree(leftover, ignore_errors=True)
        trial = self.folder / f".candidate-{record.deployment_id}"
        private_folder(trial)
        try:
            unlisted = record.model_copy(update={"port": 0, "port_is_required": False, "capture": None})
            unlisted.write(trial / DEPLOYMENT_FILE)
            with servers.candidate(trial, self.host.start_timeout_seconds) as server:
                result = self._smoke(server)
        except (servers.ServerUnreachable, TimeoutError) as error:
            raise servers.ServerUnreachable(f"{error}:\n{servers.log_tail(trial)}") from error
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        self.log.info(result.of(record.version))

    def _serve(self, record: DeploymentRecord, running: ServerRecord | None) -> ServerRecord:
        """Have `record` served: by the running server, which changes to it while it goes on serving, or by a new one.

        Raises `ServerUnreachable` if it ends or refuses the model, `TimeoutError`.
        """
        record.write(self.folder / DEPLOYMENT_FILE)
        if running is not None and record.port == running.port:
            servers.reload_server(running)
            return servers.wait_until_serving(self.folder, self.host.swap_timeout_seconds, changing=running)
        if servers.end_server(self.folder, self.host.stop_timeout_seconds):
            self.log.info(f"The server of endpoint {self.name} is started again, on port {record.port}.")
        servers.start_detached(self.folder)
        server = servers.wait_until_serving(self.folder, self.host.start_timeout_seconds)
        # The port that it got is the one to ask for from now on.
        record.model_copy(update={"port": server.port}).write(self.folder / DEPLOYMENT_FILE)
        return server

    def _go_back(self, running: ServerRecord | None) -> None:
        """Have the previous deployment served again, if the server that was running served it."""
        previous = self.previous
        if previous is None or running is None:
            servers.end_server(self.folder, 5.0)
        if previous is None:
            (self.folder / DEPLOYMENT_FILE).unlink(missing_ok=True)
        elif running is None:
            previous.write(self.folder / DEPLOYMENT_FILE)
        else:
            self.log.warning(f"Going back to {previous.version}.")
            try:
                self._serve(previous, running if servers.find_server(self.folder) == running else None)
            except (servers.ServerUnreachable, TimeoutError) as error:
                self.log.warning(f"{previous.version} could not be put back: {error}")

    def _smoke(self, server: ServerRecord) -> SmokeTestResult:
        return self.smoke_test.run(
            lambda body: servers.invoke_server(server, self.name, body, "text/csv", "text/csv", PROBE_ID)
        )


def read_deployment(folder: Path) -> DeploymentRecord | None:
    """What the endpoint is to serve, if it exists. Raises `EndpointDeploymentFailed` if that cannot be read."""
    try:
        return DeploymentRecord.read(folder / DEPLOYMENT_FILE)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise EndpointDeploymentFailed(
            f"{folder / DEPLOYMENT_FILE} cannot be read ({error}); end the server recorded in {SERVER_FILE} and remove "
            "the folder"
        ) from error


def _require_free(port: int, name: str) -> None:
    try:
        socket.create_server((_HOST, port)).close()
    except OSError as error:
        raise EndpointDeploymentFailed(
            f"endpoint {name} cannot be served on port {port}, which is configured: {os.strerror(error.errno or 0)}. "
            "Configure another port, leave it empty, or end the program that uses it."
        ) from error
