"""Endpoints: creation, blue/green updates with rollback, deletion."""

import random
import threading
import time
from collections.abc import Iterator

from moto.cloudwatch.models import cloudwatch_backends

from tests.sagemaker_emulator.capture import Capture
from tests.sagemaker_emulator.common import ACCOUNT, Call, Handler, Listing, Params, arn, list_page, now, pick
from tests.sagemaker_emulator.errors import not_emulated, validation
from tests.sagemaker_emulator.fleet import DeploymentError, Fleet
from tests.sagemaker_emulator.models import Models
from tests.sagemaker_emulator.services import Services

_LISTING = Listing("Endpoints", "EndpointName", "EndpointStatus")
_TICK = 0.05


class Endpoint:
    """One endpoint: the fleet that serves, and during an update the one that is to take over."""

    def __init__(self, services: Services, models: Models, call: Call) -> None:
        self.name: str = call.params["EndpointName"]
        self.region = call.region
        self.arn = arn(call.region, "endpoint", self.name)
        self.status = "Creating"
        self.failure_reason: str | None = None
        self.created = self.modified = now()
        self.blue: Fleet | None = None
        self.green: Fleet | None = None
        self.green_share = 0.0
        self.capture: Capture | None = None
        self.deployment: Params | None = None
        self._services = services
        self._models = models
        self._config_name: str = call.params["EndpointConfigName"]
        self._update_begun = 0.0

    # -- life ------------------------------------------------------------------------------------------------------

    def create(self, config: Params) -> None:
        """Start the first fleet; InService or Failed."""
        fleet = self._fleet(config)
        try:
            fleet.start()
        except DeploymentError as error:
            self._services.logs.drain()
            fleet.close()
            return self._settle("Failed", str(error))
        self._switch(fleet)
        return self._settle("InService")

    def begin_update(self) -> None:
        """Show the update that is about to start."""
        self.status = "Updating"
        self.failure_reason = None
        self.modified = self._update_begun = now()

    def update(self, config: Params, deployment: Params) -> None:
        """Bring up the new fleet beside the old one, move the traffic, or roll back."""
        fleet = self._fleet(config)
        try:
            fleet.start()
            self.green = fleet
            self._shift(deployment)
        except DeploymentError as error:
            self.status = "RollingBack"
            self.green, self.green_share = None, 0.0
            self._services.logs.drain()
            fleet.close()
            return self._settle("InService", f"{error} The endpoint was rolled back to {self._config_name}.")
        old = self.blue
        self.deployment = deployment or None
        self._switch(fleet)
        if old is not None:
            old.retired = True
            old.close()
        return self._settle("InService")

    def close(self) -> None:
        """Stop everything."""
        for fleet in (self.green, self.blue):
            if fleet is not None:
                fleet.close()
        if self.capture is not None:
            self.capture.close()

    def fleet_for_request(self) -> Fleet | None:
        """The fleet that answers the next request."""
        if self.green is not None and random.random() < self.green_share:
            return self.green
        return self.blue

    def _fleet(self, config: Params) -> Fleet:
        return Fleet(self._services, self._models, self.region, self.name, config)

    def _switch(self, fleet: Fleet) -> None:
        previous = self.capture
        settings = fleet.config.get("DataCaptureConfig")
        self.capture = Capture(self._services, (self.region, fleet.role()), self.name, settings) if settings else None
        self.blue, self.green, self.green_share = fleet, None, 0.0
        self._config_name = fleet.config["EndpointConfigName"]
        if previous is not None:
            previous.close()

    def _shift(self, deployment: Params) -> None:
        policy = deployment.get("BlueGreenUpdatePolicy", {})
        alarms = [a["AlarmName"] for a in deployment.get("AutoRollbackConfiguration", {}).get("Alarms", [])]
        routing = policy.get("TrafficRoutingConfiguration", {})
        scale = self._services.settings.endpoint_wait_scale
        for share in _shares(routing, self._instances()):
            self.green_share = share
            self._bake(routing.get("WaitIntervalInSeconds", 0) * scale, alarms)
        self._bake(policy.get("TerminationWaitInSeconds", 0) * scale, alarms)

    def _instances(self) -> int:
        assert self.green is not None
        return max(1, sum(variant.count for variant in self.green.variants))

    def _bake(self, seconds: float, alarms: list[str]) -> None:
        """Wait, watching the alarms; raises DeploymentError when one rings."""
        deadline = time.monotonic() + seconds
        while True:
            known = cloudwatch_backends[ACCOUNT][self.region].alarms
            ringing = [name for name in alarms if name in known and known[name].state_value == "ALARM"]
            if ringing:
                raise DeploymentError(f"Alarms {', '.join(ringing)} were in state ALARM during the deployment.")
            if time.monotonic() >= deadline or self._services.closing.wait(_TICK):
                return

    def _settle(self, status: str, reason: str | None = None) -> None:
        self.failure_reason = reason[:1024] if reason else None
        self.modified = now()
        self.status = status

    # -- description -----------------------------------------------------------------------------------------------

    def describe(self) -> Params:
        """DescribeEndpoint's answer."""
        answer: Params = {
            "EndpointName": self.name,
            "EndpointArn": self.arn,
            "EndpointConfigName": self._config_name,
            "EndpointStatus": self.status,
            "CreationTime": self.created,
            "LastModifiedTime": self.modified,
        }
        if self.blue is not None:
            answer["ProductionVariants"] = self.blue.describe()
            if capture := self.blue.config.get("DataCaptureConfig"):
                answer["DataCaptureConfig"] = {
                    "EnableCapture": bool(capture.get("EnableCapture")),
                    "CaptureStatus": "Started" if capture.get("EnableCapture") else "Stopped",
                    "CurrentSamplingPercentage": capture["InitialSamplingPercentage"],
                    "DestinationS3Uri": capture["DestinationS3Uri"],
                    "KmsKeyId": capture.get("KmsKeyId", ""),
                }
        if self.green is not None:
            answer["PendingDeploymentSummary"] = {
                "EndpointConfigName": self.green.config["EndpointConfigName"],
                "ProductionVariants": [pick(v, ("VariantName", "DeployedImages")) for v in self.green.describe()],
                "StartTime": self._update_begun,
            }
        if self.failure_reason:
            answer["FailureReason"] = self.failure_reason
        if self.deployment:
            answer["LastDeploymentConfig"] = self.deployment
        return answer


