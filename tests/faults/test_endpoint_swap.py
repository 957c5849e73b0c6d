"""What can go wrong while an endpoint changes its model, and that clients do not notice."""

from __future__ import annotations

import http.client
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from resources.endpoints.base import EndpointDeploymentFailed, EndpointStatus
from resources.endpoints.local import LocalEndpointHost
from resources.endpoints.server_process import find_server, ping
from resources.model_registry.base import ModelVersion
from resources.model_registry.local import LocalModelRegistry
from step_scripts.runner.contract import Artifact
from step_scripts.serving.deployment import DEPLOYMENT_FILE, LOG_FILE, DeploymentRecord
from tests.serving_models import registered, request, small_model, smoke_test
from tests.waiting import until

ROOT = Path(__file__).parents[2]
LOG = logging.getLogger("test")
ROW = b"1990,2000.5,3,2.5,0.5,2,1,0"
CLIENTS = 6
MOST_REQUESTS = 20_000  # of one client


class Stage:
    """A registry, a host, and an endpoint that serves version 1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = LocalModelRegistry(root=str(folder / "registry"))
        self.host = LocalEndpointHost(root=str(folder / "endpoints"))
        self.first = self.model(100)
        self.status = self.deploy(*self.first)
        self.port = int(self.status.url.split(":")[2].split("/")[0])

    def model(self, factor: float) -> tuple[Artifact, ModelVersion]:
        artifact = small_model(self.folder / f"model-{factor}", factor=factor)
        return artifact, registered(self.registry, artifact)

    def deploy(self, artifact: Artifact, version: ModelVersion, *, offset: float = 0.0) -> EndpointStatus:
        return self.host.deploy("housing", version, smoke_test(artifact, offset=offset), LOG)

    def price(self) -> float:
        status, _, body = request(self.port, "/invocations", ROW, Content_Type="text/csv")
        assert status == 200
        return float(body)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """An endpoint of the test's own."""
    made = Stage(tmp_path)
    yield made
    made.host.delete("housing")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """An endpoint for the tests after which it serves what it served before."""
    made = Stage(tmp_path_factory.mktemp("kept"))
    yield made
    made.host.delete("housing")


def hammer(port: int, stop: threading.Event) -> list[tuple[int, bytes, str]]:
    """Status, body and version of requests over one connection, which must not break, until `stop`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.auto_open = 0
    connection.connect()
    answers = []
    while not stop.is_set() and len(answers) < MOST_REQUESTS:
        connection.request("POST", "/invocations", ROW, {"Content-Type": "text/csv"})
        response = connection.getresponse()
        answers.append((response.status, response.read(), response.headers["x-amzn-invoked-production-variant"]))
        time.sleep(0.002)
    connection.close()
    return answers


def test_no_request_fails_while_the_model_changes(stage: Stage) -> None:
    old = stage.price()
    stop = threading.Event()
    with ThreadPoolExecutor(CLIENTS) as clients:
        running = [clients.submit(hammer, stage.port, stop) for _ in range(CLIENTS)]
        try:
            second = stage.deploy(*stage.model(200))
            third = stage.deploy(*stage.model(300))
            time.sleep(0.3)
        finally:
            stop.set()
        answers = [client.result(60) for client in running]
    assert (second.version, third.version, third.pid) == ("housing/2", "housing/3", stage.status.pid)
    new = stage.price()
    for sequence in answers:
        assert {status for status, _, _ in sequence} == {200}
        versions = [version for _, _, version in sequence]
        assert versions == sorted(versions)
        assert set(versions) == {"housing/1", "housing/2", "housing/3"}
        prices = {version: {body for _, body, served in sequence if served == version} for version in set(versions)}
        assert {float(body) for body in prices["housing/1"]} == {old}
        assert {float(body) for body in prices["housing/3"]} == {new}
    assert old != new
    files = sorted(p.name for p in (Path(stage.host.root) / "housing").iterdir())
    assert files == ["deployment.json", "server.json", "server.lock", "server.log", "start.log"]


def test_wrong_predictions_keep_the_old_version_serving(kept: Stage) -> None:
    old = kept.price()
    reason = r"was not deployed .* housing/1 keeps serving\. smoke test: 12 of 12 predictions differ"
    with pytest.raises(EndpointDeploymentFailed, match=reason):
        kept.deploy(*kept.model(200), offset=1000)
    status = kept.host.describe("housing")
    assert status is not None
    assert (status.version, status.pid) == ("housing/1", kept.status.pid)
    assert kept.price() == old


def test_a_damaged_model_keeps_the_old_version_serving(kept: Stage) -> None:
    old = kept.price()
    artifact, version = kept.model(300)
    path = Path(version.artifact.file_uri("model.ubj"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        EndpointDeploymentFailed, match=rf"housing/1 keeps serving\. {path} has .* bytes, recorded were"
    ):
        kept.deploy(artifact, version)
    assert kept.price() == old


def test_a_server_that_refuses_a_model_says_why_and_keeps_the_old(kept: Stage) -> None:
    old = kept.price()
    _, version = kept.model(400)
    Path(version.artifact.file_uri("scaler.json")).write_text("{}")
    folder = Path(kept.host.root) / "housing"
    record = DeploymentRecord.read(folder / DEPLOYMENT_FILE)
    changes = {"deployment_id": "x", "version": version.reference, "model": version.artifact}
    assert kept.status.pid is not None
    try:
        record.model_copy(update=changes).write(folder / DEPLOYMENT_FILE)
        os.kill(kept.status.pid, signal.SIGHUP)
        assert "scaler.json has 2 bytes, recorded were" in _wait_for_refusal(folder, "x")
        assert kept.price() == old
        (folder / DEPLOYMENT_FILE).write_text("{")
        os.kill(kept.status.pid, signal.SIGHUP)
        _wait_for_log(folder, "the deployment file cannot be read, housing/1 keeps serving")
        assert kept.price() == old
    finally:
        record.write(folder / DEPLOYMENT_FILE)
    assert f"{version.reference} was not deployed, housing/1 keeps serving" in (folder / LOG_FILE).read_text()


class AfterTrial(logging.Logger):
    """Does something between the proof of the new version and the change to it."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__("after trial")
        self.act = act
        self.acted = False

    def info(self, msg: object, *args: object, **_: object) -> None:
        if str(msg).startswith("Smoke test of"):
            self.acted = True
            self.act()


