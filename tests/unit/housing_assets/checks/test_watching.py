"""The endpoint's health and drift checks, run as the job runs them: alone, on a real endpoint."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
from dagster._core.definitions import freshness_evaluator
from dagster._core.definitions.freshness import FreshnessState
from dagster._core.loader import LoadingContextForTest

from housing_assets.automation import sensors
from housing_assets.checks import serving
from housing_assets.checks.alerts import notify_on_degradation
from housing_assets.checks.comparisons import typical_row
from housing_assets.definitions import defs
from housing_assets.schema import HOUSING_TABLE
from housing_assets.settings import Settings
from resources.endpoints.captured_files import read_captured
from resources.endpoints.local import LocalDataCapture, LocalEndpointHost
from resources.endpoints.server_process import start_detached, wait_until_serving
from resources.model_registry.base import ModelVersion
from resources.model_registry.local import LocalModelRegistry
from resources.references.evidence import EvidenceStore
from resources.services.notifier import Notifier
from step_scripts.model import load_model
from step_scripts.runner.contract import Artifact
from step_scripts.serving.deployment import DEPLOYMENT_FILE, DeploymentRecord
from step_scripts.serving.feature_parser import FeatureParser
from step_scripts.table.distributions import distribution_of
from tests.serving_models import house_rows, registered, small_model, smoke_test
from tests.waiting import until

LOG = logging.getLogger("test")
NAME = "housing"


def trained(folder: Path, factor: float = 100.0) -> Artifact:
    """A model with the distributions of 2000 rows, and of what the model itself predicts for them."""
    frame = house_rows(2000, seed=1)
    known = {name: distribution_of(frame[name].cast(pl.Float64).to_numpy()) for name in frame.columns}
    target = load_model(small_model(folder / "first", factor=factor).uri).predict(frame)
    known["PRICE"] = distribution_of(target.astype(np.float64))
    return small_model(folder, factor=factor, statistics={"distributions": known})


class Messages(Notifier):
    """Writes messages into a file."""

    path: str

    def notify(self, title: str, text: str) -> None:
        with Path(self.path).open("a") as file:
            file.write(f"{title}\n{text}\n")


class Platform:
    """An endpoint and a registry, and the checks of the code location on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = LocalModelRegistry(root=str(folder / "registry"))
        self.host = LocalEndpointHost(root=str(folder / "endpoints"), data_capture=LocalDataCapture())
        self.instance = dg.DagsterInstance.ephemeral()
        self.notifier = Messages(path=str(folder / "messages"))

    def register(self, number: int, *, approved: bool = True) -> tuple[Artifact, ModelVersion]:
        model = trained(self.folder / str(number), factor=100.0 * number)
        return model, registered(self.registry, model, approved=approved)

    def deploy(self, model: Artifact, version: ModelVersion) -> None:
        self.host.deploy(NAME, version, smoke_test(model), LOG)

    def watch(self) -> tuple[dg.ExecuteInProcessResult, dict[str, dg.AssetCheckEvaluation]]:
        """Run job `watch_endpoint`."""
        resources: Any = {
            **(defs.resources or {}),
            "evidence": EvidenceStore(root=str(self.folder / "evidence")),
            "endpoint_host": self.host,
            "model_registry": self.registry,
            "notifier": self.notifier,
        }
        checks = [defs.get_asset_checks_def(key) for key in _keys()]
        job = dg.Definitions(asset_checks=checks, jobs=[serving.watch_endpoint], resources=resources)
        done = job.resolve_job_def("watch_endpoint").execute_in_process(instance=self.instance, raise_on_error=False)
        return done, {e.check_name: e for e in done.get_asset_check_evaluations()}

    def health(self) -> tuple[bool, dg.AssetCheckEvaluation]:
        """Whether the run succeeded, and what the health check found."""
        done, found = self.watch()
        return done.success, found[serving.HEALTH_CHECK]

    def drift(self) -> dg.AssetCheckEvaluation:
        done, found = self.watch()
        assert done.success
        return found[serving.DRIFT_CHECK]

    def ask(self, rows: pl.DataFrame) -> None:
        """Requests of 100 rows, and the time until they are captured."""
        before = self.readable()
        for start in range(0, rows.height, 100):
            self.host.invoke(NAME, rows[start : start + 100].write_csv().encode(), "text/csv", "text/csv")
        until(lambda: self.readable() >= before + -(-rows.height // 100))

    def readable(self) -> int:
        """Captured requests, without those of the platform's own probes."""
        found = self.host.captured(NAME, HOUSING_TABLE, datetime(2020, 1, 1, tzinfo=UTC), 1_000_000)
        return found.requests if found else 0

    def told(self) -> list[str]:
        """The lines that people were sent since this was asked last."""
        file = Path(self.notifier.path)
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines


def _keys() -> list[dg.AssetCheckKey]:
    names = (serving.HEALTH_CHECK, serving.DRIFT_CHECK)
    return [dg.AssetCheckKey(dg.AssetKey("endpoint"), name) for name in names]


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    made = Platform(tmp_path)
    yield made
    for status in made.host.list():
        made.host.delete(status.name)
    made.instance.dispose()


def value(evaluation: dg.AssetCheckEvaluation, name: str) -> Any:
    return evaluation.metadata[name].value


def test_the_job_and_its_schedule() -> None:
    repository = defs.get_repository_def()
    schedule = repository.get_schedule_def("endpoint_watch")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert (schedule.cron_schedule, schedule.job_name) == ("*/15 * * * *", "watch_endpoint")
    assert len(schedule.description or "") > 40
    job = repository.get_job("watch_endpoint")
    assert job.asset_layer.executable_asset_keys == set()
    assert {key.name for key in job.asset_layer.asset_graph.asset_check_keys} >= {k.name for k in _keys()}
    assert {node.name for node in job.nodes} == {f"endpoint_{key.name}" for key in _keys()}


def test_settings_come_from_the_environment() -> None:
    variables = {"HOUSING_WATCH_CRON": "0 * * * *", "HOUSING_DRIFT_DAYS": "2", "HOUSING_DRIFT_ROWS": "10"}
    settings = Settings.load(variables)
    assert (settings.watch_cron, settings.drift_days, settings.drift_rows) == ("0 * * * *", 2.0, 10)
    with pytest.raises(ValueError, match="HOUSING_DRIFT_ROWS='0'"):
        Settings.load({"HOUSING_DRIFT_ROWS": "0"})


def test_health_from_the_first_deployment_to_the_end_of_the_server(platform: Platform) -> None:
    succeeded, found = platform.health()
    assert not succeeded
    assert found.description == "there is no endpoint housing: materialize endpoint"
    title, reason, *_, remedy = platform.told()
    assert (title, reason) == ("Check endpoint_health of endpoint failed (error)", found.description)
    assert remedy.startswith("Remedy: job deploy_endpoint deploys a version again")

    first = platform.register(1)
    platform.deploy(*first)
    succeeded, found = platform.health()
    assert succeeded, found.description
    assert found.passed
    assert (value(found, "version"), value(found, "latest_approved")) == (1, 1)
    assert 0 < value(found, "median_milliseconds") <= value(found, "slowest_milliseconds")
    assert value(found, "relative_difference") < 1e-6
    assert value(found, "dropped_requests") == 0
    assert platform.told() == []

    platform.register(2, approved=False)
    assert platform.health()[1].passed, "a version that waits for a decision is no reason to worry"
    platform.registry.set_status("housing", 2, "Approved", who="ann", why="better")
    succeeded, found = platform.health()
    assert succeeded, "a warning fails no run"
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "housing/2 is approved, housing/1 is served: deploy it, or reject it" in (found.description or "")
    assert platform.told()[0] == "Check endpoint_health of endpoint failed (warn)"
    platform.registry.set_status("housing", 2, "Rejected", who="ann", why="worse after all")
    assert platform.health()[1].passed

    platform.registry.set_status("housing", 1, "Rejected", who="bob", why="biased")
    succeeded, found = platform.health()
    assert not succeeded
    assert "housing serves housing/1, which is Rejected (bob: biased)" in (found.description or "")
    title, reason, *figures, _ = platform.told()
    assert (title, reason) == ("Check endpoint_health of endpoint failed (error)", found.description)
    assert {"model_version: housing/1", "state: InService", "dropped_requests: 0"} <= set(figures)

    assert platform.host.stop(NAME)
    succeeded, found = platform.health()
    assert not succeeded
    assert "does not answer (OutOfService): materialize endpoint to start it again" in (found.description or "")
    assert platform.told() == [], "people know that it is ill"


def test_another_model_than_the_registrys_is_found(platform: Platform) -> None:
    """Somebody changed what the version's name stands for."""
    first, second = platform.register(1), platform.register(2)
    platform.deploy(*first)
    file = Path(platform.host.root) / NAME / DEPLOYMENT_FILE
    record = DeploymentRecord.read(file)
    platform.host.stop(NAME)
    record.model_copy(update={"version": second[1].reference}).write(file)
    start_detached(file.parent)
    wait_until_serving(file.parent, 120)
    succeeded, found = platform.health()
    assert not succeeded
    assert "serves another model than housing/2 of the registry" in (found.description or "")
    platform.registry.delete("housing", 2)
    succeeded, found = platform.health()
    assert not succeeded
    assert "serves housing/2, which the registry does not have" in (found.description or "")


def test_a_failed_health_check_is_told_once_and_not_as_a_failed_run_as_well(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed_runs() -> list[str]:
        """What sensor `failed_runs` says of a run of the watch."""
        done, _ = platform.watch()
        context = dg.build_run_status_sensor_context(
            "failed_runs",
            dagster_event=done.get_run_failure_event(),
            dagster_instance=platform.instance,
            dagster_run=done.dagster_run,
            resources={"notifier": platform.notifier},
        ).for_run_failure()
        said = platform.told()
        sensors.failed_runs(context)
        return [*said[:1], *platform.told()]

    assert failed_runs() == ["Check endpoint_health of endpoint failed (error)"]
    assert failed_runs() == []

    def fail(*_: Any) -> Any:
        raise RuntimeError("no answer from AWS")

    monkeypatch.setattr(LocalEndpointHost, "describe", fail)
    said = failed_runs()
    assert any(line.endswith("of job watch_endpoint failed") for line in said), "the check itself broke"
    assert any("no answer from AWS" in line for line in said)


class Unreachable(Notifier):
    def notify(self, title: str, text: str) -> None:
        raise ConnectionRefusedError("nobody listens")


HEALTH = dg.AssetCheckKey(dg.AssetKey("endpoint"), "health")


def look(
    instance: dg.DagsterInstance, severity: dg.AssetCheckSeverity | None, notifier: Notifier
) -> dg.AssetCheckEvaluation:
    """One run of a check that fails with `severity`, or passes."""

    @dg.asset_check(asset="endpoint", name="health")
    def health(context) -> dg.AssetCheckResult:  # pyright: ignore[reportMissingParameterType]
        found = dg.AssetCheckResult(
            passed=severity is None, severity=severity or dg.AssetCheckSeverity.WARN, metadata={"rows": 7}
        )
        return notify_on_degradation(found, HEALTH, "mend it", notifier, context.instance)

    checks = dg.define_asset_job("look", selection=dg.AssetSelection.checks(health))
    job = dg.Definitions(asset_checks=[health], jobs=[checks]).resolve_job_def("look")
    [evaluation] = job.execute_in_process(instance=instance).get_asset_check_evaluations()
    return evaluation


def test_a_notification_is_sent_when_a_check_gets_worse(tmp_path: Path) -> None:
    """A check's history on a real instance; a message that could not be sent is sent at the next look."""
    file = tmp_path / "messages"
    messages = Messages(path=str(file))
    warn, error = dg.AssetCheckSeverity.WARN, dg.AssetCheckSeverity.ERROR
    looks: list[tuple[dg.AssetCheckSeverity | None, Notifier, int]] = [
        (None, messages, 0),
        (warn, messages, 1),
        (warn, messages, 0),
        (error, Unreachable(), 0),
        (error, messages, 1),
        (error, messages, 0),
        (warn, messages, 0),
        (error, messages, 1),
        (None, messages, 0),
        (error, Unreachable(), 0),
        (error, Unreachable(), 0),
        (error, messages, 1),
    ]
    with dg.DagsterInstance.ephemeral() as instance:
        for number, (severity, notifier, told) in enumerate(looks):
            evaluation = look(instance, severity, notifier)
            assert ("message_not_sent" in evaluation.metadata) == isinstance(notifier, Unreachable), number
            text = file.read_text() if file.exists() else ""
            assert text.count("Check health of endpoint failed") == told, number
            assert text.endswith("rows: 7\nRemedy: mend it\n" if told else ""), number
            file.unlink(missing_ok=True)


def test_drift_is_found_in_captured_requests(platform: Platform) -> None:
    assert platform.host.captured(NAME, HOUSING_TABLE, datetime.now(UTC), 1) is None
    platform.deploy(*platform.register(1))
    found = platform.drift()
    assert found.passed
    assert "not enough captured rows: 0 since" in (found.description or "")
    assert "200 needed" in (found.description or "")

    platform.ask(house_rows(1000, seed=2))
    found = platform.drift()
    assert found.passed, found.description
    assert found.description == "as the training data of housing/1"
    assert (value(found, "captured_rows"), value(found, "captured_requests")) == (1000, 10)
    assert value(found, "largest_psi") < 0.1
    columns = {record.data["column"] for record in found.metadata["psi"].records}  # pyright: ignore[reportAttributeAccessIssue]
    assert columns == {*house_rows(1).columns, "predictions"}

    larger = house_rows(4000, seed=3).with_columns(SQUARE_FEET=pl.col("SQUARE_FEET") * 0.3 + 4000)
    platform.ask(larger)
    found = platform.drift()
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert found.description == "shifted against the training data of housing/1: SQUARE_FEET, predictions"
    assert value(found, "predictions_psi") > 0.2
    title, reason, *figures, remedy = platform.told()
    assert (title, reason) == ("Check prediction_drift of endpoint failed (warn)", found.description)
    assert "captured_rows: 5000" in figures
    assert {f"psi: {name}" for name in ("SQUARE_FEET", "predictions")} <= {line.rpartition(" ")[0] for line in figures}
    assert "launch job retrain" in remedy
    assert not platform.drift().passed
    assert platform.told() == [], "people know it"

    platform.deploy(*platform.register(2))
    found = platform.drift()
    assert found.passed
    assert "not enough captured rows: 0" in (found.description or ""), "the requests were another version's"
    assert value(found, "model_version") == "housing/2"

    platform.host = LocalEndpointHost(root=platform.host.root)
    model, version = platform.register(3)
    platform.host.deploy(NAME, version, smoke_test(model), LOG)
    assert platform.drift().description == "requests are not captured (HOUSING_DATA_CAPTURE=on)"


def test_the_typical_row_is_valid_with_statistics_and_without(platform: Platform) -> None:
    for model in (trained(platform.folder / "with"), small_model(platform.folder / "without")):
        version = registered(platform.registry, model)
        row = typical_row(version.artifact)
        assert row.height == 1
        parsed = FeatureParser(HOUSING_TABLE).parse(row.write_csv(include_header=False).encode(), "text/csv")
        np.testing.assert_allclose(parsed, row.cast(pl.Float64).to_numpy())


def test_captured_lines_of_sagemaker_are_read(tmp_path: Path) -> None:
    """Its folders have the endpoint's name above the variant's, and its times no fractions."""
    now = datetime.now(UTC).replace(microsecond=0)
    folder = tmp_path / "AllTraffic" / f"{now:%Y/%m/%d/%H}"
    folder.mkdir(parents=True)
    row = "1990,2000.5,3,2.5,0.5,2,1,0"
    part = {"observedContentType": "text/csv; charset=utf-8", "mode": "INPUT", "data": row, "encoding": "CSV"}
    line = {
        "captureData": {"endpointInput": part, "endpointOutput": {**part, "mode": "OUTPUT", "data": "5.5\n"}},
        "eventMetadata": {"eventId": "x", "inferenceTime": f"{now:%Y-%m-%dT%H:%M:%SZ}"},
        "eventVersion": "0",
    }
    (folder / "15-00-123-4711.jsonl").write_text(json.dumps(line))
    found = read_captured(str(tmp_path), HOUSING_TABLE, now - timedelta(seconds=1), 10)
    assert found.features.tolist() == [[1990, 2000.5, 3, 2.5, 0.5, 2, 1, 0]]
    assert found.predictions.tolist() == [5.5]


@pytest.mark.parametrize("name", ["registered_model", "endpoint"])
def test_models_and_endpoints_grow_stale(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster's own judgement, as days go by: 8 days by default, with a warning before."""
    node = defs.resolve_asset_graph().get(dg.AssetKey(name))
    with dg.DagsterInstance.ephemeral() as instance:

        def state_after(days: float) -> FreshnessState:
            now = time.time() + days * 86400
            monkeypatch.setattr(freshness_evaluator, "get_current_timestamp", lambda: now)
            evaluator = freshness_evaluator.TimeWindowFreshnessPolicyEvaluator()
            return asyncio.run(evaluator.evaluate_freshness(LoadingContextForTest(instance), node))

        assert state_after(0) == FreshnessState.UNKNOWN
        instance.report_runless_asset_event(dg.AssetMaterialization(name))
        found = [state_after(days) for days in (0, 7, 7.5, 8.1)]
    assert found == [FreshnessState.PASS, FreshnessState.PASS, FreshnessState.WARN, FreshnessState.FAIL]


def test_other_assets_have_no_freshness_policy() -> None:
    graph = defs.resolve_asset_graph()
    policed = {k.to_user_string() for k in graph.get_all_asset_keys() if graph.get(k).freshness_policy is not None}
    assert policed == {"registered_model", "endpoint"}
