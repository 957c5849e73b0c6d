"""Step `tune_model` on `SageMakerCompute`, in a Dagster run of its own, with small splits on S3.

As a program: a Dagster process to be interrupted and killed, with native tuning, and JSON on standard input:
`{"root": …, "inputs": …, "params": …}`. Exit status 0 if the run succeeded.
"""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from resources.compute.sagemaker import SageMakerCompute
from resources.sagemaker.job_requests import JobConfig
from resources.sagemaker.tuning_jobs import NativeTuningConfig
from step_scripts.parameters import TuneModelParams
from step_scripts.runner.contract import Artifact, StepResult
from tests.sagemaker.pipes_jobs import ROLE, SMALL_HOSTS
from tests.split_files import TABLE, sales, write_inputs

if TYPE_CHECKING:
    from tests.sagemaker_emulator.testing import Aws

# So that a host killed with all its processes is given up after seconds.
ENVIRONMENT = {
    **SMALL_HOSTS,
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
NATIVE = NativeTuningConfig(strategy="Random", max_parallel_jobs=2)
TRAIN, VALIDATION = sales(600), sales(200, seed=1)


def inputs_on_s3(aws: "Aws", folder: Path) -> dict[str, Artifact]:
    """The inputs of `tune_model`, below `splits/` in the test's bucket."""
    found = write_inputs(folder, TRAIN, VALIDATION, files=2)
    for name, artifact in found.items():
        for file in artifact.files:
            aws.put(f"splits/{name}/{file.path}", (Path(artifact.uri) / file.path).read_bytes())
    return {name: artifact.model_copy(update={"uri": aws.uri(f"splits/{name}")}) for name, artifact in found.items()}


class TuningRun:
    """One materialization of `tuned` below `root`: its result and log. `meanwhile` runs in a thread beside it."""

    def __init__(
        self,
        root: str,
        inputs: dict[str, Artifact],
        params: dict[str, Any],
        *,
        hosts: int = 1,
        meanwhile: Callable[[], object] | None = None,
        job: dict[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        config = JobConfig(
            **{
                "role_arn": ROLE,
                "instance_count": hosts,
                "max_run_seconds": 600,
                "price_per_hour": 0.2,
                "environment": ENVIRONMENT,
                **(job or {}),
            }
        )
        options: dict[str, Any] = {"image": "housing-image", "poll_seconds": 0.2, "job": config, **changes}
        compute = SageMakerCompute(artifact_root=f"{root}artifacts", job_root=f"{root}jobs", **options)

        @dg.asset
        def tuned(context: dg.AssetExecutionContext, compute: SageMakerCompute) -> dg.MaterializeResult[Any]:
            result = compute.run(context, "tune_model", TuneModelParams(table=TABLE, **params), inputs)
            return dg.MaterializeResult(metadata={"result": json.loads(result.model_dump_json())})

        thread = threading.Thread(target=meanwhile, daemon=True) if meanwhile else None
        if thread is not None:
            thread.start()
        with dg.DagsterInstance.ephemeral() as instance:
            self.run = dg.materialize([tuned], resources={"compute": compute}, instance=instance, raise_on_error=False)
            records = instance.all_logs(self.run.run_id)
            self.log = "\n".join(r.user_message for r in records if not r.is_dagster_event)
        if thread is not None:
            thread.join(10)
        self.success = self.run.success
        self.metadata: dict[str, Any] = {}
        self.error = ""
        if self.success:
            metadata = self.run.asset_materializations_for_node("tuned")[0].metadata
            self.metadata = {
                name: value.records if isinstance(value, dg.TableMetadataValue) else value.value
                for name, value in metadata.items()
            }
            self.result = StepResult.model_validate(self.metadata["result"])
            self.trials: list[dict[str, Any]] = self.result.details["trials"]
        for event in self.run.all_events:
            if event.is_step_failure:
                self.error = str(event.step_failure_data.error_display_string)

    @property
    def secondary_statuses(self) -> list[str]:
        """What the training job went through."""
        return [row.data["status"] for row in self.metadata["status_history"]]


def kept_trials(aws: "Aws", root: str = "") -> list[str]:
    """Keys of the finished trials that are kept for a later attempt, below `root` in the bucket."""
    return [key for key in aws.keys(f"{root}jobs/checkpoints/") if "/trials/" in key and key.endswith(".json")]


def main() -> int:
    """Materialize; returns the exit status."""
    given = json.load(sys.stdin)
    inputs = {name: Artifact.model_validate(artifact) for name, artifact in given["inputs"].items()}
    return 0 if TuningRun(given["root"], inputs, given["params"], native_tuning=NATIVE).success else 1


if __name__ == "__main__":
    sys.exit(main())
