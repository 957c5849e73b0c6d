"""A job whose hosts run `step_scripts.cluster`, started host by host, so that each one's exit can be looked at."""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from step_scripts.runner.contract import StepRequest, StepResult
from tests.sagemaker_emulator.cluster import plan_hosts, resource_config
from tests.sagemaker_emulator.hosts import Host
from tests.sagemaker_emulator.settings import Image
from tests.waiting import until

if TYPE_CHECKING:
    from tests.sagemaker_emulator.testing import Aws

PROJECT = Path(__file__).resolve().parents[2]
_numbers = itertools.count(1)
# As an image's start script does it: bash stays, passes SIGTERM on, and here lists what was left running.
_START = """
python3 -m step_scripts.cluster & child=$!
trap 'kill -TERM $child' TERM
wait $child; code=$?
while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
for process in /proc/[0-9]*; do
  number=${process#/proc/}
  if [ $number != 1 ] && [ $number != $$ ]; then echo "LEFT RUNNING: $(tr '\\0' ' ' < $process/cmdline)"; fi
done
exit $code
"""


class RayJob:
    """Hosts `algo-1` … `algo-<hosts>` with a request of `tests.cluster_probe_step`.

    The parameter `signals` gets the job's own folder, whatever its value.
    """

    def __init__(
        self,
        aws: Aws,
        hosts: int,
        *,
        kind: str = "training",
        environment: dict[str, str] | None = None,
        limits: Mapping[str, float] | None = None,
        **params: Any,
    ) -> None:
        self.aws = aws
        self.names = [f"algo-{number + 1}" for number in range(hosts)]
        self._prefix = f"jobs/{uuid.uuid4().hex[:8]}"
        self.uri = aws.uri(self._prefix)
        if "signals" in params:
            params["signals"] = f"{self.uri}/signals"
        self.request = StepRequest(
            step="tests.cluster_probe_step", params=params, output_root=aws.uri("out"), code_version=self._prefix
        )
        aws.put(f"{self._prefix}/request.json", self.request.model_dump_json())
        aws.put(f"{self._prefix}/ray_token", secrets.token_hex(32))
        wanted = {"join_seconds": 150, "stop_seconds": 5, "poll_seconds": 0.5, **(limits or {})}
        self._environment = {
            "HOUSING_JOB_URI": self.uri,
            "HOUSING_ATTEMPT": "attempt-1",
            "HOUSING_NODE_CPUS": "1",
            "HOUSING_OBJECT_STORE_BYTES": str(80 << 20),
            "PYTHONPATH": str(PROJECT),
            # So that a host killed with all its processes is given up after seconds.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "4",
            **{f"HOUSING_CLUSTER_{name.upper()}": f"{value}" for name, value in wanted.items()},
            **(environment or {}),
        }
        self.output: dict[str, list[str]] = {name: [] for name in self.names}
        self.hosts: dict[str, Host] = {}
        services = aws.emulator.services
        group = f"ray-{next(_numbers)}"
        plans = plan_hosts([("homogeneousCluster", "ml.m5.xlarge", hosts)])
        place = "input/config" if kind == "training" else "config"
        for plan in plans:
            host = services.pool.create(group, plan.name)
            config = host.ml / place / "resourceconfig.json"
            config.parent.mkdir(parents=True)
            config.write_text(json.dumps(resource_config(plans, plan, "eth0")))
            self.hosts[plan.name] = host
        for host in self.hosts.values():
            host.set_names({name: other.address for name, other in self.hosts.items()})

    def __enter__(self) -> RayJob:
        return self

    def __exit__(self, *_: object) -> None:
        for name, lines in self.output.items():
            print(f"--- {name}: exit status {self.hosts[name].exit_code}", *lines, sep="\n")
        for host in self.hosts.values():
            host.close()

    def key(self, name: str) -> str:
        """S3 key of a file in the job's folder."""
        return f"{self._prefix}/{name}"

    def get(self, name: str) -> bytes:
        """Content of a file in the job's folder."""
        return self.aws.get(self.key(name))

    def put(self, name: str, body: str | bytes) -> str:
        """Write a file into the job's folder."""
        return self.aws.put(self.key(name), body)

    def keys(self, prefix: str) -> list[str]:
        """Files in the job's folder whose path starts with `prefix`, without it."""
        start = self.key(prefix)
        return sorted(key.removeprefix(start) for key in self.aws.keys(start))

    def release(self) -> None:
        """Let the tasks end."""
        self.put("signals/release", b"")

    def start(self, *names: str, **environment: str) -> None:
        """Start the program on hosts, all by default."""
        services = self.aws.emulator.services
        for name in names or self.names:
            variables = services.environment(
                Image(), "us-east-1", None, self.hosts[name], {**self._environment, **environment}
            )
            self.hosts[name].start(["bash", "-c", _START], variables, str(PROJECT), self.output[name].append)

    def await_output(self, name: str, text: str) -> None:
        """Wait until a host has printed `text`."""
        until(lambda: any(text in line for line in self.output[name]))

    def await_tasks(self, number: int) -> list[str]:
        """Wait until so many tasks run at once; returns the hosts on which."""
        until(lambda: len(self.keys("signals/started/")) >= number)
        return [key.partition("-")[2] for key in self.keys("signals/started/")]

    def statuses(self, timeout: float = 240) -> dict[str, int | None]:
        """Wait for the end of all hosts that were started; their exit statuses. Nothing may be left on any."""
        deadline = time.monotonic() + timeout
        for name, host in self.hosts.items():
            assert host.wait(max(0.1, deadline - time.monotonic())), f"{name} still runs after {timeout} s"
        for name, host in self.hosts.items():
            if not host.killed:
                assert not [line for line in self.output[name] if "LEFT RUNNING" in line]
                assert not list((host.directory / "tmp").glob("ray-*")), "the host's own folder was not removed"
        return {name: host.exit_code for name, host in self.hosts.items() if host.started}

    def failure(self, name: str, file: str = "failure") -> str | None:
        """What the host left in SageMaker's failure file."""
        path = self.hosts[name].ml / "output" / file
        return path.read_text() if path.exists() else None

    def result(self) -> StepResult | None:
        """The manifest, if there is one."""
        key = self.request.manifest_uri.removeprefix(self.aws.uri())
        return StepResult.model_validate_json(self.aws.get(key)) if key in self.aws.keys(key) else None

    def outputs(self) -> list[str]:
        """Keys of the files below the request's output folder."""
        keys = self.aws.keys(self.request.output_uri.removeprefix(self.aws.uri()))
        return [key for key in keys if not key.endswith("/")]  # Arrow marks folders that it has emptied

    def processes(self, host: str, name: str) -> list[psutil.Process]:
        """The processes on a host whose command has `name`."""
        started = self.hosts[host]._process
        assert started is not None
        found = []
        for process in psutil.Process(started.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found
