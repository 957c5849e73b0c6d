"""Waiting for a server to change its model, and putting the previous one back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resources.endpoints.base import DeploymentLog, EndpointDeploymentFailed
from resources.endpoints.server_process import (
    ServerUnreachable,
    ask_to_reload,
    end_server,
    find_server,
    ping,
    start_detached,
    wait_until_serving,
)
from step_scripts.serving.deployment import (
    DEPLOYMENT_FILE,
    RELOAD_FILE,
    SERVER_FILE,
    DeploymentRecord,
    ReloadRecord,
    ServerRecord,
)


@contextmanager
def restored_on_failure(
    folder: Path,
    previous: DeploymentRecord | None,
    server: ServerRecord | None,
    timeout_seconds: float,
    log: DeploymentLog,
) -> Iterator[None]:
    """If the block fails or is interrupted, have the previous deployment served again, if it was before."""
    try:
        yield
    except BaseException:
        if previous is None:
            end_server(folder, 5.0)
            (folder / DEPLOYMENT_FILE).unlink(missing_ok=True)
            raise
        previous.write(folder / DEPLOYMENT_FILE)
        if server is not None:
            _serve_again(folder, previous, server, timeout_seconds, log)
        else:
            end_server(folder, 5.0)
        raise


def _serve_again(
    folder: Path, previous: DeploymentRecord, server: ServerRecord, timeout_seconds: float, log: DeploymentLog
) -> None:
    log.warning(f"Going back to {previous.version}.")
    try:
        if find_server(folder) == server:
            ask_to_reload(server, folder)
            wait_for_change(folder, server, previous, timeout_seconds)
        else:
            end_server(folder, 5.0)
            start_detached(folder)
            wait_until_serving(folder, timeout_seconds)
    except (ServerUnreachable, TimeoutError) as error:
        served = ping(server)
        if not served or served["deployment_id"] != previous.deployment_id:  # else it had never stopped serving it
            log.warning(f"{previous.version} could not be put back: {error}")


def wait_for_change(folder: Path, server: ServerRecord, record: DeploymentRecord, timeout_seconds: float) -> None:
    """Wait until the server serves `record`.

    Raises `ServerUnreachable` if it refuses the model or ends, `TimeoutError` after `timeout_seconds`.
    """
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        served = ping(server)
        if served and served["deployment_id"] == record.deployment_id:
            return
        if find_server(folder) != server:
            raise ServerUnreachable("the server ended while it changed to the new model")
        outcome = _read_reload(folder)
        if outcome and outcome.deployment_id == record.deployment_id and outcome.error:
            raise ServerUnreachable(f"the server refused the model: {outcome.error}")
        time.sleep(0.02)
    raise TimeoutError(f"the server did not change to {record.version} within {timeout_seconds:g} s")


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


def _read_reload(folder: Path) -> ReloadRecord | None:
    try:
        return ReloadRecord.read(folder / RELOAD_FILE)
    except FileNotFoundError:
        return None
