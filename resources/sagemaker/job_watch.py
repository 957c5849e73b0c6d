"""Status changes of a job as progress messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from resources.sagemaker.job_kinds import JobKind

if TYPE_CHECKING:
    from resources.sagemaker.job_metadata import StatusChange


class JobWatch:
    """Reports each status and secondary status once, with SageMaker's message; appends it to `history`."""

    def __init__(self, kind: JobKind, say: Callable[[str], None], history: list[StatusChange]) -> None:
        self._kind = kind
        self._say = say
        self._history = history
        self._transitions = 0
        self._status = ""

    def see(self, description: Mapping[str, Any]) -> bool:
        """Report what is new in a description; whether there was anything."""
        status = description[self._kind.status_member]
        transitions = description.get("SecondaryStatusTransitions", [])
        new = transitions[self._transitions :]
        for item in new:
            message = item.get("StatusMessage", "")
            self._say(f"SageMaker: {item['Status']}" + (f": {message}" if message else ""))
        if status != self._status:
            self._history.append((status, datetime.now(UTC)))
            if not transitions:
                self._say(f"SageMaker: {status}")
        changed = bool(new) or status != self._status
        self._transitions, self._status = len(transitions), status
        return changed
