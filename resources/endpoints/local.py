"""Endpoints on this machine: one serving process each, which outlives the run that deployed it.

`<root>/<name>` is the endpoint's state folder (see `step_scripts.serving.deployment`); `<root>/.<name>.lock` is locked
while a deployment is in progress. `python -m resources.endpoints.local stop|status --root ROOT` for people.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import dagster as dg
from pydantic import Field

from resources.endpoints import server_process as servers
from resources.endpoints.base import (
    EndpointDeploymentFailed,
    EndpointHost,
    EndpointStatus,
    InvocationFailed,
    SmokeTest,
    SmokeTestFailed,
)
from resources.endpoints.local_rollout import LocalRollout, read_deployment
from resources.inventory import NotOwned, OwnedItem, discarded_items, remove_discarded
from resources.model_registry.base import NAME, ModelVersion, check_name
from step_scripts.runner.contract import DamagedArtifactError
from step_scripts.runner.local_files import discard_folder, file_lock, private_folder
from step_scripts.runner.processes import end_processes
from step_scripts.serving.deployment import CAPTURE_FOLDER, DEPLOYMENT_FILE, CaptureCounts

_FAILURES = (servers.ServerUnreachable, SmokeTestFailed, InvocationFailed, DamagedArtifactError, TimeoutError)


class LocalDataCapture(dg.Config):
    """Requests and answers, kept in the endpoint's folder in SageMaker's form."""

    sampling_percentage: float = Field(default=100.0, gt=0, le=100, description="Share of the requests, percent.")
    megabytes: float = Field(default=100.0, gt=0, description="Bound of all files; the oldest make room.")


class LocalEndpointHost(EndpointHost):
    """Serving processes on the loopback interface, with their state below `root`."""

    _capture_subfolder: ClassVar[str] = f"/{CAPTURE_FOLDER}"

    root: str = Field(description="Folder of the endpoints' state and logs.")
    port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Port to serve on. Empty: 8080, or any free one where that is in use.",
    )
    data_capture: LocalDataCapture | None = Field(default=None, description="Keep requests and answers. Empty: no.")
    start_timeout_seconds: float = Field(default=60.0, gt=0, description="How long a server may take to start.")
    swap_timeout_seconds: float = Field(default=60.0, gt=0, description="How long a change of model may take.")
    stop_timeout_seconds: float = Field(default=30.0, gt=0, description="After that a server is ended by force.")
    lock_timeout_seconds: float = Field(default=180.0, gt=0, description="How long to wait for another deployment.")

    def _deploy(self, name: str, version: ModelVersion, smoke_test: SmokeTest, log: logging.Logger) -> EndpointStatus:
        folder = self.folder(name)
        with self._locked(name, f"deploying to endpoint {name}"):
            made = not folder.exists()
            private_folder(folder)
            try:
                result = LocalRollout(self, name, version, smoke_test, log).run()
                status = self.describe(name)
                if status is None or status.state != "InService":
                    raise servers.ServerUnreachable(f"the server of endpoint {name} ended after its smoke test")
                return status.model_copy(update={"smoke_test": result})
            except _FAILURES as error:
                reason = f"{error}\nLog of the server ({folder}):\n{servers.log_tail(folder)}"
                raise self._not_deployed(name, version, reason) from error
            finally:
                if made and not (folder / DEPLOYMENT_FILE).exists():
                    shutil.rmtree(folder, ignore_errors=True)

    def describe(self, name: str) -> EndpointStatus | None:
        """See `EndpointHost.describe`. `OutOfService`: the process has ended or does not answer."""
        folder = self.folder(name)
        record = read_deployment(folder)
        if record is None:
            return None
        server = servers.find_server(folder)
        served = servers.ping(server) if server else None
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
            capture_uri=str(folder / CAPTURE_FOLDER) if record.capture else None,
        )

    def invoke(self, name: str, body: bytes, content_type: str, accept: str = "*/*", inference_id: str = "") -> bytes:
        """See `EndpointHost.invoke`."""
        if (server := servers.find_server(self.folder(name))) is None:
            raise self._not_served(name)
        return servers.invoke_server(server, name, body, content_type, accept, inference_id)

    def delete(self, name: str) -> None:
        """See `EndpointHost.delete`."""
        with self._locked(name, f"deleting endpoint {name}"):
            servers.end_server(self.folder(name), self.stop_timeout_seconds)
            discard_folder(self.folder(name))

    def stop(self, name: str) -> bool:
        """End the serving process, keep the endpoint: its next deployment uses the same port. False if none ran."""
        with self._locked(name, f"stopping endpoint {name}"):
            return servers.end_server(self.folder(name), self.stop_timeout_seconds)

    def inventory(self) -> Sequence[OwnedItem]:
        """See `EndpointHost.inventory`; with servers whose state folder is gone."""
        items = [item for name in self._names() if (item := self._item(name)) is not None]
        items += discarded_items(self.root, "endpoint")
        known = {item.name for item in items}
        for name, process in servers.orphan_servers(Path(self._captured)):
            if name in known or not NAME.fullmatch(name):
                continue
            item = OwnedItem(kind="endpoint", name=name, location=str(self.folder(name)), temporary=True)
            started = datetime.fromtimestamp(process.create_time(), UTC)
            detail = f"process {process.pid} serves it, and its folder is gone"
            items.append(item.model_copy(update={"created_at": started, "detail": detail}))
        return items

    def remove(self, item: OwnedItem) -> None:
        """See `EndpointHost.remove`. Ends the serving process."""
        if item.discarded:
            remove_discarded(self.root, item)
            return
        if item.kind != "endpoint" or item.location != str(self.folder(item.name)):
            raise NotOwned(f"{item.location} is no endpoint of this host ({self.root})")
        if not item.temporary:
            self.delete(item.name)
        orphans = servers.orphan_servers(Path(self._captured))
        end_processes([process for name, process in orphans if name == item.name], 10.0)

    def _item(self, name: str) -> OwnedItem | None:
        location = str(self.folder(name))
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
        return sorted(p.name for p in root.iterdir() if NAME.fullmatch(p.name)) if root.is_dir() else []

    def folder(self, name: str) -> Path:
        """The state folder of an endpoint. Raises `ValueError` for what is no name of one."""
        check_name(name, "an endpoint")
        return Path(self.root).absolute() / name

    def _locked(self, name: str, what: str) -> AbstractContextManager[None]:
        folder = self.folder(name)
        return file_lock(folder.with_name(f".{name}.lock"), self.lock_timeout_seconds, what)

    @property
    def _captured(self) -> str:
        return str(Path(self.root).absolute())


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
