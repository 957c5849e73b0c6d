"""The files that whoever started a job has put into its folder: request, Pipes bootstrap, token, limits."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping

from step_scripts.cluster.limits import ClusterLimits, Deadline, limits_from, pauses
from step_scripts.runner import storage
from step_scripts.runner.contract import StepRequest
from step_scripts.runner.interruption import Alarm

REQUEST, PIPES, TOKEN, LIMITS = "request.json", "pipes.json", "ray_token", "cluster.json"
_TRANSIENT_SECONDS = 60.0
_log = logging.getLogger(__name__)


class JobFiles:
    """Reads the files below `uri`; trouble with the store is borne for a minute, or until `alarm` asks for the end."""

    def __init__(self, uri: str, alarm: Alarm | None = None) -> None:
        self.uri = uri
        self._alarm = alarm

    def limits(self, environment: Mapping[str, str]) -> ClusterLimits:
        """The limits of `cluster.json`, if there is one, and the environment."""
        return limits_from(self._read(LIMITS), environment)

    def request(self) -> StepRequest:
        """What to run. Raises `FileNotFoundError`."""
        content = self._read(REQUEST)
        if content is None:
            raise FileNotFoundError(f"there is no {storage.join(self.uri, REQUEST)}")
        return StepRequest.model_validate_json(content)

    def pipes(self) -> dict[str, str] | None:
        """How to reach Dagster; None: not at all."""
        content = self._read(PIPES)
        return None if content is None else json.loads(content)

    def token(self) -> str | None:
        """The secret that the hosts share."""
        content = self._read(TOKEN)
        return None if content is None else content.decode().strip()

    def _read(self, name: str) -> bytes | None:
        uri = storage.join(self.uri, name)
        deadline = Deadline(_TRANSIENT_SECONDS)
        for pause in pauses(5.0):
            try:
                return storage.read_bytes(uri)
            except FileNotFoundError:
                return None
            except OSError as error:
                if deadline.passed or (self._alarm is not None and self._alarm.stop_requested):
                    raise
                _log.warning("reading %s failed, trying again: %s", uri, error)
            (time.sleep if self._alarm is None else self._alarm.wait)(min(pause, deadline.left))
        raise AssertionError("unreachable")
