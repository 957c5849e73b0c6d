"""Stops a job and makes sure that it is stopping."""

from __future__ import annotations

import logging
import time
from typing import Any

import dagster as dg

from resources.aws.calls import AwsCaller, error_message, is_missing
from resources.sagemaker.job_kinds import TERMINAL, JobKind

_APPEARANCE_SECONDS = 2.0


def stop_job(kind: JobKind, client: Any, name: str, log: dg.DagsterLogManager | logging.Logger, seconds: float) -> None:
    """Stop the job and wait until it is `Stopping` or has ended, for at most `seconds`.

    Never raises an AWS error: this runs while another error is on its way. A job that does not exist is waited for a
    moment, because an interrupted create request may still take effect.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    log.warning(f"Stopping {kind.noun} {name}")
    which: dict[str, Any] = {kind.name_member: name}
    call = AwsCaller(seconds, longest_delay_seconds=2.0)
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        try:
            state = call(kind.method(client, "describe"), **which)[kind.status_member]
            if state in (*TERMINAL, "Stopping"):
                log.warning(f"{kind.noun} {name} is {state}")
                return
            call(kind.method(client, "stop"), **which)
        except (ClientError, BotoCoreError) as error:
            if not is_missing(error):
                log.error(f"{kind.noun} {name}: {error_message(error)}; trying again to stop it")
            elif time.monotonic() - start > _APPEARANCE_SECONDS:
                return
        time.sleep(0.25)
    log.error(f"{kind.noun} {name} could not be stopped; stop it by hand: it costs money until then")
