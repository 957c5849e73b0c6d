"""What the hosts of a Ray cluster tell each other through Ray's control store (GCS), without a Ray driver.

The head's supervisor writes there how the step ended; the others read it and write that they have. Who is part of the
cluster is read there too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  # a compiled module
from ray.exceptions import AuthenticationError, RayError

from step_scripts.runner.ports import is_open

_NAMESPACE = b"housing_cluster"
_END = b"end"
_KNOWS = b"knows/"
_ALIVE = 0  # GcsNodeInfo.ALIVE


class HeadUnreachable(Exception):
    """Nothing accepts connections at the head's address."""


class HeadSilent(Exception):
    """The head accepts connections, and does not answer in time."""


class TokenRefused(Exception):
    """The head does not know this host's token. Trying again does not help."""


@dataclass(frozen=True)
class End:
    """How the step ended. `failure` is None if it succeeded."""

    failure: dict[str, Any] | None


class HeadLink:
    """Access to the head's control store. Each call takes about `seconds` at most, and may raise the errors above."""

    def __init__(self, address: str, port: int, seconds: float = 2.0) -> None:
        self.address, self.port = address, port
        self._seconds = seconds
        self._client: Any = None
        self.node_ports: dict[str, int] = {}

    def nodes(self) -> dict[str, str | None]:
        """Address of each host that has ever joined, by its name; None for one that is gone.

        `node_ports` then has the ports of Ray on the hosts that are there.
        """
        found: dict[str, str | None] = {}
        for node in self._call("get_all_node_info").values():
            if node.state == _ALIVE:
                found[node.node_name] = node.node_manager_address
                self.node_ports[node.node_name] = node.node_manager_port
            else:
                found.setdefault(node.node_name, None)
        return found

    def publish(self, end: End) -> None:
        """Tell all hosts that the step has ended."""
        value = json.dumps({"failure": end.failure}).encode()
        self._call("internal_kv_put", _END, value, True, _NAMESPACE)

    def end(self) -> End | None:
        """How the step ended; None while it runs."""
        value = self._call("internal_kv_get", _END, _NAMESPACE)
        return None if value is None else End(json.loads(value)["failure"])

    def confirm(self, host: str) -> None:
        """Tell the head that `host` knows the end."""
        self._call("internal_kv_put", _KNOWS + host.encode(), b"1", True, _NAMESPACE)

    def confirmed(self) -> set[str]:
        """The hosts that know the end."""
        keys = self._call("internal_kv_keys", _KNOWS, _NAMESPACE)
        return {key.removeprefix(_KNOWS).decode() for key in keys}

    def _call(self, method: str, *arguments: object) -> Any:
        # Ray's client waits long for a head that is gone, and in the end takes the whole process with it.
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
            raise HeadSilent(f"{type(error).__name__}: {error}") from error
