"""What every part of a running emulator needs from the others."""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.sagemaker_emulator.common import Params
from tests.sagemaker_emulator.faults import Faults
from tests.sagemaker_emulator.host_pool import HostPool
from tests.sagemaker_emulator.hosts import Host
from tests.sagemaker_emulator.leftovers import State
from tests.sagemaker_emulator.logs import LogShipper
from tests.sagemaker_emulator.settings import Image, Settings
from tests.sagemaker_emulator.storage import Storage


@dataclass
class Services:
    """Settings, faults, hosts, logs and storage of one emulator."""

    settings: Settings
    faults: Faults
    state: State
    pool: HostPool
    logs: LogShipper
    endpoint_url: str = ""
    job_endpoint_url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)
    tags: dict[str, dict[str, str]] = field(default_factory=dict)
    _storages: dict[str, Storage] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def storage(self, region: str) -> Storage:
        """S3 of the platform in one region."""
        with self._lock:
            if region not in self._storages:
                self._storages[region] = Storage(self.endpoint_url, region)
            return self._storages[region]

    def spawn(self, name: str, target: Callable[[], None]) -> None:
        """Run `target` in a thread that the emulator waits for when it stops."""
        thread = threading.Thread(target=target, name=name, daemon=True)
        with self._lock:
            self._threads = [t for t in self._threads if t.is_alive()]
            self._threads.append(thread)
        thread.start()

    def join(self, timeout: float) -> None:
        """Wait for all threads started by `spawn`."""
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout)

    def tag(self, resource: str, tags: list[Params] | None) -> None:
        """Store the tags given at a resource's creation."""
        self.tags[resource] = {tag["Key"]: tag["Value"] for tag in tags or []}

    def environment(
        self, image: Image, region: str, host: Host, given: Mapping[str, str], keep: bool = False
    ) -> dict[str, str]:
        """Environment variables of a container: what docker and the platform set, the image's, then the request's.

        An image that installs packages gets its copy here. `keep`: the next ones start with what it has installed.
        """
        # The interpreter's directory is not resolved: in a virtual environment it is a link that must stay one.
        folder = self.pool.environments.give(image.python, host, keep) if image.installs else Path(image.python).parent
        path = [str(folder), *os.defpath.split(os.pathsep), "/usr/local/bin", "/usr/sbin", "/sbin"]
        return {
            "PATH": os.pathsep.join(dict.fromkeys(path)),
            "HOME": "/root",
            "HOSTNAME": host.name,
            "AWS_REGION": region,
            "AWS_ENDPOINT_URL": self.job_endpoint_url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            **image.environment,
            **given,
        }
