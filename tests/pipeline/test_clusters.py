"""Ray clusters that somebody else has started: tokens, silence, and CPUs that others use."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from step_scripts.runner.contract import StepError
from step_scripts.runner.ray_session import join_cluster
from tests.waiting import until

_START = "from ray.scripts.scripts import main; main()"
_STARTS = 3
ENGINES = ("ray_train", "xgboost_ray")
_JOIN = """
import json, sys
from step_scripts.runner.contract import StepError
from step_scripts.runner.ray_session import RaySession, RaySettings
session = RaySession(RaySettings(address=sys.argv[1], ship_code=False))
try:
    session.ensure()
except StepError as error:
    print(json.dumps(str(error)))
    sys.exit()
import ray
from step_scripts.runner import cluster_resources
from step_scripts.runner.cluster_resources import free_cpus, reserved, waiting_is_told
cluster_resources._MESSAGE_SECONDS = 2.0
class Log:
    texts = []
    def info(self, text): self.texts.append(text)
class Other:
    def ready(self): pass
other = ray.remote(Other).options(num_cpus=1).remote()
ray.get(other.ready.remote())
one = free_cpus("the final fit", 1, Log())
try:
    two = free_cpus("the final fit", 2, Log())
except StepError as error:
    two = str(error)
texts, Log.texts = Log.texts, []
try:
    with waiting_is_told("the final fit", Log()), reserved("the final fit", 2):
        place = None
except StepError as error:
    place = str(error)
ray.kill(other)
after = free_cpus("the final fit", 2, Log())
waiting = Log.texts
with reserved("the final fit", 2) as options:
    done = ray.get(ray.remote(lambda: 7).options(**options).remote())
    left = sum(cluster_resources._unused())
print(json.dumps([one, two, texts, after, place, waiting, done, left, free_cpus("the final fit", 2, Log())]))
"""
# Whatever looks finds two free CPUs, one or both of which another takes before they are asked for.
_WAIT = """
import json, os, sys, time
from pathlib import Path
from step_scripts.runner.contract import StepError
from step_scripts.runner.ray_session import RaySession, RaySettings
RaySession(RaySettings(address=sys.argv[1], ship_code=False)).ensure()
import ray
from step_scripts.runner import cluster_resources
from step_scripts.training import engines, search
from step_scripts.training.boosting import xgboost_parameters
from step_scripts.parameters import TuneModelParams
from tests.split_files import TABLE, sales, splits_of, write_inputs
engines.free_cpus = search.free_cpus = lambda *_: [2]
cluster_resources._MESSAGE_SECONDS = 0.5
search._SECONDS_BETWEEN_MESSAGES = 0.5
splits = splits_of(write_inputs(Path(sys.argv[2]), sales(600), sales(200, seed=1)), sales(600))
class Log:
    def __init__(self, react=None):
        self.texts, self.react, self.last = [], react, 0.0
    def info(self, text):
        self.texts.append(text)
        self.last = time.monotonic()
        if self.react is not None:
            self.react()
            self.react = None
    warning = info
class Other:
    def ready(self): pass
def hold(cpus):
    other = ray.remote(Other).options(num_cpus=cpus).remote()
    ray.get(other.ready.remote())
    return other
def refused(work):
    log = Log()
    try:
        work(log)
    except StepError as error:
        return str(error), sorted(set(log.texts))
def trials(log):
    params = TuneModelParams(table=TABLE, num_trials=1, num_boost_round=40, early_stopping_rounds=10, eta_min=0.1)
    return search.run_search(params, *splits, None, log)
found = {}
other = hold(1)
parameters = xgboost_parameters({"max_depth": 3, "eta": 0.5, "min_child_weight": 1.0, "subsample": 1.0}, seed=7)
fit = engines.FitRequest(*splits, parameters, num_boost_round=40, early_stopping_rounds=10, num_workers=2)
for name in engines.ENGINES:
    found[name] = refused(lambda log: engines.fit(name, fit, log))
ray.kill(other)
other = hold(2)
found["trials"] = refused(trials)
os.environ["HOUSING_RESOURCE_WAIT_SECONDS"] = "150"
released = []
def release():
    released.append(time.monotonic())
    ray.kill(other)
