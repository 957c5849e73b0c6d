"""What a run prints on a terminal, and the summary behind it: of a run that passes, is stopped, fails, never starts."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from housing_assets.reporting import summary
from housing_assets.reporting.summary import console_logger, plain_reason
from resources.pipes_session import pipes_session

RAY = (
    "\x1b[36mray::fit()\x1b[39m (pid=123, ip=127.0.0.1)\n"
    '  File "/x/step.py", line 3, in fit\n    raise ValueError("boom")\nValueError: the disk said boom'
)


class Broken(dg.ConfigurableResource):
    """A resource that refuses the configuration of the run."""

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        raise dg.Failure("run configuration: x is wrong")


@dg.asset
def raw_csv(context: dg.AssetExecutionContext) -> None:
    context.log.debug("a detail")
    context.log.info("half way")


@dg.asset_check(asset=raw_csv)
def taste() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=False, severity=dg.AssetCheckSeverity.WARN, description="stale")


@dg.asset(deps=[raw_csv])
def evaluation_report() -> None: ...


@dg.asset_check(asset=evaluation_report, name="rmse_threshold", blocking=True)
def gate() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=False, description="RMSE 11,989.9, threshold 1")


@dg.asset(deps=[raw_csv])
def crashing() -> None:
    try:
        raise RuntimeError("an inner fault")
    except RuntimeError as error:
        raise dg.Failure(f"tune_model failed: {RAY}") from error


@dg.asset
def configured(broken: Broken) -> None: ...


@dg.asset
def cancelled(context: dg.AssetExecutionContext) -> None:
    with pipes_session(
        context,
        context_injector=dg.PipesTempFileContextInjector(),
        message_reader=dg.PipesTempFileMessageReader(),
    ):
        raise dg.Failure("told to stop")


ALL = [raw_csv, taste, evaluation_report, gate, crashing, configured, cancelled]


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    # Dagster would keep what is printed, and have another process print it, some time later.
    kept = "{module: dagster._core.storage.noop_compute_log_manager, class: NoOpComputeLogManager}"
    (tmp_path / "dagster.yaml").write_text(f"telemetry: {{enabled: false}}\ncompute_logs: {kept}\n")
    with dg.DagsterInstance.get() as found:
        yield found


def lines_of(instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str], *names: str) -> list[str]:
    """What a run of some assets prints, without the time of day."""
    defs = dg.Definitions(
        assets=[a for a in ALL if isinstance(a, dg.AssetsDefinition) and not isinstance(a, dg.AssetChecksDefinition)],
        asset_checks=[taste, gate],
        resources={"broken": Broken()},
        loggers={"console": console_logger},
        jobs=[dg.define_asset_job("some", dg.AssetSelection.assets(*names))],
    )
    job = defs.resolve_job_def("some")
    capfd.readouterr()
    job.execute_in_process(instance=instance, raise_on_error=False, run_config={"loggers": {"console": {}}})
    return [line.partition("  ")[2] or line for line in capfd.readouterr().err.splitlines()]


def told(instance: dg.DagsterInstance) -> list[str]:
    [run] = instance.get_runs(limit=1)
    return summary.failure_summary(instance, run).splitlines()


def test_a_run_that_passes_prints_progress_and_warnings(
    instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lines_of(instance, capfd, "raw_csv") == [
        "raw_csv: half way",
        "raw_csv: materialized",
        "warning: check taste of raw_csv failed: stale",
    ]


def test_a_run_that_the_gate_stops_ends_with_figures_and_remedy(
    instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of(instance, capfd, "evaluation_report")
    assert lines == [
        "evaluation_report: materialized",
        "error: check rmse_threshold of evaluation_report failed: RMSE 11,989.9, threshold 1",
    ]
    *_, made, last = told(instance)
    assert made == "Made:   evaluation_report"
    assert last.startswith(
        "Error:  check rmse_threshold of evaluation_report failed: RMSE 11,989.9, threshold 1. Remedy: improve"
    )
    assert last.endswith("materialize evaluation_report with another rmse_threshold")


def test_a_step_that_fails_says_its_last_line(instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(instance, capfd, "raw_csv", "crashing")
    [error] = [line for line in lines if line.startswith("error: ")]
    assert error.startswith("error: crashing failed: ")
    assert not any("\x1b" in line or "File " in line or "Traceback" in line for line in lines)
    *_, made, last = told(instance)
    assert made == "Made:   raw_csv"
    assert last.startswith("Error:  crashing failed: ")
    assert "File" not in last


def test_a_run_that_never_starts_says_why(instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str]) -> None:
    assert lines_of(instance, capfd, "configured") == ["error: run configuration: x is wrong"]
    assert told(instance)[-2:] == ["Made:   nothing", "Error:  run configuration: x is wrong"]


def test_a_cancelled_session_gives_no_advice(instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str]) -> None:
    lines_of(instance, capfd, "cancelled")
    [run] = instance.get_runs(limit=1)
    assert not [
        e for e in instance.all_logs(run.run_id) if "[pipes] did not receive" in (e.user_message or e.message or "")
    ]


def test_reasons() -> None:
    assert plain_reason(RAY) == "ValueError: the disk said boom"
    assert plain_reason(f"tune_model failed: {RAY}") == "tune_model failed: ValueError: the disk said boom"
    cause = "The above exception was the direct cause of the following exception:"
    nested = f"{RAY}\n\n{cause}\n\n{RAY.replace('boom', 'bang')}"
    assert plain_reason(nested) == "ValueError: the disk said bang"
    python = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    g()\nKeyError: 3\n'
    assert plain_reason(python) == "KeyError: 3"
    assert plain_reason(f"own words\n{python}") == "own words"
    assert plain_reason('\x1b[31mred\x1b[0m\n\nStack Trace:\n  File "a.py"') == "red"
    job = "job j ended as Failed\nLast 2 log lines of algo-1:\n  Traceback (most recent call last):\n  x\nDo this."
    assert plain_reason(job) == job, "the lines of a job's log belong to its message"


def test_nothing_is_told_of_an_earlier_run(instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str]) -> None:
    lines_of(instance, capfd, "crashing")
    assert summary.main(["99999999999"]) == 0
    assert capfd.readouterr().out == ""
    assert summary.main(["0"]) == 0
    assert "crashing failed" in capfd.readouterr().out
