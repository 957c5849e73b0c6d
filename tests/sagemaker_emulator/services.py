"""What every part of a running emulator needs from the others."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.sagemaker_emulator.authorization import Authorization
from tests.sagemaker_emulator.common import Params
from tests.sagemaker_emulator.faults import Faults
from tests.sagemaker_emulator.host_pool import HostPool
from tests.sagemaker_emulator.hosts import Host
from tests.sagemaker_emulator.iam_policies import Access
from tests.sagemaker_emulator.iam_requests import image_accesses, log_accesses
from tests.sagemaker_emulator.leftovers import State
from tests.sagemaker_emulator.logs import LogShipper
from tests.sagemaker_emulator.settings import Image, Settings
from tests.sagemaker_emulator.storage import InputError, Storage


@dataclass
class Services:
    """Settings, faults, hosts, logs and storage of one emulator."""

    settings: Settings
    faults: Faults
    state: State
    pool: HostPool
    logs: LogShipper
    authorization: Authorization
    endpoint_url: str = ""
    job_endpoint_url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)
    tags: dict[str, dict[str, str]] = field(default_factory=dict)
    _storages: dict[tuple[str, str], Storage] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def storage(self, region: str, role: str | None) -> Storage:
        """S3 in one region, as the platform uses it in the name of a role."""
        key = self.platform_key(role)
        with self._lock:
            if (region, key) not in self._storages:
                self._storages[region, key] = Storage(self.endpoint_url, region, key)
            return self._storages[region, key]

    def log(self, region: str, role: str | None, group: str, name: str, delay: float = 0.0) -> Callable[[str], None]:
        """The function that adds a line to a log stream; the line is lost if the role may not write logs."""
        if self.allows(role, log_accesses(region, group)):
            return self.logs.stream(region, group, name, delay)
        return lambda _: None

    def pull(self, region: str, role: str | None, uri: str) -> Image:
        """The image of a URI. Raises `InputError` if the role may not pull it."""
        if not self.allows(role, image_accesses(region, uri)):
            raise InputError(
                f"ClientError: Cannot pull image {uri}. Please ensure that the execution role {role} has the "
                "permissions ecr:BatchCheckLayerAvailability, ecr:BatchGetImage, ecr:GetDownloadUrlForLayer and "
                "ecr:GetAuthorizationToken for it."
            )
        return self.settings.image(uri)

    def allows(self, role: str | None, wanted: Sequence[Access]) -> bool:
        """Whether a role may do what the platform does in its name."""
        return self.authorization.allows(self.platform_key(role), wanted)

    def platform_key(self, role: str | None) -> str:
        """The access key with which the platform acts in the name of a role; without one, in its own."""
        return self.authorization.access_key(role, "SageMaker", internal=True)

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
        self,
        image: Image,
        region: str,
        role: str | None,
        host: Host,
        given: Mapping[str, str],
        keep: bool = False,
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
            "AWS_ACCESS_KEY_ID": self.authorization.access_key(role, "SageMaker"),
            "AWS_SECRET_ACCESS_KEY": "testing",
            **image.environment,
            **given,
        }
