"""InvokeEndpoint: a proxy to the serving containers."""

import http.client

from werkzeug.wrappers import Request, Response

from tests.sagemaker_emulator.capture import Exchange
from tests.sagemaker_emulator.common import ACCOUNT
from tests.sagemaker_emulator.endpoints import Endpoints
from tests.sagemaker_emulator.errors import ApiError, not_emulated
from tests.sagemaker_emulator.fleet import Container, Fleet, Variant
from tests.sagemaker_emulator.services import Services
from tests.sagemaker_emulator.validation import check

_LIMIT = 6291456
_SERVERLESS_LIMIT = 4 * 1024 * 1024
_PREFIX = "X-Amzn-SageMaker-"
_PASSED_ON = ("Content-Type", "Accept", f"{_PREFIX}Custom-Attributes", f"{_PREFIX}Inference-Id")
_REFUSED = ("Target-Model", "Target-Container-Hostname", "Inference-Component", "Session-Id", "Enable-Explanations")


class _Retired(Exception):
    """The instances were replaced while they had the request."""


class Invocations:
    """The runtime of endpoints."""

    def __init__(self, services: Services, endpoints: Endpoints) -> None:
        self._services = services
        self._endpoints = endpoints

    def invoke(self, request: Request, name: str, region: str) -> Response:
        """Answer one InvokeEndpoint request."""
        for header in _REFUSED:
            if _PREFIX + header in request.headers:
                raise not_emulated(f"the header {_PREFIX}{header}")
        check("sagemaker-runtime", "InvokeEndpoint", {"EndpointName": name, "Body": ""}, code="ValidationError")
        endpoint = self._endpoints.find(region, name)
        fleet = endpoint.fleet_for_request() if endpoint else None
        if endpoint is None or fleet is None:
            raise ApiError("ValidationError", f"Endpoint {name} of account {ACCOUNT} not found.")
        wanted = request.headers.get(f"{_PREFIX}Target-Variant")
        variant = fleet.choose(wanted)
        if variant is None:
            raise ApiError("ValidationError", f"Variant {wanted} of endpoint {name} not found.")
        body = request.get_data()
        limit = _SERVERLESS_LIMIT if variant.spec.get("ServerlessConfig") else _LIMIT
        if len(body) > limit:
            raise ApiError(
                "ValidationError",
                "1 validation error detected: Value at 'body' failed to satisfy constraint: "
                f"Member must have length less than or equal to {limit}",
            )
        try:
            response = self._forward(request, body, fleet, variant)
        except _Retired:  # SageMaker lets old instances finish: here the new ones answer
            return self.invoke(request, name, region)
        if endpoint.capture is not None:
            endpoint.capture.add(
                Exchange(
                    variant.name,
                    request.headers.get(f"{_PREFIX}Inference-Id"),
                    request.headers.get("Content-Type", "application/octet-stream"),
                    body,
                    response.headers.get("Content-Type", "application/octet-stream"),
                    response.get_data(),
                )
            )
        return response

    def _forward(self, request: Request, body: bytes, fleet: Fleet, variant: Variant) -> Response:
        container = variant.next()
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        connection = http.client.HTTPConnection(
            container.host.address, container.port, timeout=self._services.settings.invocation_timeout
        )
        try:
            connection.request("POST", "/invocations", body, headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            if fleet.retired:
                raise _Retired from error
            raise self._model_error(fleet, container, 0, f"server error (0) from primary: {error}", "") from error
        finally:
            connection.close()
        if answer.status >= 300:
            text = content.decode(errors="replace")
            kind = "server" if answer.status >= 500 else "client"
            message = f'{kind} error ({answer.status}) from primary with message "{text}"'
            raise self._model_error(fleet, container, answer.status, message, text)
        response = Response(content, content_type=answer.headers.get("Content-Type", "application/octet-stream"))
        response.headers["x-Amzn-Invoked-Production-Variant"] = variant.name
        if custom := answer.headers.get(f"{_PREFIX}Custom-Attributes"):
            response.headers[f"{_PREFIX}Custom-Attributes"] = custom
        return response

    @staticmethod
    def _model_error(fleet: Fleet, container: Container, status: int, message: str, original: str) -> ApiError:
        return ApiError(
            "ModelError",
            f"Received {message}. See {fleet.log_group} in CloudWatch for more information.",
            424,
            OriginalStatusCode=status,
            OriginalMessage=original,
            LogStreamArn=f"arn:aws:logs:::log-group:{fleet.log_group}:log-stream:{container.stream}",
        )
