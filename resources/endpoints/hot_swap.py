"""Changing the model of a server that goes on serving, and putting the previous one back where that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resources.endpoints.base import DeploymentLog, EndpointDeploymentFailed
from resources.endpoints.server_process import (
    ServerUnreachable,
    end_server,
    find_server,
    ping,
    reload_server,
    start_detached,
    wait_until_serving,
)
from step_scripts.serving.deployment import DEPLOYMENT_FILE, SERVER_FILE, DeploymentRecord, ServerRecord


def hot_swap(folder: Path, server: ServerRecord, record: DeploymentRecord, timeout_seconds: float) -> None:
    """Have the running server load the model of `record` beside the one that it serves, and change to it.

    Raises `ServerUnreachable` if it refuses the model or ends, `TimeoutError` after `timeout_seconds`.
    """
    record.write(folder / DEPLOYMENT_FILE)
    reload_server(server, folder)
    wait_until_serving(folder, timeout_seconds, deployment_id=record.deployment_id)


@contextmanager
def rollback_on_failure(
    folder: Path,
    previous: DeploymentRecord | None,
    server: ServerRecord | None,
    timeout_seconds: float,
    log: DeploymentLog,
) -> Iterator[None]:
    """If the block fails or is interrupted, have the previous deployment served again, if `server` served it before."""
    try:
        yield
    except BaseException:
        if previous is None or server is None:
            end_server(folder, 5.0)
        if previous is None:
            (folder / DEPLOYMENT_FILE).unlink(missing_ok=True)
            raise
        previous.write(folder / DEPLOYMENT_FILE)
        if server is not None:
            log.warning(f"Going back to {previous.version}.")
            try:
                _roll_back(folder, previous, server, timeout_seconds)
            except (ServerUnreachable, TimeoutError) as error:
                served = ping(server)
                if not served or served["deployment_id"] != previous.deployment_id:  # else it has never stopped
                    log.warning(f"{previous.version} could not be put back: {error}")
        raise


def _roll_back(folder: Path, previous: DeploymentRecord, server: ServerRecord, timeout_seconds: float) -> None:
    if find_server(folder) == server:
        hot_swap(folder, server, previous, timeout_seconds)
    else:
        end_server(folder, 5.0)
        start_detached(folder)
        wait_until_serving(folder, timeout_seconds)


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
