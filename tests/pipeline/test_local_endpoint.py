"""The local endpoint host: real processes, real HTTP."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from resources.endpoints.base import (
    EndpointDeploymentFailed,
    EndpointNotFound,
    InvocationFailed,
    SmokeTest,
    SmokeTestFailed,
    VersionNotApproved,
)
from resources.endpoints.local import LocalEndpointHost, main
from resources.endpoints.server_process import find_server, ping
from resources.model_registry.base import ModelVersion
from resources.model_registry.local import LocalModelRegistry
from step_scripts.model import load_model
from step_scripts.runner.contract import Artifact
from step_scripts.runner.local_files import file_lock
from step_scripts.serving.deployment import DEPLOYMENT_FILE, SERVER_FILE, ServerRecord
from tests.serving_models import house_rows, registered, small_model, smoke_test

ROOT = Path(__file__).parents[2]
LOG = logging.getLogger("test")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LocalEndpointHost]:
    made = LocalEndpointHost(root=str(tmp_path / "endpoints"))
    yield made
    for status in made.list():
        made.delete(status.name)


@pytest.fixture
def registry(tmp_path: Path) -> LocalModelRegistry:
    return LocalModelRegistry(root=str(tmp_path / "registry"))


def approved(registry: LocalModelRegistry, folder: Path, factor: float) -> tuple[Artifact, ModelVersion]:
    artifact = small_model(folder, factor=factor)
    return artifact, registered(registry, artifact)


def test_the_life_of_an_endpoint(
    host: LocalEndpointHost, registry: LocalModelRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert host.describe("housing") is None
    assert host.list() == []
    with pytest.raises(EndpointNotFound, match="housing is not served; served are: none"):
        host.invoke("housing", b"", "text/csv")

    first, version = approved(registry, tmp_path / "1", 100)
    status = host.deploy("housing", version, smoke_test(first), LOG)
    assert (status.state, status.version, status.previous_version) == ("InService", "housing/1", None)
    assert status.smoke_test is not None
    assert status.smoke_test.rows == 12
    assert 0 < status.smoke_test.latency["median_milliseconds"] <= status.smoke_test.latency["slowest_milliseconds"]
    assert status.smoke_test.largest_difference == 0
    assert host.list() == [host.describe("housing")]

    process = psutil.Process(status.pid)
    assert psutil.Process() not in process.parents()
    assert process.cwd() == "/"

    rows = house_rows(3)
    answer = host.invoke("housing", rows.write_csv().encode(), "text/csv", "application/json")
    assert json.loads(answer) == {"predictions": load_model(first.uri).predict(rows).tolist()}
    with pytest.raises(InvocationFailed, match=r"answered 400: .*1 field, expected 8") as caught:
        host.invoke("housing", b"1", "text/csv")
    assert caught.value.status == 400

    again = host.deploy("housing", version, smoke_test(first), LOG)
    assert (again.pid, again.deployed_at) == (status.pid, status.deployed_at)
    assert "serves housing/1 already" in caplog.text

    second, version = approved(registry, tmp_path / "2", 200)
    status = host.deploy("housing", version, smoke_test(second), LOG)
    assert (status.version, status.previous_version) == ("housing/2", "housing/1")
    assert (status.pid, status.url) == (again.pid, again.url)
    assert json.loads(host.invoke("housing", rows.write_csv().encode(), "text/csv", "application/json")) == {
        "predictions": load_model(second.uri).predict(rows).tolist()
    }

    assert host.stop("housing")
    assert not host.stop("housing")
    stopped = host.describe("housing")
    assert stopped is not None
    assert (stopped.state, stopped.url, stopped.pid) == ("OutOfService", status.url, None)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE  # an init that does not reap
    started = host.deploy("housing", version, smoke_test(second), LOG)
    assert (started.url, started.previous_version) == (status.url, "housing/1")

    host.delete("housing")
    host.delete("housing")
    assert host.describe("housing") is None
    assert [p.name for p in Path(host.root).iterdir()] == [".housing.lock"]


def test_only_approved_versions_are_deployed(
    host: LocalEndpointHost, registry: LocalModelRegistry, tmp_path: Path
) -> None:
    artifact = small_model(tmp_path / "model")
    version = registered(registry, artifact, approved=False)
    with pytest.raises(VersionNotApproved, match=r"housing/1 is PendingManualApproval .*set_status\('housing', 1, "):
        host.deploy("housing", version, smoke_test(artifact), LOG)
    rejected = registry.set_status("housing", 1, "Rejected", who="ann", why="biased")
    with pytest.raises(VersionNotApproved, match=r"housing/1 is Rejected \(ann: biased\)"):
        host.deploy("housing", rejected, smoke_test(artifact), LOG)
    assert not Path(host.root).exists()


def test_a_first_deployment_that_fails_leaves_nothing(
    host: LocalEndpointHost, registry: LocalModelRegistry, tmp_path: Path
) -> None:
    artifact, version = approved(registry, tmp_path / "model", 100)
    with pytest.raises(EndpointDeploymentFailed, match=r"housing/1 was not .*; nothing is served\. smoke test: 12 "):
        host.deploy("housing", version, smoke_test(artifact, offset=5), LOG)
    assert host.list() == []
    assert [p.name for p in Path(host.root).iterdir()] == [".housing.lock"]
    assert _servers(host) == []


def test_a_configured_port_in_use_is_named(registry: LocalModelRegistry, tmp_path: Path) -> None:
    artifact, version = approved(registry, tmp_path / "model", 100)
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", 0))
        foreign.listen()
        port = foreign.getsockname()[1]
        host = LocalEndpointHost(root=str(tmp_path / "endpoints"), port=port)
        with pytest.raises(EndpointDeploymentFailed, match=f"cannot be served on port {port}, which is configured"):
            host.deploy("housing", version, smoke_test(artifact), LOG)
    assert host.list() == []
    try:
        status = host.deploy("housing", version, smoke_test(artifact), LOG)
        assert status.url == f"http://127.0.0.1:{port}/endpoints/housing/invocations"
    finally:
        host.delete("housing")


def test_another_configured_port_moves_the_endpoint(
    host: LocalEndpointHost, registry: LocalModelRegistry, tmp_path: Path
) -> None:
    artifact, version = approved(registry, tmp_path / "model", 100)
    before = host.deploy("housing", version, smoke_test(artifact), LOG)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    moved = LocalEndpointHost(root=host.root, port=port).deploy("housing", version, smoke_test(artifact), LOG)
    assert moved.url != before.url
    assert f":{port}/" in moved.url
    assert _servers(host) == [moved.pid]


def test_two_endpoints_of_one_host(host: LocalEndpointHost, registry: LocalModelRegistry, tmp_path: Path) -> None:
    artifact, version = approved(registry, tmp_path / "model", 100)
    one, two = (host.deploy(name, version, smoke_test(artifact), LOG) for name in ("one", "two"))
    assert one.url != two.url
    host.delete("one")
    assert [status.name for status in host.list()] == ["two"]


def test_the_command_line_stops_all(
    host: LocalEndpointHost, registry: LocalModelRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, version = approved(registry, tmp_path / "model", 100)
    status = host.deploy("housing", version, smoke_test(artifact), LOG)
    main(["status", "--root", host.root])
    assert capsys.readouterr().out == f"housing: InService, housing/1, {status.url}, process {status.pid}\n"
    line = [sys.executable, "-m", "resources.endpoints.local", "stop", "--root", host.root]
    stopping = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True)
    assert (stopping.stdout, stopping.stderr) == ("housing: stopped\n", "")
    assert _servers(host) == []
    main(["stop", "--root", host.root])
    host.delete("housing")
    main(["status", "--root", host.root])
    assert capsys.readouterr().out == f"housing: was not running\nno endpoints in {host.root}\n"


def test_a_foreign_process_is_never_signalled(host: LocalEndpointHost, tmp_path: Path) -> None:
    """The recorded pid now belongs to somebody else."""
    foreign = subprocess.Popen(["sleep", "60"])
    try:
        folder = Path(host.root) / "housing"
        folder.mkdir(parents=True)
        created = psutil.Process(foreign.pid).create_time()
        _server_record(foreign.pid, created - 10).write(folder / SERVER_FILE)
        assert find_server(folder) is None
        assert not host.stop("housing")
        host.delete("housing")
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


def test_a_deployment_in_progress_has_a_deadline(registry: LocalModelRegistry, tmp_path: Path) -> None:
    artifact, version = approved(registry, tmp_path / "model", 100)
    host = LocalEndpointHost(root=str(tmp_path / "endpoints"), lock_timeout_seconds=0.1)
    with (
        file_lock(tmp_path / "endpoints" / ".housing.lock", 1, "test"),
        pytest.raises(TimeoutError, match="deploying to endpoint housing: another process has held"),
    ):
        host.deploy("housing", version, smoke_test(artifact), LOG)


def test_an_unreadable_deployment_is_named(host: LocalEndpointHost, tmp_path: Path) -> None:
    path = Path(host.root) / "housing" / DEPLOYMENT_FILE
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(EndpointDeploymentFailed, match=f"{path} cannot be read"):
        host.describe("housing")
    host.delete("housing")


@pytest.mark.parametrize("name", ["", "../x", "a b", "-a", "a" * 64])
def test_names_are_checked(host: LocalEndpointHost, name: str) -> None:
    with pytest.raises(ValueError, match="is no name of an endpoint"):
        host.describe(name)


def test_smoke_test_rules() -> None:
    test = SmokeTest(rows=("1", "2"), expected=(1e6, 2.0))
    asked: list[str] = []

    def invoke(body: bytes) -> bytes:
        asked.append(body.decode())
        return {b"1\n2": b"1000000.5\n2.0\n", b"1": b"1000000\n", b"2": b"2.0000005\n"}[body]

    result = test.run(invoke)
    assert asked == ["1\n2", "1", "2"]
    assert result.largest_difference == pytest.approx(5e-7)
    with pytest.raises(SmokeTestFailed, match=r"2 of 2 predictions differ .* 0\.0 instead of 1000000\.0 for 1"):
        test.run(lambda _: b"0.0\nnan\n")
    with pytest.raises(SmokeTestFailed, match="1 prediction for 2 rows"):
        test.run(lambda _: b"1.0\n")
    with pytest.raises(ValueError, match="2 expected predictions for 4 rows"):
        SmokeTest(rows=("1", "2", "3", "4"), expected=(1, 2))


def _servers(host: LocalEndpointHost) -> list[int]:
    """Processes that serve anything below the host's root."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = process.info["cmdline"] or []
        if "step_scripts.serve_model" in line and any(host.root in word for word in line):
            found.append(process.info["pid"])
    return found


def test_ping_of_a_port_that_nobody_serves() -> None:
    assert ping(_server_record(1, 0)) is None


def _server_record(pid: int, create_time: float) -> ServerRecord:
    now = datetime.now(UTC)
    return ServerRecord(pid=pid, create_time=create_time, host="127.0.0.1", port=1, started_at=now)
