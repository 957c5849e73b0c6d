"""Tracking of tuning runs beside Dagster: nowhere, or in MLflow."""

from __future__ import annotations

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from resources.services.optional import attempt
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepResult
from step_scripts.runner.ray_environment import environment_defaults

if TYPE_CHECKING:
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]  # optional

_PARAMETER_LENGTH = 6000  # MLflow's limit for the value of a parameter
# MLflow's client would retry for some four minutes before it says why.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
_DIGEST_TAG = "housing.request_digest"


class ExperimentTracker(dg.ConfigurableResource, ABC):
    """Keeps a record of tuning runs. Which implementation is used is decided in `housing_assets.deployments`."""

    @abstractmethod
    def record(self, search: StepResult, run_id: str) -> dict[str, Any]:
        """Record a tuning run, once, however often it is called. Returns metadata that leads to the record.

        `search`: the result of step `tune_model`, whose report holds all trials and the learning curve. `run_id`: the
        Dagster run that asked for it.
        """

    def try_to_record(self, search: StepResult, run_id: str, log: Any) -> dict[str, Any]:
        """`record`, or a warning in `log` with the reason: the model is there, whatever becomes of its record."""
        found: dict[str, Any] = {}
        problem = attempt(lambda: found.update(self.record(search, run_id)))
        if problem is None:
            return found
        log.warning(f"{_name(search)} is not recorded in the experiment tracker, and the run goes on: {problem}")
        return {"not_recorded": problem}


class NoTracking(ExperimentTracker):
    """Records nothing: Dagster's own metadata is all there is."""

    def record(self, search: StepResult, run_id: str) -> dict[str, Any]:
        """Nothing."""
        return {}


class MlflowTracking(ExperimentTracker):
    """A run in MLflow with trials as nested runs, the learning curve as metrics, and the model as artifacts.

    Raises `dagster.Failure` if the package is not installed.
    """

    tracking_uri: str = Field(
        description="URI of the tracking server (http://…) or of a database (sqlite:///…), or the ARN of a server that "
        "SageMaker manages (needs the package sagemaker-mlflow)."
    )
    experiment: str = Field(default="housing", description="Name of the experiment; made if it is not there.")
    artifact_location: str | None = Field(
        default=None, description="Where a new experiment keeps artifacts. Empty: as the server decides."
    )

    def record(self, search: StepResult, run_id: str) -> dict[str, Any]:
        """Record the search. A run with the same request digest that has finished is the record."""
        with environment_defaults(_PATIENCE):
            client = self._client()
            experiment = self._experiment_id(client)
            known = client.search_runs(
                [experiment],
                f"tags.`{_DIGEST_TAG}` = '{search.request_digest}' and attributes.status = 'FINISHED' "
                "and tags.`housing.kind` = 'search'",
                max_results=1,
            )
            record = known[0].info.run_id if known else self._log(client, experiment, search, run_id)
        metadata: dict[str, Any] = {"mlflow_experiment": self.experiment, "mlflow_run_id": record}
        if self.tracking_uri.startswith("http"):
            url = f"{self.tracking_uri.rstrip('/')}/#/experiments/{experiment}/runs/{record}"
            metadata["mlflow_run"] = dg.MetadataValue.url(url)
        return metadata

    def _client(self) -> MlflowClient:
        try:
            from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]  # optional
        except ImportError as error:
            raise dg.Failure(
                "tracking in MLflow is configured, and the package is not there: pip install 'housing-assets[mlflow]'",
                allow_retries=False,
            ) from error
        return MlflowClient(tracking_uri=self.tracking_uri)

    def _experiment_id(self, client: MlflowClient) -> str:
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]  # optional

        if (found := client.get_experiment_by_name(self.experiment)) is not None:
            return found.experiment_id
        try:
            return client.create_experiment(self.experiment, artifact_location=self.artifact_location)
        except MlflowException:
            if (found := client.get_experiment_by_name(self.experiment)) is not None:  # by another run
                return found.experiment_id
            raise

    def _log(self, client: MlflowClient, experiment: str, search: StepResult, dagster_run: str) -> str:
        model, report = search.outputs["model"], search.outputs["report"]
        settings = {name: value for name, value in search.params.items() if name != "table"}
        tags = {
            _DIGEST_TAG: search.request_digest,
            "housing.kind": "search",
            "dagster.run_id": dagster_run,
            "housing.model_digest": model.digest,
            "housing.model_uri": model.uri,
        }
        run_id = client.create_run(experiment, tags=tags, run_name=_name(search)).info.run_id
        try:
            _log_batch(client, run_id, {**settings, **search.details["best_parameters"]}, search.metrics)
            _log_curve(client, run_id, _read(report, "learning_curve.json"), search.created_at)
            for trial in _read(report, "trials.json"):
                _log_trial(client, experiment, run_id, trial)
            for artifact, folder in ((model, "model"), (report, "report")):
                _log_files(client, run_id, artifact, folder)
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id, "FINISHED")
        return run_id


def _name(search: StepResult) -> str:
    return f"search {search.request_digest[:8]}"


def _read(artifact: Artifact, name: str) -> Any:
    return json.loads(storage.read_bytes(artifact.file_uri(name)))


def _log_batch(client: Any, run_id: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]  # optional

    client.log_batch(
        run_id,
        params=[Param(name, str(value)[:_PARAMETER_LENGTH]) for name, value in params.items()],
        metrics=[Metric(name, float(value), 0, 0) for name, value in metrics.items()],
    )


def _log_curve(client: Any, run_id: str, curve: Mapping[str, Any], made_at: datetime) -> None:
    from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]  # optional

    moment = int(made_at.timestamp() * 1000)
    rounds: Sequence[int] = curve.get("round", [])
    points = [
        Metric(f"{split}_rmse_by_round", float(value), moment, int(step))
        for split in ("train", "validation")
        for step, value in zip(rounds, curve.get(split, []), strict=False)
    ]
    for start in range(0, len(points), 1000):  # MLflow's limit for one request
        client.log_batch(run_id, metrics=points[start : start + 1000])


def _log_trial(client: Any, experiment: str, parent: str, trial: Mapping[str, Any]) -> None:
    tags = {"mlflow.parentRunId": parent, "housing.kind": "trial", "stopped_by": str(trial.get("stopped_by"))}
    run_id = client.create_run(experiment, tags=tags, run_name=f"trial {trial['trial']}").info.run_id
    figures = {
        name: trial[name] for name in ("rmse", "rounds", "best_rounds", "seconds") if trial.get(name) is not None
    }
    _log_batch(client, run_id, dict(trial["parameters"]), figures)
    client.set_terminated(run_id, "FINISHED" if trial.get("status") == "completed" else "FAILED")


def _log_files(client: Any, run_id: str, artifact: Artifact, folder: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for file in artifact.files:
            storage.write_bytes(storage.join(scratch, file.path), storage.read_bytes(artifact.file_uri(file.path)))
        client.log_artifacts(run_id, scratch, folder)
