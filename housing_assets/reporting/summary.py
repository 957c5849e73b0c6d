"""Prints what the latest run made, or why it failed: `python -m housing_assets.reporting.summary`, the end of `make
run`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from housing_assets.checks.gate import REMEDIES
from housing_assets.reporting.console import failure_reason
from housing_assets.settings import Settings
from resources.endpoints.base import EndpointStatus
from resources.model_registry.base import ModelVersion
from resources.references.files import event_log_name, latest_file, read_reference
from resources.references.types import EvaluationRef, ModelRef
from step_scripts.runner import storage
from step_scripts.runner.wording import number, percent


def summary(root: Path, instance: dg.DagsterInstance) -> str:
    """The evaluation, the places of the artifacts, and how to call the endpoint, as text for a terminal.

    Raises `LookupError` if something has not been materialized below `root` as far as `instance` knows, or its
    reference file is gone.
    """

    def latest(asset: str) -> object:
        uri = latest_file(instance, storage.join(str(root), "references"), dg.AssetKey(asset))
        if uri is None or not storage.exists(uri):
            raise LookupError(f"{event_log_name(instance)} knows no {asset} below {root}")
        return read_reference(uri).value

    evaluation = EvaluationRef.model_validate(latest("evaluation_report"))
    model = ModelRef.model_validate(latest("tuned_model"))
    version = ModelVersion.model_validate(latest("registered_model"))
    endpoint = EndpointStatus.model_validate(latest("endpoint"))
    m = evaluation.metrics
    lines = [
        "",
        "Evaluation on the test split",
        f"  RMSE {number(m['rmse']):>12}   (gate: at most {number(evaluation.rmse_threshold)})",
        f"  MAE  {number(m['mae']):>12}",
        *([f"  R²   {number(m['r2']):>12}"] if "r2" in m else []),
        *([f"  MAPE {percent(m['mape']):>12}"] if "mape" in m else []),
        f"  RMSE of a linear model {number(m['baseline_linear_rmse'])}, of the mean {number(m['baseline_mean_rmse'])}",
        "",
        "Artifacts",
        f"  model              {model.model.uri}",
        f"  evaluation report  {evaluation.report.file_uri('evaluation.json')}",
        f"  registered as      {version.reference} ({version.status})",
        "",
        f"Endpoint {endpoint.name} serves version {endpoint.version} at {endpoint.url}",
        f"  {curl_line(endpoint.url, Path(model.model.uri))}",
        "",
        "Dagster UI: make ui        Stop the endpoint: make stop        Remove everything: make clean-data",
    ]
    return "\n".join(lines)


def failure_summary(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    """What a run that failed has made, what failed in it and why, and what to do; for a terminal."""
    made, failed = [], []
    for record in instance.all_logs(run.run_id):
        event = record.dagster_event
        if event is None:
            continue
        if event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION and event.asset_key is not None:
            made.append(event.asset_key.to_user_string())
        elif (reason := failure_reason(event)) is not None:
            failed.append(reason)
        elif event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            check = event.asset_check_evaluation_data
            if not check.passed and check.severity == dg.AssetCheckSeverity.ERROR:
                remedy = f". Remedy: {REMEDIES[name]}" if (name := check.asset_key.to_user_string()) in REMEDIES else ""
                failed.append(f"check {check.check_name} of {name} failed: {check.description or 'no details'}{remedy}")
    lines = ["", f"Run {run.run_id[:8]} is {run.status.value}."]
    lines += [f"Made:   {', '.join(dict.fromkeys(made)) or 'nothing'}"]
    lines += [f"Error:  {line}" for line in dict.fromkeys(failed)]
    return "\n".join(lines)


def curl_line(url: str, model: Path) -> str:
    """A command that asks the endpoint for one prediction: the mean row of the training split."""
    import json

    from step_scripts.table.spec import TableSpec

    table = TableSpec.model_validate_json((model / "table.json").read_bytes())
    mean = json.loads((model / "scaler.json").read_bytes())["mean"]
    values = [
        f"{mean[name]:.0f}" if table.column(name).dtype == "int64" else f"{mean[name]:.2f}" for name in table.features
    ]
    return f"curl -s {shlex.quote(url)} -H 'Content-Type: text/csv' -d '{','.join(values)}'"


def main(arguments: Sequence[str] = ()) -> int:
    """Print the summary of the deployment's root, or of the last run if it failed. Returns the exit status.

    An argument is a moment, in seconds since 1970: where no run was created since, Dagster itself has said why.
    """
    root = Path(Settings.load().own_root)
    try:
        with dg.DagsterInstance.get() as instance:
            [last] = instance.get_run_records(limit=1) or [None]
            if arguments and (last is None or last.create_timestamp.timestamp() < float(arguments[0])):
                return 0
            run = None if last is None else last.dagster_run
            if run is not None and run.status in (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED):
                print(failure_summary(instance, run))
                return 0
            print(summary(root, instance))
    except (LookupError, dg.DagsterError) as error:
        print(f"not everything has been materialized: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
