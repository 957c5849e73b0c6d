"""A step for tests of the cluster in a job. What it does is a parameter.

Tests and tasks speak to each other through objects below `signals`: tasks write `started/<task>-<host>`, and wait for
`release`.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import Literal

import ray

from step_scripts.runner import storage
from step_scripts.runner.contract import (
    Artifact,
    StepContext,
    StepDefinition,
    StepError,
    StepOutcome,
    StepParams,
    file_info,
)
from step_scripts.runner.processes import on_interruption


class ClusterProbeParams(StepParams):
    """`tasks` tasks are spread over the hosts, each holding a CPU; a lost one is run again `retries` times."""

    action: Literal["spread", "reject", "raise", "kill_driver"] = "spread"
    tasks: int = 0
    retries: int = 3
    signals: str | None = None


def run(context: StepContext, params: ClusterProbeParams) -> StepOutcome:
    uri = storage.join(context.output_uri("value"), "value.txt")
    storage.write_bytes(uri, b"1")
    context.log.info(f"probing {params.action}")
    if params.action == "reject":
        raise StepError("file x.csv is bad: mend it", details={"bad_rows": [{"row": 1}]})
    if params.action == "raise":
        raise RuntimeError("a fault of the program")
    if params.action == "kill_driver":
        os.kill(os.getpid(), signal.SIGKILL)

    def save() -> None:
        storage.write_bytes(storage.join(params.signals or "", "checkpoint"), b"saved")

    with on_interruption(save):
        tasks = [
            _task.options(scheduling_strategy="SPREAD", num_cpus=1, max_retries=params.retries).remote(
                i, params.signals
            )
            for i in range(params.tasks)
        ]
        answers = ray.get(tasks)
    details = {"hosts": [host for host, _ in answers], "addresses": [address for _, address in answers]}
    files = [file_info(uri, context.output_uri("value"))]
    return StepOutcome({"value": Artifact.of(context.output_uri("value"), files)}, details=details)


@ray.remote
def _task(number: int, signals: str | None) -> tuple[str, str]:
    host = socket.gethostname()
    if signals is not None:
        storage.write_bytes(storage.join(signals, "started", f"{number}-{host}"), b"")
        deadline = time.monotonic() + 120
        while not storage.exists(storage.join(signals, "release")):
            if time.monotonic() > deadline:
                raise TimeoutError("no release within 120 s")
            time.sleep(0.2)
    return host, ray.util.get_node_ip_address()


STEP = StepDefinition(params=ClusterProbeParams, run=run, outputs=("value",))
