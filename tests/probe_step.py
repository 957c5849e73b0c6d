"""A step for tests of the machinery around steps. What it does is a parameter."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
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


class ProbeParams(StepParams):
    """`marker`: a file to which a line is added whenever the step really runs."""

    action: Literal["write", "reject", "raise", "kill_driver", "block_in_ray", "nodes"] = "write"
    value: int = 0
    marker: str | None = None


def run(context: StepContext, params: ProbeParams) -> StepOutcome:
    uri = storage.join(context.output_uri("value"), "value.txt")
    storage.write_bytes(uri, str(params.value).encode())
    if params.marker:
        with Path(params.marker).open("a") as file:
            file.write(f"{os.getpid()}\n")
    context.log.info(f"probing {params.action}")
    if params.action == "reject":
        raise StepError("file x.csv is bad: mend it", details={"bad_rows": [{"row": 1}]}, keep={"bad.txt": uri})
    if params.action == "raise":
        raise RuntimeError("a fault of the program")
    if params.action == "kill_driver":
        os.kill(os.getpid(), signal.SIGKILL)
    if params.action == "block_in_ray":
        ray.get(_sleep.remote(120))
    details = {"ray_address": ray.get_runtime_context().gcs_address, "driver": os.getpid()}
    files = [file_info(uri, context.output_uri("value"))]
    return StepOutcome({"value": Artifact.of(context.output_uri("value"), files)}, {"value": params.value}, details)


@ray.remote
def _sleep(seconds: float) -> None:
    time.sleep(seconds)


STEP = StepDefinition(params=ProbeParams, run=run, outputs=("value",))
