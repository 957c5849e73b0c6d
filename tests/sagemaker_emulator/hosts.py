"""Emulated hosts: a process tree with an /opt/ml, a name and an address of its own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.sagemaker_emulator.launcher import Launcher
from tests.sagemaker_emulator.leftovers import OWNER_VARIABLE, kill_owned
from tests.sagemaker_emulator.network import Bridge

_INIT = Path(__file__).with_name("host_init.py")
_PRIVATE_DIRECTORIES = ("ml", "tmp", "etc", "scratch", "merged")

# Where a host with isolated mounts sees its own copy of the image's virtual environment.
IMAGE_ENVIRONMENT = "/opt/venv"

LineSink = Callable[[str], None]


class HostError(RuntimeError):
    """A host could not be set up."""


@dataclass(frozen=True)
class Place:
    """Where a host lives: its directory, name, address, the mark of its processes, paths that are to be its own."""

    directory: Path
    name: str
    address: str
    marker: str
    volumes: Sequence[str] = ()


class Host(ABC):
    """One emulated host. `ml` is the directory that is /opt/ml inside it."""

    def __init__(self, place: Place, launcher: Launcher) -> None:
        directory = self.directory = place.directory
        self.name = place.name
        self.address = place.address
        self.marker = place.marker
        self._launcher = launcher
        self.exit_code: int | None = None
        self.killed = False
        self.on_exit: Callable[[], None] = lambda: None
        self.on_close: Callable[[], None] = lambda: None  # before the directory is deleted
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = threading.Event()
        for part in _PRIVATE_DIRECTORIES:
            (directory / part).mkdir(parents=True)
        (directory / "tmp").chmod(0o1777)
        self._volumes: dict[str, Path] = {}
        for number, path in enumerate(place.volumes):
            self._volumes[path] = directory / f"volume-{number}"
            self._volumes[path].mkdir()

    @property
    def ml(self) -> Path:
        """The directory that is /opt/ml inside the host."""
        return self.directory / "ml"

    def local(self, path: str) -> Path:
        """Where a path inside the host lies on this machine."""
        for volume, place in {"/opt/ml": self.ml, **self._volumes}.items():
            if path == volume or path.startswith(volume.rstrip("/") + "/"):
                return place / path[len(volume) :].lstrip("/")
        raise HostError(f"{path} is neither below /opt/ml nor a volume of {self.name}")

    def show_environment(self, copy: Path) -> str:
        """Where a virtual environment that is a copy of this host's own is inside the host."""
        return str(copy)

    @abstractmethod
    def set_names(self, names: Mapping[str, str]) -> None:
        """Write the host's view of names and addresses."""

    @abstractmethod
    def start(self, command: Sequence[str], environment: Mapping[str, str], workdir: str, sink: LineSink) -> None:
        """Start the container's command; `sink` gets its output line by line."""

    @abstractmethod
    def _signal(self, number: signal.Signals) -> None: ...

    @property
    def started(self) -> bool:
        """Whether a command was started."""
        return self._process is not None

    @property
    def running(self) -> bool:
        """Whether the command was started and has not ended."""
        return self.started and not self._exited.is_set()

    def terminate(self) -> None:
        """SIGTERM to the container's main process."""
        if self.running:
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to everything on the host."""
        if self.running:
            self.killed = True
            self._signal(signal.SIGKILL)

    def wait(self, timeout: float) -> bool:
        """Wait for the end; True if it came."""
        return not self.started or self._exited.wait(timeout)

    def close(self) -> None:
        """Kill what runs and delete the host's directory."""
        self.kill()
        if not self.wait(10):
            kill_owned(self.marker)
            self.wait(10)
        self.on_close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _follow(self, process: subprocess.Popen[bytes], sink: LineSink) -> None:
        self._process = process
        reader = threading.Thread(target=_read_lines, args=(process, sink), daemon=True)
        reader.start()
        threading.Thread(target=self._await_exit, args=(process, reader), daemon=True).start()

    def _await_exit(self, process: subprocess.Popen[bytes], reader: threading.Thread) -> None:
        code = process.wait()
        kill_owned(self.marker)
        reader.join(10)
        # unshare does not pass on reliably that its child was killed.
        self.exit_code = 137 if self.killed and code else code if code >= 0 else 128 - code
        self._exited.set()
        self.on_exit()