start = time.monotonic()
log = Log(release)
[trial] = trials(log).records
found["trials"] += (released[0] - start, log.last - released[0], trial.seconds)  # the end of a trial is reported
print(json.dumps(found))
"""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, Path]]:
    """Address of a cluster of two CPUs with token authentication, and the file of its token."""
    for attempt in range(_STARTS):
        with contextlib.ExitStack() as afterwards:
            folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))
            afterwards.callback(shutil.rmtree, folder, ignore_errors=True)
            port = _free_port()
            head = _start_head(folder, port)
            afterwards.callback(_end, head)
            if _is_ready(head, folder):
                yield f"127.0.0.1:{port}", folder / "token"
                return
            # On a machine that is busy Ray's own time limit for a node may be too short.
            assert attempt < _STARTS - 1, (folder / "head.log").read_text()


def _start_head(folder: Path, port: int) -> subprocess.Popen[bytes]:
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    command = ["start", "--head", "--block", f"--port={port}", "--num-cpus=2", f"--temp-dir={folder}"]
    quiet = ["--include-dashboard=false", "--disable-usage-stats", f"--ray-client-server-port={_free_port()}"]
    with (folder / "head.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _START, *command, *quiet],
            env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "HOME": str(folder)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _is_ready(head: subprocess.Popen[bytes], folder: Path) -> bool:
    """Whether the head has started; it says so, since its port is open before."""
    log = folder / "head.log"
    until(lambda: head.poll() is not None or "Ray runtime started" in log.read_text())
    return head.poll() is None


def _end(head: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in psutil.Process(head.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    head.kill()
    head.wait()


def _join(address: str, tmp_path: Path, script: str = _JOIN, **environment: str) -> Any:
    """What `script` prints in its last line."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", script, address, str(tmp_path)],
        env=clean | {"HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        timeout=480,  # the slowest takes 60 s on two cores that are free
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_cluster_is_joined_with_its_token_and_its_free_cpus_are_used(
    cluster: tuple[str, Path], tmp_path: Path
) -> None:
    address, token = cluster
    settings = {"HOUSING_RESOURCE_WAIT_SECONDS": "6", "HOUSING_RAY_CONNECT_SECONDS": "150"}
    found = _join(address, tmp_path, RAY_AUTH_TOKEN_PATH=str(token), **settings)
    assert isinstance(found, list), found
    one, two, texts, after, place, waiting, done, left, at_last = found
    assert one == [1]
    assert two == (
        "the final fit needs 2 CPUs of the Ray cluster, 1 of 2 were free within 6 s: end what uses them, or wait "
        "longer by HOUSING_RESOURCE_WAIT_SECONDS"
    )
    assert texts[0].startswith("the final fit needs 2 CPUs of the Ray cluster, 1 of 2 are free; waiting for 0 of")
    assert after == [2]
    # CPUs that were free, and are not any more when they are asked for.
    assert place == (
        "the Ray cluster had no room for the final fit within 6 s: end what uses it, or wait longer by "
        "HOUSING_RESOURCE_WAIT_SECONDS"
    )
    # The end of the other may be noticed late, which is told, too.
    told = [text for text in waiting if not text.startswith("the final fit needs 2 CPUs of the Ray cluster, ")]
    assert set(told) == {"the final fit waits for CPUs of the Ray cluster: 1 of 2 are free"}
    assert (done, left, at_last) == (7, 0, [2])


@pytest.fixture(scope="module")
def waits(cluster: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By who waits: the refusal, messages before it; of trials the seconds of a wait, since then, and of the trial."""
    folder = tmp_path_factory.mktemp("waits")
    return _join(
        cluster[0],
        folder,
        _WAIT,
        RAY_AUTH_TOKEN_PATH=str(cluster[1]),
        HOUSING_RESOURCE_WAIT_SECONDS="3",
        HOUSING_RAY_CONNECT_SECONDS="150",
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fit_on_several_workers_tells_that_it_waits_and_gives_up_in_time(
    waits: dict[str, list[Any]], engine: str
) -> None:
    refusal, messages = waits[engine]
    assert refusal == (
        "the Ray cluster had no room for the final fit within 3 s: end what uses it, or wait longer by "
        "HOUSING_RESOURCE_WAIT_SECONDS"
    )
    assert "the final fit waits for CPUs of the Ray cluster: 1 of 2 are free" in messages


def test_trials_tell_that_they_wait_give_up_in_time_and_their_time_begins_afterwards(
    waits: dict[str, list[Any]],
) -> None:
    refusal, messages, waited, since, seconds = waits["trials"]
    assert refusal == (
        "the Ray cluster had no room for the trials of the search within 3 s: end what uses it, or wait longer by "
        "HOUSING_RESOURCE_WAIT_SECONDS"
    )
    assert "the search waits for CPUs of the Ray cluster, at most 3 s" in messages
    assert waited >= 0.5
    assert seconds <= since


def test_a_cluster_that_wants_a_token_says_so(cluster: tuple[str, Path], tmp_path: Path) -> None:
    found = _join(cluster[0], tmp_path, HOUSING_RAY_CONNECT_SECONDS="40")
    assert isinstance(found, str), found
    assert f"the Ray cluster at {cluster[0]} (RAY_ADDRESS) cannot be joined" in found
    assert "RAY_AUTH_TOKEN_PATH" in found


def test_what_listens_and_says_nothing_is_left(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        found = _join(address, tmp_path, HOUSING_RAY_CONNECT_SECONDS="2")
    assert isinstance(found, str), found
    assert f"the Ray cluster at {address} (RAY_ADDRESS) does not answer within 2 s" in found


def test_a_dead_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOUSING_RAY_CONNECT_SECONDS", "1")
    address = f"127.0.0.1:{_free_port()}"
    start = time.monotonic()
    with pytest.raises(StepError, match=rf"no Ray cluster answers at {address} \(RAY_ADDRESS\) within 1 s: .*refused"):
        join_cluster(address)
    assert time.monotonic() - start < 30
