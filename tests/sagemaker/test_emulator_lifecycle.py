"""The emulator leaves nothing behind, alone or killed, and falls back to loopback hosts."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sagemaker_emulator import Image, SageMakerEmulator
from tests.sagemaker_emulator.leftovers import LINK_PREFIX, OWNER_VARIABLE, PREFIX, remove_leftovers
from tests.sagemaker_emulator.settings import Isolation
from tests.sagemaker_emulator.testing import Aws
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
DAEMON = """
import os, subprocess, sys, time
subprocess.Popen(["sleep", "300"], start_new_session=True)
print("up", flush=True)
time.sleep(300)
"""


def traces(parent: Path, pid: int) -> dict[str, list[str]]:
    """What an emulator with this pid and state directory has on the machine."""
    links = [p.name for p in Path("/sys/class/net").glob(f"{LINK_PREFIX}{pid:x}[nv]*")]
    processes: list[str] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
            if f"{OWNER_VARIABLE}={PREFIX}{pid}-".encode() in environment and entry.name != str(pid):
                processes.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(parent) in line]
    files = [p.name for p in parent.iterdir()] if parent.exists() else []
    return {"links": links, "processes": processes, "mounts": mounts, "files": files}


NOTHING: dict[str, list[str]] = {"links": [], "processes": [], "mounts": [], "files": []}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """The emulator as a command of its own, on a free port."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.sagemaker_emulator", "--port", "0", "--stop-grace", "2"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process
    process.kill()
    process.wait()


def read_exports(process: "subprocess.Popen[str]") -> dict[str, str]:
    assert process.stdout is not None
    exports: dict[str, str] = {}
    for line in process.stdout:
        if not line.startswith("export "):
            break
        name, _, value = line.removeprefix("export ").strip().partition("=")
        exports[name] = value
    return exports