class NamespaceHost(Host):
    """A host with network, mount, UTS, IPC and PID namespaces of its own."""

    def __init__(self, place: Place, launcher: Launcher, bridge: Bridge, overlay: bool, expose: Sequence[Path]) -> None:
        super().__init__(place, launcher)
        self._bridge = bridge
        self._overlay = overlay
        self._expose = expose
        self._init_pid: int | None = None

    def show_environment(self, copy: Path) -> str:
        self._volumes[IMAGE_ENVIRONMENT] = copy
        return IMAGE_ENVIRONMENT

    def set_names(self, names: Mapping[str, str]) -> None:
        lines = ["127.0.0.1 localhost", "::1 localhost", *(f"{a} {n}" for n, a in names.items())]
        # Written in place: the file is bind-mounted, a new inode would not be seen.
        with (self.directory / "etc" / "hosts").open("w") as file:
            file.write("\n".join(lines) + "\n")

    def start(self, command: Sequence[str], environment: Mapping[str, str], workdir: str, sink: LineSink) -> None:
        (self.directory / "etc" / "hostname").write_text(self.name + "\n")
        binds = [(self.ml, "/opt/ml")]
        binds += [(self.directory / "etc" / file, f"/etc/{file}") for file in ("hosts", "hostname")]
        binds += [(place, path) for path, place in self._volumes.items()]
        # Last, because without a root of its own it hides the places the others come from.
        binds.append((self.directory / "tmp", "/tmp"))
        error_file = self.directory / "init-error"
        spec = {
            "name": self.name,
            "address": self.address,
            "directory": str(self.directory),
            "overlay": self._overlay,
            "expose": [str(path) for path in self._expose],
            "tmp": str(self.directory / "tmp"),
            "binds": [(str(source), target) for source, target in binds],
            "error_file": str(error_file),
            "command": list(command),
            "environment": dict(environment),
            "cwd": workdir,
        }
        spec_file = self.directory / "spec.json"
        spec_file.write_text(json.dumps(spec))
        wrapper = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--uts", "--ipc", "--pid"]
        wrapper += ["--fork", "--kill-child=KILL", sys.executable, "-I", "-S", str(_INIT), str(spec_file)]
        variables = {"PATH": os.defpath + ":/usr/sbin:/sbin", OWNER_VARIABLE: self.marker}
        # What unshare itself has to say is not the container's output.
        wrapper_errors = self.directory / "wrapper-errors"
        process = self._launcher.launch(wrapper, variables, errors=wrapper_errors)
        self._follow(process, sink)
        try:
            self._connect(process)
        except (OSError, RuntimeError) as error:
            process.kill()
            self.wait(5)
            reasons = [file.read_text().strip() for file in (error_file, wrapper_errors) if file.exists()]
            raise HostError(f"{self.name}: {' '.join([str(error), *reasons])}") from error

    def _connect(self, process: subprocess.Popen[bytes]) -> None:
        own = Path("/proc/self/ns/net").stat().st_ino
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise HostError(f"the host's init ended with code {process.returncode}")
            # The child is forked after unshare(2), so its existence says that the namespaces exist.
            if found := children.read_text().split():
                self._init_pid = int(found[0])
                break
            time.sleep(0.002)
        if self._init_pid is None or Path(f"/proc/{self._init_pid}/ns/net").stat().st_ino == own:
            raise HostError("the host's namespaces did not appear within 20 s")
        self._bridge.attach(self._init_pid)
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._init_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init_pid, number)

    def close(self) -> None:
        super().close()
        self._bridge.release(self.address)


class LoopbackHost(Host):
    """A host that is only a process tree with a loopback address and a directory instead of /opt/ml."""

    def __init__(self, place: Place, launcher: Launcher) -> None:
        super().__init__(place, launcher)
        self._names: Mapping[str, str] = {}

    def set_names(self, names: Mapping[str, str]) -> None:
        self._names = dict(names)

    def start(self, command: Sequence[str], environment: Mapping[str, str], workdir: str, sink: LineSink) -> None:
        variables = {
            **environment,
            OWNER_VARIABLE: self.marker,
            "SAGEMAKER_BASE_DIR": str(self.ml),
            "SAGEMAKER_EMULATOR_HOST_ADDRESS": self.address,
            "SAGEMAKER_EMULATOR_HOSTS": ",".join(f"{n}={a}" for n, a in self._names.items()),
            "TMPDIR": str(self.directory / "tmp"),
        }
        cwd = workdir if workdir != "/" else str(self.directory)
        try:
            process = self._launcher.launch(list(command), variables, cwd=cwd, new_session=True)
        except OSError as error:
            raise HostError(f"exec {command[0]}: {error.strerror}") from error
        assert process.stdin is not None
        process.stdin.close()
        self._follow(process, sink)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                os.kill(self._process.pid, number)
        if number == signal.SIGKILL:
            kill_owned(self.marker)


def _read_lines(process: subprocess.Popen[bytes], sink: LineSink) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            sink(line.decode(errors="replace").rstrip("\r\n"))