class Endpoints:
    """The endpoint part of the control API."""

    def __init__(self, services: Services, models: Models) -> None:
        self._services = services
        self._models = models
        self._lock = threading.Lock()
        self._endpoints: dict[tuple[str, str], Endpoint] = {}

    def operations(self) -> dict[str, Handler]:
        """Handlers by operation name."""
        return {
            "CreateEndpoint": self._create,
            "DescribeEndpoint": lambda call: self._named(call).describe(),
            "ListEndpoints": self._list,
            "UpdateEndpoint": self._update,
            "DeleteEndpoint": self._delete,
        }

    def find(self, region: str, name: str) -> Endpoint | None:
        """An endpoint, if there is one."""
        with self._lock:
            return self._endpoints.get((region, name))

    def close(self) -> None:
        """Stop all endpoints."""
        with self._lock:
            endpoints = list(self._endpoints.values())
            self._endpoints.clear()
        for endpoint in endpoints:
            endpoint.close()

    def _named(self, call: Call) -> Endpoint:
        name = call.params["EndpointName"]
        endpoint = self.find(call.region, name)
        if endpoint is None:
            raise validation(f'Could not find endpoint "{arn(call.region, "endpoint", name)}".')
        return endpoint

    def _create(self, call: Call) -> Params:
        if call.params.get("DeploymentConfig"):
            check_deployment(call.params["DeploymentConfig"])
        config = self._models.config(call.region, call.params["EndpointConfigName"])
        endpoint = Endpoint(self._services, self._models, call)
        with self._lock:
            key = (call.region, endpoint.name)
            if key in self._endpoints:
                raise validation(f'Cannot create already existing endpoint "{endpoint.arn}".')
            self._endpoints[key] = endpoint
        self._services.tag(endpoint.arn, call.params.get("Tags"))
        self._services.spawn(f"endpoint-{endpoint.name}", lambda: endpoint.create(config))
        return {"EndpointArn": endpoint.arn}

    def _update(self, call: Call) -> Params:
        if call.params.get("RetainAllVariantProperties"):
            raise not_emulated("RetainAllVariantProperties")
        deployment = call.params.get("DeploymentConfig", {})
        check_deployment(deployment)
        endpoint = self._named(call)
        config = self._models.config(call.region, call.params["EndpointConfigName"])
        if call.params.get("RetainDeploymentConfig"):
            deployment = endpoint.deployment or deployment
        with self._lock:
            if endpoint.status != "InService":
                raise validation(f'Cannot update in-progress endpoint "{endpoint.arn}".')
            endpoint.begin_update()
        self._services.spawn(f"endpoint-{endpoint.name}", lambda: endpoint.update(config, deployment))
        return {"EndpointArn": endpoint.arn}

    def _delete(self, call: Call) -> Params:
        endpoint = self._named(call)
        with self._lock:
            if endpoint.status not in ("InService", "Failed"):
                raise validation(f'Cannot update in-progress endpoint "{endpoint.arn}".')
            endpoint.status = "Deleting"

        def remove() -> None:
            endpoint.close()
            with self._lock:
                self._endpoints.pop((call.region, endpoint.name), None)
            self._services.tags.pop(endpoint.arn, None)

        self._services.spawn(f"endpoint-{endpoint.name}", remove)
        return {}

    def _list(self, call: Call) -> Params:
        members = ("EndpointName", "EndpointArn", "CreationTime", "LastModifiedTime", "EndpointStatus")
        with self._lock:
            found = [e for (region, _), e in self._endpoints.items() if region == call.region]
        return list_page(call.params, [pick(e.describe(), members) for e in found], _LISTING)


def check_deployment(deployment: Params) -> None:
    """Refuse what is not emulated."""
    if deployment.get("RollingUpdatePolicy"):
        raise not_emulated("rolling updates")


def _shares(routing: Params, instances: int) -> Iterator[float]:
    """Share of the traffic on the new fleet, step by step."""
    kind = routing.get("Type", "ALL_AT_ONCE")
    if kind == "CANARY":
        yield _fraction(routing.get("CanarySize", {}), instances)
    elif kind == "LINEAR":
        step = _fraction(routing.get("LinearStepSize", {}), instances)
        share = step
        while share < 1.0:
            yield share
            share += step
    yield 1.0


def _fraction(size: Params, instances: int) -> float:
    value = float(size.get("Value", 10))
    return min(1.0, value / 100 if size.get("Type", "CAPACITY_PERCENT") == "CAPACITY_PERCENT" else value / instances)
