"""Sensors, the schedule and the conditions of automation, evaluated as the daemon does it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from housing_assets.automation import sensors
from housing_assets.checks.alerts import NOTIFIED
from housing_assets.definitions import defs
from housing_assets.settings import Settings
from resources.endpoints.local import LocalEndpointHost
from resources.model_registry.local import LocalModelRegistry
from resources.services.notifier import Notifier
from tests.registry_contract import artifact, register


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


def test_everything_is_stopped_until_somebody_starts_it_and_says_what_it_does() -> None:
    repository = defs.get_repository_def()
    assert {s.name for s in repository.sensor_defs} >= {
        *("landing_files", "approved_models", "failed_runs", "keep_up_to_date")
    }
    for sensor in repository.sensor_defs:
        assert sensor.default_status == dg.DefaultSensorStatus.STOPPED, sensor.name
        assert len(sensor.description or "") > 40, sensor.name
    for schedule in repository.schedule_defs:
        assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED, schedule.name
        assert schedule.execution_timezone == "UTC", schedule.name
        assert len(schedule.description or "") > 40, schedule.name
    assert repository.get_schedule_def("weekly_retraining").cron_schedule == "0 3 * * 1"


def test_settings_come_from_the_environment() -> None:
    settings = Settings.load({"HOUSING_LANDING": "s3://b/in", "HOUSING_RETRAIN_CRON": "5 4 * * *"})
    assert (settings.landing, settings.retrain_cron) == ("s3://b/in", "5 4 * * *")
    with pytest.raises(ValueError, match="HOUSING_SETTLE_SECONDS='soon'"):
        Settings.load({"HOUSING_SETTLE_SECONDS": "soon"})


def look(
    sensor: Any, cursor: str | None, instance: dg.DagsterInstance, **resources: Any
) -> tuple[list[dg.RunRequest], str | None, str | None]:
    """One look of a sensor: what it asks for, what it remembers, why it did nothing."""
    context = dg.build_sensor_context(instance, cursor, repository_def=defs.get_repository_def())
    result = sensor(context, **{"notifier": Recorder(), **resources})
    if isinstance(result, dg.SkipReason):
        return [], cursor, result.skip_message
    reason = result.skip_reason
    message = reason.skip_message if isinstance(reason, dg.SkipReason) else reason
    return list(result.run_requests or []), result.cursor or cursor, message


def launched(request: dg.RunRequest, instance: dg.DagsterInstance, status: str) -> None:
    """What the daemon makes of a request, by its tags."""

    @dg.job
    def requested() -> None: ...

    tags = {**request.tags, "dagster/run_key": request.run_key or ""}
    instance.create_run_for_job(requested, tags=tags, status=dg.DagsterRunStatus[status])


def test_landed_files_are_ingested_by_day_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instance: dg.DagsterInstance
) -> None:
    requests, _, why = look(sensors.landing_files, None, instance)
    assert requests == []
    assert "HOUSING_LANDING is not set" in (why or "")

    monkeypatch.setattr(sensors, "_SETTINGS", Settings(landing=str(tmp_path)))
    for day in ("2026-03-04", "2026-03-05"):
        (tmp_path / day).mkdir()
        (tmp_path / day / "sales.csv").write_text("x")
        os.utime(tmp_path / day / "sales.csv", (1e9, 1e9))
    (tmp_path / "notes.txt").write_text("x")
    first, cursor, _ = look(sensors.landing_files, None, instance)
    second, cursor, _ = look(sensors.landing_files, cursor, instance)
    third, cursor, why = look(sensors.landing_files, cursor, instance)
    assert (first, third) == ([], [])
    assert [request.partition_key for request in second] == ["2026-03-04", "2026-03-05"]
    assert len({request.run_key for request in second}) == 2
    assert why == "no new files; 0 are still changing or seen once; not taken, because no CSV file: notes.txt"

    for request in second:
        launched(request, instance, "SUCCESS")
    _, cursor, _ = look(sensors.landing_files, "no cursor at all", instance)
    again, cursor, _ = look(sensors.landing_files, cursor, instance)
    assert [request.partition_key for request in again] == ["2026-03-04", "2026-03-05"]
    used = {request.run_key for request in second}
    assert not used & {request.run_key for request in again}, "Dagster would drop them without a word"
    (tmp_path / "2026-03-04").rename(tmp_path.parent / f"{tmp_path.name} away")
    assert look(sensors.landing_files, cursor, instance)[0] == []
    monkeypatch.setattr(sensors, "_SETTINGS", Settings(landing=str(tmp_path / "unmounted")))
    nothing, kept, why = look(sensors.landing_files, cursor, instance)
    assert (nothing, kept, why) == ([], cursor, f"there is no {tmp_path / 'unmounted'} yet"), "nothing is forgotten"


def test_files_that_cannot_be_ingested_are_told_once_and_do_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instance: dg.DagsterInstance
) -> None:
    monkeypatch.setattr(sensors, "_SETTINGS", Settings(landing=str(tmp_path)))
    odd = os.fsdecode(bytes(tmp_path) + b"/2026-03-05 ums\xe4tze.csv")
    for name in ("2026-03-05.csv", "2019-01-01.csv", "2999-01-01.csv", odd):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (1e9, 1e9))

    class Broken(Notifier):
        def notify(self, title: str, text: str) -> None:
            raise OSError("no mail server")

    _messages.clear()
    first, cursor, _ = look(sensors.landing_files, None, instance, notifier=Broken())
    second, cursor, _ = look(sensors.landing_files, cursor, instance)
    third, cursor, why = look(sensors.landing_files, cursor, instance)
    assert [[r.partition_key for r in requests] for requests in (first, second, third)] == [[], ["2026-03-05"], []]
    [(title, text)] = _messages
    assert title == f"{tmp_path} holds what cannot be ingested now"
    assert [line.partition(": ")[0] for line in text.splitlines()[:3]] == [
        f"{tmp_path}/2019-01-01.csv", f"{tmp_path}/2026-03-05 ums\\xe4tze.csv", f"{tmp_path}/2999-01-01.csv"
    ]  # fmt: skip
    assert "3 are set aside" in (why or "")
    for written in (cursor, why, text):
        (written or "").encode()


def test_an_approved_version_is_deployed_once(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    registry = LocalModelRegistry(root=str(tmp_path / "registry"))
    resources = {"model_registry": registry, "endpoint_host": LocalEndpointHost(root=str(tmp_path / "endpoints"))}
    for name in ("one", "two"):
        register(registry, artifact(tmp_path / name, name))
    requests, cursor, why = look(sensors.approved_models, None, instance, **resources)
    assert (requests, why) == ([], "model group housing has no approved version")

    registry.set_status("housing", 1, "Approved", who="ann", why="good")
    [request], cursor, _ = look(sensors.approved_models, cursor, instance, **resources)
    assert request.run_config == {"ops": {"endpoint": {"config": {"version": 1}}}}
    assert look(sensors.approved_models, cursor, instance, **resources)[0] == [], (
        "asked for once, even if the run failed"
    )

    registry.set_status("housing", 2, "Approved", who="ann", why="better")
    [request], cursor, _ = look(sensors.approved_models, cursor, instance, **resources)
    assert request.run_config == {"ops": {"endpoint": {"config": {"version": 2}}}}
    registry.set_status("housing", 2, "Rejected", who="ann", why="worse after all")
    assert look(sensors.approved_models, cursor, instance, **resources)[0] == [], (
        "going back is rollback_endpoint's business"
    )


def test_a_damaged_version_is_told_once_and_does_not_keep_the_others(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    registry = LocalModelRegistry(root=str(tmp_path / "registry"))
    resources = {"model_registry": registry, "endpoint_host": LocalEndpointHost(root=str(tmp_path / "endpoints"))}
    for number, name in enumerate(("one", "two", "three"), start=1):
        register(registry, artifact(tmp_path / name, name))
        registry.set_status("housing", number, "Approved", who="ann", why="good")
    versions = Path(registry.root) / "housing" / "versions"
    (versions / "1" / "version.json").write_text("{")
    next((versions / "3" / "artifact").iterdir()).write_text("cut off")
    _messages.clear()
    [request], cursor, _ = look(sensors.approved_models, None, instance, **resources)
    assert request.run_config == {"ops": {"endpoint": {"config": {"version": 2}}}}
    requests, cursor, why = look(sensors.approved_models, cursor, instance, **resources)
    assert (requests, why) == ([], "housing/2 has been handed on before; set aside: housing/1, housing/3")
    [(title, text)] = _messages
    assert title == "2 versions of model group housing cannot be read"
    assert "Restore it, or delete version 1." in text

    launched(request, instance, "STARTED")
    requests, _, why = look(sensors.approved_models, "reset", instance, **resources)
    assert requests == []
    assert "is about to deploy housing/2" in (why or "")
    [run] = instance.get_runs()
    instance.report_run_failed(run)
    [again], _, _ = look(sensors.approved_models, "reset", instance, **resources)
    assert again.run_key == f"{request.run_key}-2", "Dagster would drop the first key without a word"


class Recorder(Notifier):
    def notify(self, title: str, text: str) -> None:
        _messages.append((title, text))


_messages: list[tuple[str, str]] = []


def test_a_failed_run_is_told_with_step_and_reason(instance: dg.DagsterInstance) -> None:
    @dg.op
    def breaks() -> None:
        raise dg.Failure("file x.csv is bad: mend it", allow_retries=False)

    @dg.job
    def broken() -> None:
        breaks()

    result = broken.execute_in_process(instance=instance, raise_on_error=False)
    context = dg.build_run_status_sensor_context(
        "failed_runs",
        dagster_event=result.get_run_failure_event(),
        dagster_instance=instance,
        dagster_run=result.dagster_run,
        resources={"notifier": Recorder()},
    ).for_run_failure()
    _messages.clear()
    sensors.failed_runs(context)
    assert _messages == [
        (f"Run {result.run_id[:8]} of job broken failed", "breaks: file x.csv is bad: mend it"),
    ]


def test_what_a_run_has_told_itself_is_not_told_again(instance: dg.DagsterInstance) -> None:
    @dg.op
    def finds() -> None:
        raise dg.Failure("S3 cannot be asked", metadata={NOTIFIED: 0}, allow_retries=False)

    @dg.op
    def breaks() -> None:
        raise ValueError("no such bucket")

    @dg.job
    def sweeps() -> None:
        finds()

    @dg.job
    def sweeps_and_breaks() -> None:
        finds()
        breaks()

    _messages.clear()
    for job in (sweeps, sweeps_and_breaks):
        result = job.execute_in_process(instance=instance, raise_on_error=False)
        context = dg.build_run_status_sensor_context(
            "failed_runs",
            dagster_event=result.get_run_failure_event(),
            dagster_instance=instance,
            dagster_run=result.dagster_run,
            resources={"notifier": Recorder()},
        ).for_run_failure()
        sensors.failed_runs(context)
    [(title, reasons)] = _messages
    assert title.endswith("of job sweeps_and_breaks failed")
    assert "breaks: ValueError: no such bucket" in reasons.splitlines()


def passed(instance: dg.DagsterInstance, asset: str, check: str, *, ok: bool, blocking: bool = True) -> None:
    instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey(asset), check_name=check, passed=ok, metadata={}, blocking=blocking
        )
    )


def materialized(instance: dg.DagsterInstance, *assets: str) -> None:
    for asset in assets:
        instance.report_runless_asset_event(dg.AssetMaterialization(asset))


SPLITS = ("train_split", "validation_split", "test_split")


class Daemon:
    """Looks at all conditions, one tick after the other; the assets that it would materialize."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance = instance
        self._cursor: Any = None

    def tick(self) -> set[str]:
        result = dg.evaluate_automation_conditions(defs, self._instance, cursor=self._cursor)
        self._cursor = result.cursor
        keys = defs.resolve_asset_graph().get_all_asset_keys()
        return {key.to_user_string() for key in keys if result.get_num_requested(key)}


