"""Why a job failed: as plain data (see `step_scripts.runner.execution.failure_of`), as text for SageMaker's failure
file, and back.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from step_scripts.runner import execution

LONGEST = 960
"""Characters. SageMaker keeps 1024, and adds text of its own before and after."""
_KEY = "step_error"


class ClusterError(Exception):
    """The cluster of the job's hosts could not be formed, or broke. The message says it all: no traceback is kept."""


def failure_of(error: BaseException) -> dict[str, Any]:
    """An exception as plain data."""
    return {"kind": "crash", "message": str(error)} if isinstance(error, ClusterError) else execution.failure_of(error)


def failure_text(failure: dict[str, Any]) -> str:
    """The failure in at most `LONGEST` characters, reason first.

    An input error is JSON, `{"step_error": {…}}`, without the details if they do not fit. Any other failure is the
    message, followed by the end of the traceback if there is one.
    """
    if failure["kind"] != "input":
        message = str(failure["message"])[:LONGEST]
        trace = str(failure.get("traceback") or "").strip()
        room = LONGEST - len(message) - 1
        return f"{message}\n{trace[-room:]}" if trace and room > 80 else message
    message, details = str(failure["message"]), failure.get("details") or {}
    if details and len(text := _json(message, details)) <= LONGEST:
        return text
    while len(text := _json(message, None)) > LONGEST:  # escaping lengthens characters, hence a loop
        message = message[: len(message) - max(1, (len(text) - LONGEST) // 6) - 1] + "…"
    return text


def failure_from(text: str) -> dict[str, Any] | None:
    """The input error in a text such as a job's FailureReason; None if the text holds none."""
    start = text.find(f'{{"{_KEY}"')
    if start < 0:
        return None
    with contextlib.suppress(ValueError, TypeError, KeyError):
        found = json.JSONDecoder().raw_decode(text, start)[0][_KEY]
        return {"kind": found["kind"], "message": found["message"], "details": found.get("details") or {}}
    return None


def write_failure(path: Path, failure: dict[str, Any]) -> None:
    """Write the file that SageMaker reads after the job."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(failure_text(failure), encoding="utf-8")


def _json(message: str, details: dict[str, Any] | None) -> str:
    content = {"kind": "input", "message": message} | ({"details": details} if details else {})
    return json.dumps({_KEY: content}, ensure_ascii=False, default=str)
