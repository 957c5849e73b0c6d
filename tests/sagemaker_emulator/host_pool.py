"""Makes emulated hosts and starts their processes."""

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.sagemaker_emulator.environments import Environments
from tests.sagemaker_emulator.hosts import IMAGE_ENVIRONMENT, Host, HostError, LoopbackHost, NamespaceHost, Place
from tests.sagemaker_emulator.launcher import Launcher
from tests.sagemaker_emulator.leftovers import State, kill_owned
from tests.sagemaker_emulator.network import Bridge
from tests.sagemaker_emulator.probe import Abilities


class HostPool:
    """Makes hosts of the kind this machine allows."""

    def __init__(self, state: State, abilities: Abilities, expose: Sequence[str | Path]) -> None:
        self.state = state
        self.namespaces = abilities.namespaces
        self.overlay = abilities.overlay
        self.reason = abilities.reason
        self.bridge = Bridge(state) if abilities.namespaces else None
        self.expose = _below_tmp(expose, state.root)
        self.environments = Environments(state.root / "environments")
        self._launcher = Launcher()
        self._lock = threading.Lock()
        self._loopback = 1
        (state.root / "hosts").mkdir()
        if abilities.namespaces and not abilities.overlay:
            state.ensure_mount_point(Path("/opt/ml"))
            state.ensure_mount_point(Path(IMAGE_ENVIRONMENT))

    @property
    def kind(self) -> str:
        """`namespaces` or `loopback`."""
        return "namespaces" if self.namespaces else "loopback"

    def create(self, group: str, name: str, volumes: Sequence[str] = ()) -> Host:
        """A host that is not started yet. `group` (a job's attempt) and `name` together are unique."""
        directory = self.state.root / "hosts" / group / name
        directory.mkdir(parents=True)
        marker = f"{self.state.owner}/{group}/{name}"
        if self.bridge is None:
            return LoopbackHost(Place(directory, name, self._loopback_address(), marker, volumes), self._launcher)
        place = Place(directory, name, self.bridge.allocate(), marker, volumes)
        return NamespaceHost(place, self._launcher, self.bridge, self.overlay, self.expose)

    def close(self) -> None:
        """Kill every process of this emulator and remove the bridge."""
        kill_owned(self.state.owner)
        self._launcher.close()
        if self.bridge is not None:
            self.bridge.remove()

    def _loopback_address(self) -> str:
        """Next loopback address, 127.0.0.2 to 127.0.0.254 in turn."""
        with self._lock:
            self._loopback = self._loopback % 254 + 1
            if self._loopback == 1:
                self._loopback = 2
            return f"127.0.0.{self._loopback}"


def _below_tmp(extra: Sequence[str | Path], own: Path) -> list[Path]:
    """Directories that a host's private /tmp would hide: the interpreter's, the project's, and what was asked for."""
    project = Path(__file__).resolve().parents[2]
    wanted = [Path(sys.prefix), Path(sys.base_prefix), project, *(Path(path) for path in extra)]
    below: list[Path] = []
    for path in sorted({path.resolve() for path in wanted if path.exists()}):
        inside_other = any(path.is_relative_to(other) for other in below)
        if path.is_relative_to("/tmp") and path != Path("/tmp") and not inside_other:
            if own.is_relative_to(path):
                raise HostError(f"{path} cannot be shown to hosts: the emulator's own directory lies in it")
            below.append(path)
    return below
