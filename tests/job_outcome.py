"""What a job of one op came to."""

from __future__ import annotations

from typing import Any

import dagster as dg


def outcome(done: dg.ExecuteInProcessResult) -> tuple[bool, dict[str, Any]]:
    """Whether the job succeeded, and the metadata of its op or of the op's failure."""
    for event in done.all_events:
        if event.is_step_failure:
            failure = event.step_failure_data.user_failure_data
            assert failure is not None, event.step_failure_data.error
            return False, {"error": failure.description} | {k: v.value for k, v in failure.metadata.items()}
        if event.is_successful_output:
            return True, {k: v.value for k, v in event.step_output_data.metadata.items()}
    raise AssertionError("nothing happened")
