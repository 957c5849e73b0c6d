"""The status of a job's cluster in Ray's control store (GCS) on the head: its members, and how the step ended.

The head publishes the outcome there; the workers read it and acknowledge it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

# Ray's public API reaches the control store only from a driver, which Ray kills when the head is lost; a host has to
# live on to report that loss.
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  # a compiled module
from ray.exceptions import AuthenticationError, RayError

from step_scripts.runner.ray_session import is_open

_NAMESPACE = b"housing_cluster"
_OUTCOME = b"outcome"
_ACKNOWLEDGED = b"acknowledged/"
_ALIVE = 0  # GcsNodeInfo.ALIVE


class HeadUnavailable(Exception):
    """The head cannot be asked at the moment."""


class HeadUnreachable(HeadUnavailable):
    """Nothing accepts connections at the head's address."""


class HeadUnresponsive(HeadUnavailable):
    """The head accepts connections, and does not answer in time."""


class TokenRefused(Exception):
    """The head does not know this host's token. Trying again does not help."""


@dataclass(frozen=True)
class JobOutcome:
    """How the step ended. `failure` is None if it succeeded."""

    failure: dict[str, Any] | None


class ClusterStatusClient:
    """Reads and writes the status. A call takes about `seconds` at most.

    Every method raises `HeadUnavailable` or `TokenRefused` if the head does not answer.
    """

    def __init__(self, address: str, port: int, seconds: float = 2.0) -> None:
        self.address, self.port = address, port
        self._seconds = seconds
        self._client: Any = None
        self.node_ports: dict[str, int] = {}

    def nodes(self) -> dict[str, str | None]:
        """Address of each host that has ever joined, by name; None for a host that is gone.

        Sets `node_ports` to the ports of Ray on the hosts that are alive.
        """
        found: dict[str, str | None] = {}
        for node in self._call("get_all_node_info").values():
            if node.state == _ALIVE:
                found[node.node_name] = node.node_manager_address
                self.node_ports[node.node_name] = node.node_manager_port
            else:
                found.setdefault(node.node_name, None)
        return found

    def publish(self, outcome: JobOutcome) -> None:
        """Tell all hosts how the step has ended."""
        value = json.dumps({"failure": outcome.failure}).encode()
        self._call("internal_kv_put", _OUTCOME, value, True, _NAMESPACE)

    def outcome(self) -> JobOutcome | None:
        """How the step ended; None while it runs."""
        value = self._call("internal_kv_get", _OUTCOME, _NAMESPACE)
        return None if value is None else JobOutcome(json.loads(value)["failure"])

    def acknowledge(self, host: str) -> None:
        """Tell the head that `host` has read the outcome."""
        self._call("internal_kv_put", _ACKNOWLEDGED + host.encode(), b"1", True, _NAMESPACE)

    def acknowledged(self) -> set[str]:
        """The hosts that have read the outcome."""
        keys = self._call("internal_kv_keys", _ACKNOWLEDGED, _NAMESPACE)
        return {key.removeprefix(_ACKNOWLEDGED).decode() for key in keys}

    def _call(self, method: str, *arguments: object) -> Any:
        # Ray's client waits long for a head that is gone, and finally ends the whole process.
        if not is_open(self.address, self.port, self._seconds):
            self._client = None
            raise HeadUnreachable(f"nothing answers at {self.address}:{self.port}")
        try:
            if self._client is None:
                self._client = GcsClient(address=f"{self.address}:{self.port}")
            return getattr(self._client, method)(*arguments, timeout=self._seconds)
        except AuthenticationError as error:
            raise TokenRefused(str(error)) from error
        except (RayError, TimeoutError, OSError) as error:
            self._client = None
            raise HeadUnresponsive(f"{type(error).__name__}: {error}") from error
