"""A Dagster process of its own, to be interrupted and killed: `python -m tests.sagemaker.pipes_child` + JSON on stdin.

`{"job_root": …, "params": …, "detach": …}`. Materializes one asset through `PipesSageMakerClient`, in the instance of
`DAGSTER_HOME` if that is set. Exit status 0 if the run succeeded.
"""

import json
import sys
from typing import Any

import dagster as dg

from resources.sagemaker.pipes_client import PipesSageMakerClient
from tests.sagemaker.pipes_jobs import FAST


def asset_on(client: PipesSageMakerClient, params: dict[str, Any], name: str = "tuned") -> dg.AssetsDefinition:
    """An asset that a job materializes."""

    @dg.asset(name=name, owners=["team:ml"])
    def tuned(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
        return client.run(context=context, params=params).get_materialize_result()

    return tuned


def main() -> int:
    """Materialize; returns the exit status."""
    given = json.load(sys.stdin)
    client = PipesSageMakerClient(given["job_root"], polling=FAST, detach=given.get("detach", False))
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([asset_on(client, given["params"])], instance=instance, raise_on_error=False)
    return 0 if result.success else 1


if __name__ == "__main__":
    sys.exit(main())
