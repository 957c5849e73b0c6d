"""What a terminal shows: a line for each event of a run, and at the end of `make run` what it made, or why it failed.

Dagster's own console logger prints every event of its engine, and the stack trace of a failure twice. `make run`
chooses ours in `console.yaml`; elsewhere it is chosen by `loggers: {console: {}}` in the run's configuration.
`python -m housing_assets.reporting.summary` prints the end.
"""

from __future__ import annotations

import logging
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
from dagster_shared.error import SerializableErrorInfo  # Dagster itself does not export it

from housing_assets.checks.comparisons import typical_row
from housing_assets.checks.gate import REMEDIES
from housing_assets.settings import Settings
from resources.endpoints.base import EndpointStatus
from resources.model_registry.base import ModelVersion
from resources.references.io_manager import event_log_name, latest_file, read_reference
from resources.references.types import EvaluationRef, ModelRef
from step_scripts.runner import storage
from step_scripts.runner.wording import number, percent

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CHECK_FAILED = "dagster._core.errors.DagsterAssetCheckFailedError"
# Dagster's words for what the lines before have said already, and for the channel between a run and its steps.
_NOISE = re.compile(r"\[pipes\] |Dependencies for step .* Not executing\.$")
_WARNING, _ERROR = "warning: ", "error: "
_LEVELS = {logging.WARNING: _WARNING, logging.ERROR: _ERROR, logging.CRITICAL: _ERROR}
# What follows the text of a failure is of no use on a terminal. Log lines of a job, which may hold such
# words too, are indented.
_TRACE = re.compile(r"^(?:Stack Trace:|Traceback \(most recent call last\):|The above exception )", re.MULTILINE)
# Ray puts the traceback first: of each process that was in between.
_RAY = re.compile(r"\bray::.*\(pid=.*\)$", re.MULTILINE)


def plain_reason(text: str) -> str:
    """An error's text without escape codes and stack traces."""
    text = _ESCAPES.sub("", text).strip()
    ray = _RAY.search(text)
    own = (text[: ray.start()] if ray else _TRACE.split(text)[0]).strip()
    if own and not ray:
        return own
    last = [line for line in text.splitlines() if line.strip() and not line[0].isspace()][-1:]
    return " ".join([own, *last]).strip()


def console_line(event: dg.DagsterEvent) -> str | None:
    """What the terminal says of an event of Dagster's; `None` for what only the UI shows, or other events say."""
    if event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION:
        key = event.asset_key
        partition = f" of {event.partition}" if event.partition else ""
        return f"{key.to_user_string()}{partition}: materialized" if key else None
    if event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
        check = event.asset_check_evaluation_data
        if check.passed:
            return None
        level = _ERROR if check.severity == dg.AssetCheckSeverity.ERROR else _WARNING
        why = f": {check.description}" if check.description else ""
        return f"{level}check {check.check_name} of {check.asset_key.to_user_string()} failed{why}"
    if event.event_type == dg.DagsterEventType.STEP_UP_FOR_RETRY and (error := event.step_retry_data.error):
        return f"{_WARNING}{event.step_key} failed and is tried again: {said(error)}"
    if event.is_step_failure:
        error = event.step_failure_data.error
        text = said(error) if error else plain_reason(event.message or "")
        return None if text.startswith(_CHECK_FAILED) else f"{_ERROR}{event.step_key} failed: {text}"
    if event.is_job_failure and event.job_failure_data.first_step_failure_event is None:
        error = event.job_failure_data.error
        text = said(error) if error else ""
        # In the process of `dagster asset materialize` a check that blocks ends the run by an exception.
        return None if not text or text.startswith(_CHECK_FAILED) else f"{_ERROR}{text}"
    return None


def said(error: SerializableErrorInfo) -> str:
    """What the error that was raised first says."""
    while error.cause is not None:
        error = error.cause
    text = plain_reason(error.message)
    # The class is Dagster's word for it; a message of ours says what is wrong.
    return text.removeprefix("dagster._core.definitions.events.Failure: ")


class _ConsoleHandler(logging.StreamHandler):  # pyright: ignore[reportMissingTypeArgument]
    def emit(self, record: logging.LogRecord) -> None:
        """Print the line, if there is one for the terminal."""
        metadata = getattr(record, "dagster_meta", {})
        event = metadata.get("dagster_event")
        if event is not None:
            line = console_line(event)
        elif record.levelno < logging.INFO or _NOISE.search(record.getMessage()):
            line = None
        else:
            step = metadata.get("step_key")
            text = _ESCAPES.sub("", str(metadata.get("orig_message", record.getMessage())))
            line = f"{_LEVELS.get(record.levelno, '')}{step + ': ' if step else ''}{text}"
        if line is not None:
            self.stream.write(f"{logging.Formatter().formatTime(record, '%H:%M:%S')}  {line}\n")
            self.flush()


@dg.logger(config_schema={}, description="Progress, warnings, failed checks and reasons of failures, a line each.")
def console_logger(context: dg.InitLoggerContext) -> logging.Logger:
    """A logger that prints on standard error."""
    logger = logging.Logger("housing_assets.reporting.summary", level=logging.DEBUG)
    logger.addHandler(_ConsoleHandler(sys.stderr))
    return logger


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
    m, typical = evaluation.metrics, typical_row(model.model).write_csv(include_header=False).strip()
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
        f"  curl -s {shlex.quote(endpoint.url)} -H 'Content-Type: text/csv' -d '{typical}'",
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
        elif (line := console_line(event) or "").startswith(_ERROR):
            is_check = event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
            asset = event.asset_check_evaluation_data.asset_key.to_user_string() if is_check else ""
            failed.append(line.removeprefix(_ERROR) + (f". Remedy: {REMEDIES[asset]}" if asset in REMEDIES else ""))
    lines = ["", f"Run {run.run_id[:8]} is {run.status.value}."]
    lines += [f"Made:   {', '.join(dict.fromkeys(made)) or 'nothing'}"]
    lines += [f"Error:  {line}" for line in dict.fromkeys(failed)]
    return "\n".join(lines)


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