def test_assets_follow_their_inputs_only_behind_passed_checks(instance: dg.DagsterInstance) -> None:
    daemon = Daemon(instance)
    assert daemon.tick() == set()
    materialized(instance, "raw_csv", "feature_group")
    passed(instance, "raw_csv", "schema", ok=True)
    passed(instance, "feature_group", "reconciliation", ok=False)
    assert daemon.tick() == set()
    materialized(instance, "feature_group")
    passed(instance, "feature_group", "reconciliation", ok=True)
    assert daemon.tick() == set(SPLITS), "new data does not retrain"

    materialized(instance, *SPLITS, "tuned_model")
    for check in ("no_leakage", "split_fractions"):
        passed(instance, "train_split", check, ok=True)
    for check in defs.resolve_asset_graph().asset_check_keys:
        if check.asset_key.to_user_string() == "tuned_model":
            passed(instance, "tuned_model", check.name, ok=True)
    assert "evaluation_report" in daemon.tick()


def test_drift_retrains(instance: dg.DagsterInstance) -> None:
    daemon = Daemon(instance)
    materialized(instance, "raw_csv", "feature_group", *SPLITS, "tuned_model")
    for check in ("no_leakage", "split_fractions", "feature_drift"):
        passed(instance, "train_split", check, ok=True, blocking=check != "feature_drift")
    daemon.tick()
    assert "tuned_model" not in daemon.tick()
    passed(instance, "train_split", "feature_drift", ok=False, blocking=False)
    assert "tuned_model" in daemon.tick()
    materialized(instance, "tuned_model")
    assert "tuned_model" not in daemon.tick(), "once a finding"
