"""The serving containers of one endpoint configuration."""

import http.client
import itertools
import logging
import random
import secrets
import time
from dataclasses import dataclass, field

from botocore.exceptions import ClientError

from tests.ports import free_port
from tests.sagemaker_emulator.common import Params
from tests.sagemaker_emulator.hosts import Host
from tests.sagemaker_emulator.models import Models
from tests.sagemaker_emulator.services import Services
from tests.sagemaker_emulator.storage import InputError, unpack_archive

log = logging.getLogger(__name__)
_numbers = itertools.count(1)
_PORT = 8080
_PING_TIMEOUT = 2.0
_PING_INTERVAL = 0.1


class DeploymentError(RuntimeError):
    """A fleet that did not become healthy; the text becomes the endpoint's failure reason."""


@dataclass
class Container:
    """One running container."""

    host: Host
    port: int
    stream: str


@dataclass
class Variant:
    """One production variant with its containers."""

    spec: Params
    image: str
    containers: list[Container] = field(default_factory=list)
    turn: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def name(self) -> str:
        """Name of the variant."""
        return self.spec["VariantName"]

    @property
    def weight(self) -> float:
        """Share of the traffic, relative to the other variants."""
        return float(self.spec.get("InitialVariantWeight", 1.0))

    @property
    def count(self) -> int:
        """Number of instances; a serverless variant has one."""
        return 1 if self.spec.get("ServerlessConfig") else int(self.spec.get("InitialInstanceCount", 1))

    def next(self) -> Container:
        """Containers in turn."""
        running = [c for c in self.containers if c.host.running] or self.containers
        return running[next(self.turn) % len(running)]


class Fleet:
    """Containers of all variants of one endpoint configuration."""

    def __init__(self, services: Services, models: Models, region: str, endpoint: str, config: Params) -> None:
        self._services = services
        self._models = models
        self._region = region
        self._endpoint = endpoint
        self.config = config
        self.log_group = f"/aws/sagemaker/Endpoints/{endpoint}"
        self.variants: list[Variant] = []
        self.retired = False  # whether another fleet has its requests

    def start(self) -> None:
        """Start all containers and wait until all answer the ping; raises DeploymentError."""
        try:
            for spec in self.config["ProductionVariants"]:
                container = self._models.container(self._region, spec["ModelName"])
                variant = Variant(spec, container["Image"])
                self.variants.append(variant)
                for _ in range(variant.count):
                    variant.containers.append(self._launch(variant, container))
            for variant in self.variants:
                for container in variant.containers:
                    self._await_ping(variant, container)
        except DeploymentError:
            raise
        except Exception as error:
            if not self._services.closing.is_set():
                log.exception("endpoint %s", self._endpoint)
            raise DeploymentError(str(error)) from error

    def choose(self, name: str | None) -> Variant | None:
        """The variant with a name, or one by weight."""
        if name is not None:
            return next((variant for variant in self.variants if variant.name == name), None)
        weights = [variant.weight for variant in self.variants]
        if not any(weights):
            return self.variants[0]
        return random.choices(self.variants, weights)[0]

    def describe(self) -> list[Params]:
        """ProductionVariantSummary of every variant."""
        summaries: list[Params] = []
        for variant in self.variants:
            summary: Params = {
                "VariantName": variant.name,
                "DeployedImages": [{"SpecifiedImage": variant.image, "ResolvedImage": variant.image}],
                "CurrentWeight": variant.weight,
                "DesiredWeight": variant.weight,
                "CurrentInstanceCount": variant.count,
                "DesiredInstanceCount": variant.count,
            }
            if serverless := variant.spec.get("ServerlessConfig"):
                summary |= {"CurrentServerlessConfig": serverless, "DesiredServerlessConfig": serverless}
                summary |= {"CurrentInstanceCount": 0, "DesiredInstanceCount": 0}
            summaries.append(summary)
        return summaries

    def role(self) -> str | None:
        """The execution role of the first variant's model, which is also what data capture writes as."""
        model = self._models.model(self._region, self.config["ProductionVariants"][0]["ModelName"])
        return model.get("ExecutionRoleArn")

    def close(self) -> None:
        """SIGTERM, grace, SIGKILL; then remove the hosts."""
        hosts = [container.host for variant in self.variants for container in variant.containers]
        for host in hosts:
            host.terminate()
        deadline = time.monotonic() + self._services.settings.serve_stop_grace
        for host in hosts:
            while not host.wait(0.05) and time.monotonic() < deadline and not self._services.closing.is_set():
                pass
            host.close()

    def _launch(self, variant: Variant, container: Params) -> Container:
        services = self._services
        group = f"endpoint-{self._endpoint}-{next(_numbers)}"
        host = services.pool.create(group, "model-container")
        role = container["ExecutionRoleArn"]
        image = services.pull(self._region, role, container["Image"])
        stream = f"{variant.name}/i-{secrets.token_hex(8)[:17]}"
        launched = Container(host, _PORT, stream)
        given = dict(container.get("Environment", {}))
        if not services.pool.namespaces:
            # Loopback hosts share one network: a server that listens on all addresses needs a port of its own.
            launched.port = free_port()
            given["SAGEMAKER_BIND_TO_PORT"] = str(launched.port)
        try:
            self._fetch_model(container, host)
            command = [*image.entrypoint, "serve"]
            if fault := services.faults.take_for_endpoint(self._endpoint):
                command = ["sleep", "3600"] if fault.mode == "ping" else ["sh", "-c", "echo made to fail; exit 1"]
            host.set_names({"model-container": host.address})
            sink = services.log(self._region, role, self.log_group, stream)
            variables = services.environment(image, self._region, role, host, given)
            host.start(command, variables, image.workdir, sink)
        except BaseException:
            host.close()
            raise
        return launched

    def _fetch_model(self, container: Params, host: Host) -> None:
        target = host.ml / "model"
        target.mkdir(exist_ok=True)
        storage = self._services.storage(self._region, container["ExecutionRoleArn"])
        source = container.get("ModelDataSource", {}).get("S3DataSource")
        try:
            if source and source["CompressionType"] == "None":
                storage.download(source["S3Uri"], source["S3DataType"], [target])
            elif uri := container.get("ModelDataUrl") or (source or {}).get("S3Uri"):
                unpack_archive(storage.get(uri), target)
        except ClientError as error:
            raise InputError(f"Could not find model data at {container.get('ModelDataUrl')}: {error}") from error

    def _await_ping(self, variant: Variant, container: Container) -> None:
        settings = self._services.settings
        longest = settings.image(variant.image).startup_timeout or settings.endpoint_startup_timeout
        asked = variant.spec.get("ContainerStartupHealthCheckTimeoutInSeconds", longest)
        deadline = time.monotonic() + min(asked, longest)
        while time.monotonic() < deadline and container.host.running and not self._services.closing.is_set():
            if _ping(container):
                return
            time.sleep(_PING_INTERVAL)
        raise DeploymentError(
            f"The primary container for production variant {variant.name} did not pass the ping health check. "
            "Please check CloudWatch logs for this endpoint."
        )


def _ping(container: Container) -> bool:
    connection = http.client.HTTPConnection(container.host.address, container.port, timeout=_PING_TIMEOUT)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
