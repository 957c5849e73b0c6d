"""What a run prints on a terminal: progress, warnings, failed checks, and why a step failed; a line each.

Dagster's own console logger prints every event of its engine, and the stack trace of a failure twice. `make run`
chooses this one in `console.yaml`; elsewhere it is chosen by `loggers: {console: {}}` in the run's configuration.
"""

from __future__ import annotations

import logging
import re
import sys

import dagster as dg
from dagster_shared.error import SerializableErrorInfo  # Dagster itself does not export it

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CHECK_FAILED = "dagster._core.errors.DagsterAssetCheckFailedError"
# Dagster's words for what the lines before have said already, and for the channel between a run and its steps.
_NOISE = re.compile(r"\[pipes\] |Dependencies for step .* Not executing\.$")
_LEVELS = {logging.WARNING: "warning: ", logging.ERROR: "error: ", logging.CRITICAL: "error: "}
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
    """What the terminal says of an event of Dagster's; `None` for what only the UI shows."""
    if event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION:
        key = event.asset_key
        partition = f" of {event.partition}" if event.partition else ""
        return f"{key.to_user_string()}{partition}: materialized" if key else None
    if event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
        check = event.asset_check_evaluation_data
        if check.passed:
            return None
        level = "error: " if check.severity == dg.AssetCheckSeverity.ERROR else "warning: "
        why = f": {check.description}" if check.description else ""
        return f"{level}check {check.check_name} of {check.asset_key.to_user_string()} failed{why}"
    if event.event_type == dg.DagsterEventType.STEP_UP_FOR_RETRY and (error := event.step_retry_data.error):
        return f"warning: {event.step_key} failed and is tried again: {said(error)}"
    return f"error: {reason}" if (reason := failure_reason(event)) is not None else None


def failure_reason(event: dg.DagsterEvent) -> str | None:
    """What failed and why, without stack traces. `None` if nothing did, or if other events say so themselves."""
    if event.is_step_failure:
        error = event.step_failure_data.error
        text = said(error) if error else plain_reason(event.message or "")
        return None if text.startswith(_CHECK_FAILED) else f"{event.step_key} failed: {text}"
    if event.is_job_failure and event.job_failure_data.first_step_failure_event is None:
        error = event.job_failure_data.error
        text = said(error) if error else ""
        # In the process of `dagster asset materialize` a check that blocks ends the run by an exception.
        return None if not text or text.startswith(_CHECK_FAILED) else text
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
            self.stream.write(f"{self.formatTime(record)}  {line}\n")
            self.flush()

    @staticmethod
    def formatTime(record: logging.LogRecord) -> str:
        """Time of day."""
        return logging.Formatter().formatTime(record, "%H:%M:%S")


@dg.logger(config_schema={}, description="Progress, warnings, failed checks and reasons of failures, a line each.")
def console_logger(context: dg.InitLoggerContext) -> logging.Logger:
    """A logger that prints on standard error."""
    logger = logging.Logger("housing_assets.reporting.console", level=logging.DEBUG)
    logger.addHandler(_ConsoleHandler(sys.stderr))
    return logger