def start_job(endpoint: str) -> Aws:

    aws = Aws(endpoint)
    aws.train("daemon", DAEMON, 2, wait=False)
    until(lambda: sorted(aws.logs("daemon").values()) == [["up"], ["up"]])
    return aws


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_in_the_middle_leaves_nothing(
    alone: "subprocess.Popen[str]", tmp_path: Path, number: signal.Signals
) -> None:
    opt_ml = sorted(Path("/opt/ml").rglob("*")) if Path("/opt/ml").exists() else None
    exports = read_exports(alone)
    assert exports["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
    start_job(exports["AWS_ENDPOINT_URL"])
    running = traces(tmp_path, alone.pid)
    assert running["files"]
    assert running["processes"]
    begun = time.monotonic()
    alone.send_signal(number)
    assert alone.wait(20) == 0
    assert time.monotonic() - begun < 10
    assert traces(tmp_path, alone.pid) == NOTHING
    assert (sorted(Path("/opt/ml").rglob("*")) if Path("/opt/ml").exists() else None) == opt_ml


def test_what_a_killed_emulator_left_is_removed(alone: "subprocess.Popen[str]", tmp_path: Path) -> None:
    start_job(read_exports(alone)["AWS_ENDPOINT_URL"])
    alone.kill()
    alone.wait()
    assert traces(tmp_path, alone.pid)["files"]
    removed = remove_leftovers(tmp_path)
    assert removed[0].startswith(f"{PREFIX}{alone.pid}-")
    until(lambda: traces(tmp_path, alone.pid) == NOTHING)


def test_a_running_emulator_is_left_alone(emulator: SageMakerEmulator) -> None:
    assert remove_leftovers(emulator.services.state.root.parent) == []
    with urllib.request.urlopen(f"{emulator.endpoint_url}/_emulator/health", timeout=5) as answer:
        assert json.loads(answer.read())["status"] == "ok"


def test_hosts_are_removed_when_a_job_ends(aws: Aws) -> None:
    aws.train("short", DAEMON.replace("time.sleep(300)", ""))
    hosts = aws.emulator.services.state.root / "hosts"
    until(lambda: not list(hosts.glob("training-short-*/*")))


def test_writes_outside_private_places_do_not_reach_the_machine(aws: Aws) -> None:
    if not aws.emulator.services.pool.overlay:
        pytest.skip("this machine has no overlay file system")
    marker = "/var/tmp/emulator-write-test"
    script = f"open({marker!r}, 'w').write('x'); import os; print(os.listdir('/tmp'), os.path.exists({marker!r}))"
    assert aws.train("writes", script)["TrainingJobStatus"] == "Completed"
    assert aws.logs("writes")["algo-1"][0].endswith("True")
    assert not Path(marker).exists()


LOOPBACK = """
import json, os, sys
base = os.environ["SAGEMAKER_BASE_DIR"]
config = json.load(open(base + "/input/config/resourceconfig.json"))
print(json.dumps({"config": config, "address": os.environ["SAGEMAKER_EMULATOR_HOST_ADDRESS"],
                  "hosts": os.environ["SAGEMAKER_EMULATOR_HOSTS"]}))
open(base + "/model/" + config["current_host"], "w").write("x")
"""


def test_loopback_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    image = Image(entrypoint=("sh", "-c", 'exec python3 "$SAGEMAKER_BASE_DIR/input/data/code/job.py"', "job"))
    with SageMakerEmulator(
        isolation="loopback", state_parent=tmp_path, stop_grace=1, images={"loopback": image}
    ) as emulator:
        aws = Aws(emulator.endpoint_url, emulator)

        def run(name: str, script: str, hosts: int) -> None:
            request: dict[str, Any] = aws.training_request(name, script, hosts)
            request["AlgorithmSpecification"] = {"TrainingImage": "loopback", "TrainingInputMode": "File"}
            aws.sagemaker.create_training_job(**request)

        run("loop", LOOPBACK, 2)
        done = aws.await_training("loop")
        assert done["TrainingJobStatus"] == "Completed", done
        assert "loopback hosts" in done["SecondaryStatusTransitions"][0]["StatusMessage"]
        reports = [json.loads(lines[0]) for lines in aws.logs("loop").values()]
        assert len({report["address"] for report in reports}) == 2
        assert reports[0]["config"]["network_interface_name"] == "lo"
        run("daemons", DAEMON, 1)
        until(lambda: aws.logs("daemons"))
        owner = emulator.services.state.owner
        aws.sagemaker.stop_training_job(TrainingJobName="daemons")
        assert aws.await_training("daemons")["TrainingJobStatus"] == "Stopped"
        alive = [p for p in Path("/proc").glob("[0-9]*/environ") if f"{OWNER_VARIABLE}={owner}".encode() in read(p)]
        assert alive == []
    assert list(tmp_path.iterdir()) == []


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_hosts_without_a_copy_on_write_root(tmp_path: Path) -> None:
    if SageMakerEmulator().supported_hosts != "namespaces":
        pytest.skip("this machine allows no namespaces")
    existed = Path("/opt/ml").exists()
    with SageMakerEmulator(copy_on_write=False, state_parent=tmp_path) as emulator:
        aws = Aws(emulator.endpoint_url, emulator)
        script = "import os, socket; print(socket.gethostname(), os.listdir('/opt/ml'), len(os.listdir('/dev/shm')))"
        assert aws.train("plain-root", script, 2)["TrainingJobStatus"] == "Completed"
        assert sorted(line.split()[0] for lines in aws.logs("plain-root").values() for line in lines) == [
            "algo-1",
            "algo-2",
        ]
    assert Path("/opt/ml").exists() == existed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("isolation", ["auto", "loopback"])
def test_stopping_with_an_endpoint_in_service(tmp_path: Path, isolation: Isolation) -> None:
    directory = '"${SAGEMAKER_BASE_DIR:-/opt/ml}/model"'
    server = f'exec python3 -m http.server "${{SAGEMAKER_BIND_TO_PORT:-8080}}" --directory {directory}'
    images = {"web": Image(entrypoint=("sh", "-c", server, "image"))}
    with SageMakerEmulator(images=images, state_parent=tmp_path, isolation=isolation) as emulator:
        aws = Aws(emulator.endpoint_url, emulator)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            archive.addfile(tarfile.TarInfo("ping"))
        url = aws.put("model.tar.gz", buffer.getvalue())
        aws.sagemaker.create_model(ModelName="web", PrimaryContainer={"Image": "web", "ModelDataUrl": url})
        variant = {"VariantName": "All", "ModelName": "web", "InitialInstanceCount": 2, "InstanceType": "ml.m5.large"}
        aws.sagemaker.create_endpoint_config(EndpointConfigName="web", ProductionVariants=[variant])
        aws.sagemaker.create_endpoint(EndpointName="web", EndpointConfigName="web")
        until(lambda: aws.sagemaker.describe_endpoint(EndpointName="web")["EndpointStatus"] == "InService")
        owner = emulator.services.state.owner
        assert any(owner.encode() in read(p) for p in Path("/proc").glob("[0-9]*/environ"))
    assert not any(owner.encode() in read(p) for p in Path("/proc").glob("[0-9]*/environ"))
    assert list(tmp_path.iterdir()) == []