@pytest.mark.parametrize("fault", ["damaged", "mispredicts", "killed"])
def test_a_failure_after_the_proof_goes_back(kept: Stage, fault: str) -> None:
    old = kept.price()
    artifact, version = kept.model({"damaged": 500, "mispredicts": 600, "killed": 700}[fault])
    test = smoke_test(artifact)
    pid = kept.host.list()[0].pid
    assert pid is not None

    def act() -> None:
        if fault == "damaged":
            Path(version.artifact.file_uri("scaler.json")).write_text("{}")
        elif fault == "mispredicts":
            vars(test)["expected"] = tuple(value + 1e6 for value in test.expected)
        else:
            os.kill(pid, signal.SIGKILL)

    log = AfterTrial(act)
    reason = {
        "damaged": "the server refused the model: .*scaler.json has 2 bytes",
        "mispredicts": "smoke test: 12 of 12 predictions differ",
        "killed": "has ended|ended while it changed",
    }[fault]
    with pytest.raises(EndpointDeploymentFailed, match=rf"housing/1 keeps serving\. .*({reason})"):
        kept.host.deploy("housing", version, test, log)
    assert log.acted
    assert kept.price() == old
    status = kept.host.describe("housing")
    assert status is not None
    assert (status.version, status.previous_version) == ("housing/1", None)
    assert (status.pid == pid) == (fault != "killed")


def test_a_killed_server_is_started_again_by_the_next_deployment(stage: Stage) -> None:
    assert stage.status.pid is not None
    os.kill(stage.status.pid, signal.SIGKILL)
    dead = _wait_for_end(stage)
    assert (dead.version, dead.state) == ("housing/1", "OutOfService")
    again = stage.deploy(*stage.first)
    assert again.pid not in (None, stage.status.pid)
    assert again.url == stage.status.url
    assert again.previous_version is None


def test_a_stopped_server_is_replaced(stage: Stage) -> None:
    """A process that exists and does not answer."""
    assert stage.status.pid is not None
    os.kill(stage.status.pid, signal.SIGSTOP)
    host = LocalEndpointHost(root=stage.host.root, stop_timeout_seconds=0.5)
    artifact, version = stage.model(200)
    status = host.deploy("housing", version, smoke_test(artifact), LOG)
    assert (status.version, status.url) == ("housing/2", stage.status.url)
    assert status.pid != stage.status.pid
    assert not _alive(stage.status.pid)


DEPLOY = """
import sys
from tests.faults.test_endpoint_swap import LOG
from tests.serving_models import smoke_test
from resources.endpoints.local import LocalEndpointHost
from resources.model_registry.local import LocalModelRegistry
from step_scripts.runner.contract import Artifact
version = LocalModelRegistry(root=sys.argv[1]).get("housing", int(sys.argv[3]))
status = LocalEndpointHost(root=sys.argv[2]).deploy("housing", version, smoke_test(version.artifact), LOG)
print(status.pid, status.version)
"""


def deploying(stage: Stage, version: ModelVersion) -> subprocess.Popen[str]:
    arguments = [stage.registry.root, stage.host.root, str(version.version)]
    return subprocess.Popen(
        [sys.executable, "-c", DEPLOY, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def test_two_deployments_at_once_follow_each_other(stage: Stage) -> None:
    versions = [stage.model(200)[1], stage.model(300)[1]]
    outputs = [process.communicate(timeout=90)[0].split() for process in [deploying(stage, v) for v in versions]]
    assert sorted(outputs) == [[str(stage.status.pid), "housing/2"], [str(stage.status.pid), "housing/3"]]
    status = stage.host.describe("housing")
    assert status is not None
    assert {status.version, status.previous_version} == {"housing/2", "housing/3"}


def test_a_killed_deployment_leaves_no_trial_server(stage: Stage) -> None:
    old = stage.price()
    artifact, version = stage.model(200)
    process = deploying(stage, version)
    trials = _wait_for_trial(stage)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not any(_alive(pid) for pid in trials))
    assert stage.price() == old
    assert stage.deploy(artifact, version).version == "housing/2"
    assert list((Path(stage.host.root) / "housing").glob(".candidate-*")) == []


def _wait_for_refusal(folder: Path, deployment_id: str) -> str:
    def refused() -> str | None:
        server = find_server(folder)
        assert server is not None
        refused = (ping(server) or {}).get("refused", {})
        return refused["error"] if refused.get("deployment_id") == deployment_id else None

    return until(refused)


def _wait_for_log(folder: Path, text: str) -> None:
    until(lambda: text in (folder / LOG_FILE).read_text(), log=folder / LOG_FILE)


def _wait_for_end(stage: Stage) -> EndpointStatus:
    return until(lambda: (status := stage.host.describe("housing")) and status.pid is None and status)


def _wait_for_trial(stage: Stage) -> list[int]:
    def trials() -> list[int]:
        lines = [(p.pid, " ".join(p.info["cmdline"] or [])) for p in psutil.process_iter(["cmdline"])]
        return [pid for pid, line in lines if ".candidate-" in line and stage.host.root in line]

    return until(trials)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
