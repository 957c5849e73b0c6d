"""The emulator as one object that starts and stops."""

import json
import logging
import os
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from moto.core.model_instances import reset_model_data
from werkzeug.wrappers import Request, Response

from tests.sagemaker_emulator.authorization import ADMINISTRATOR, Authorization, find_role
from tests.sagemaker_emulator.endpoints import Endpoints
from tests.sagemaker_emulator.faults import Faults
from tests.sagemaker_emulator.feature_groups import FeatureGroups
from tests.sagemaker_emulator.feature_records import FeatureRecords
from tests.sagemaker_emulator.host_pool import HostPool
from tests.sagemaker_emulator.invocations import Invocations
from tests.sagemaker_emulator.leftovers import State, remove_leftovers
from tests.sagemaker_emulator.logs import LogShipper
from tests.sagemaker_emulator.models import Models
from tests.sagemaker_emulator.probe import Abilities, abilities
from tests.sagemaker_emulator.processing import Processing
from tests.sagemaker_emulator.registry import Registry
from tests.sagemaker_emulator.server import Application, Servers
from tests.sagemaker_emulator.services import Services
from tests.sagemaker_emulator.settings import Settings
from tests.sagemaker_emulator.tags import Tags
from tests.sagemaker_emulator.training import Training
from tests.sagemaker_emulator.tuning import Tuning

log = logging.getLogger(__name__)
# moto's S3, logs and IAM are one per process: they are emptied when the last emulator stops.
_running: set["SageMakerEmulator"] = set()


class SageMakerEmulator:
    """SageMaker on this machine. `with SageMakerEmulator() as emulator: boto3.client(..., emulator.endpoint_url)`.

    Keyword arguments are the fields of `Settings`. Several emulators in one process share moto's S3 and logs.
    """

    def __init__(self, settings: Settings | None = None, **changes: Any) -> None:
        self.settings = settings or Settings(**changes)
        self.faults = Faults()
        self._authorization = Authorization()
        self.endpoint_url = ""
        self._services: Services | None = None
        self._servers: Servers | None = None
        self._endpoints: Endpoints | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Remove what killed emulators left, then serve."""
        if self._services is not None:
            raise RuntimeError("the emulator runs already")
        parent = self.settings.state_parent
        for name in remove_leftovers(parent):
            log.warning("removed what an emulator that was killed had left: %s", name)
        state = State(parent)
        _running.add(self)
        try:
            self._start(state)
        except BaseException:
            self.stop()
            _running.discard(self)
            state.remove()
            raise
        return self

    def stop(self) -> None:
        """Stop jobs and endpoints at once and leave nothing behind."""
        services, self._services = self._services, None
        if services is not None:
            services.closing.set()
            services.join(15)
        if self._endpoints is not None:
            self._endpoints.close()
            self._endpoints = None
        if self._servers is not None:
            self._servers.close()
            self._servers = None
        if services is not None:
            services.logs.close()
            services.pool.close()
            services.state.remove()
            _running.discard(self)
            if not _running:
                reset_model_data()

    def environment(self, role: str | None = None) -> dict[str, str]:
        """Variables that make boto3 and the AWS CLI talk to this emulator.

        With `role`, the ARN of a role of its IAM, as that role, which may do what its policies allow; else as the
        administrator.
        """
        if role is not None and find_role(role) is None:
            raise ValueError(f"IAM has no role {role}: create it first")
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self._authorization.access_key(role, "caller") if role else ADMINISTRATOR,
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
        }

    @property
    def host_kind(self) -> str:
        """`namespaces` or `loopback`."""
        return self.services.pool.kind

    @property
    def supported_hosts(self) -> str:
        """What `host_kind` will be."""
        return "namespaces" if self._abilities().namespaces else "loopback"

    @property
    def services(self) -> Services:
        """The running parts."""
        if self._services is None:
            raise RuntimeError("the emulator does not run")
        return self._services

    def _start(self, state: State) -> None:
        pool = HostPool(state, self._abilities(), self.settings.expose)
        if not pool.namespaces:
            log.warning("hosts are loopback addresses without isolation: %s", pool.reason)
        services = self._services = Services(
            self.settings, self.faults, state, pool, LogShipper(), self._authorization
        )  # fmt: skip
        application = Application(self.faults, self._authorization, self._admin)
        self._install(application, services)
        self._servers = Servers(application)
        port = self._servers.listen(self.settings.host, self.settings.port)
        self.endpoint_url = services.endpoint_url = services.job_endpoint_url = f"http://{self.settings.host}:{port}"
        if pool.bridge is not None:
            self._servers.listen(pool.bridge.address, port, device=pool.bridge.name)
            services.job_endpoint_url = f"http://{pool.bridge.address}:{port}"

    def _abilities(self) -> Abilities:
        if self.settings.isolation == "loopback":
            return Abilities(False, False, "loopback hosts were asked for")
        found = abilities()
        if self.settings.isolation == "namespaces" and not found.namespaces:
            raise RuntimeError(found.reason)
        return found if self.settings.copy_on_write else replace(found, overlay=False)

    def _install(self, application: Application, services: Services) -> None:
        training = Training(services)
        groups = FeatureGroups(services)
        registry = Registry(services)
        models = Models(services, registry)
        self._endpoints = Endpoints(services, models)
        jobs = (training, Processing(services), Tuning(services, training))
        for part in (*jobs, groups, registry, models, self._endpoints, Tags(services)):
            application.operations.update(part.operations())
        application.runtime_operations.update(FeatureRecords(services, groups).operations())
        application.invoke = Invocations(services, self._endpoints).invoke

    def _admin(self, request: Request) -> Response:
        if request.path == "/_emulator/health":
            return _json({"status": "ok", "hosts": self.host_kind, "pid": os.getpid()})
        if request.path != "/_emulator/faults":
            return _json({"message": "there are /_emulator/health and /_emulator/faults"}, 404)
        if request.method == "POST":
            try:
                fault = self.faults.add(**json.loads(request.get_data()))
            except (ValueError, TypeError) as error:
                return _json({"message": str(error)}, 400)
            return _json({"id": fault.id})
        if request.method == "DELETE":
            self.faults.clear(int(request.args["id"]) if "id" in request.args else None)
        return _json({"faults": self.faults.active()})


def _json(body: Any, status: int = 200) -> Response:
    return Response(json.dumps(body) + "\n", status=status, content_type="application/json")
