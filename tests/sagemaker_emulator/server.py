"""The HTTP side: SageMaker's own routes in front of moto's application."""

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote
from wsgiref.types import StartResponse, WSGIEnvironment

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server
from werkzeug.wrappers import Request, Response

from tests.sagemaker_emulator.authorization import AccessDenied, Authorization, Caller, denied_response
from tests.sagemaker_emulator.common import DEFAULT_REGION, Call, Handler, Params
from tests.sagemaker_emulator.errors import ApiError, not_emulated
from tests.sagemaker_emulator.faults import Fault, Faults
from tests.sagemaker_emulator.glue_catalog import TARGET as GLUE_TARGET
from tests.sagemaker_emulator.glue_catalog import GlueCatalog
from tests.sagemaker_emulator.storage import INTERNAL_KEY
from tests.sagemaker_emulator.validation import check, operation_model

log = logging.getLogger(__name__)

_SCOPE = re.compile(r"Credential=([^/]+)/[^/]*/([^/]+)/([^/]+)/aws4_request")
_FEATURE_GROUP = re.compile(r"/FeatureGroup/([^/]+)((?:/[A-Za-z]+)?)")
_ENDPOINT = re.compile(r"/endpoints/([^/]+)/([a-z-]+)")

RuntimeHandler = Callable[[Request, str, str], Response]


class Application:
    """WSGI application of the emulator."""

    def __init__(self, faults: Faults, authorization: Authorization, admin: Callable[[Request], Response]) -> None:
        self._faults = faults
        self._authorization = authorization
        self._admin = admin
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._glue = GlueCatalog(self._moto)
        self.operations: dict[str, Handler] = {}
        self.runtime_operations: dict[str, Handler] = {}
        self.invoke: RuntimeHandler | None = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = Request(environ)
        scope = _SCOPE.search(request.headers.get("Authorization", ""))
        key, region, service = scope.groups() if scope else ("", DEFAULT_REGION, "")
        if request.path.startswith("/_emulator/"):
            return self._admin(request)(environ, start_response)
        route = self._route(request, service)
        internal = key.startswith(INTERNAL_KEY)
        if not internal and (refused := self._apply_faults(request, service, route or _target(request))):
            return refused(environ, start_response)
        caller = self._authorization.caller(key)
        if caller and (refused := self._refuse(caller, request, route, region, service)):
            return refused(environ, start_response)
        if route is not None:
            return self._answer(request, route, region)(environ, start_response)
        if request.headers.get("X-Amz-Target", "").startswith(GLUE_TARGET):
            return self._answer_glue(request, region)(environ, start_response)
        if caller and service == "s3" and request.method in ("GET", "HEAD"):
            return self._found_by(caller, request)(environ, start_response)
        return self._moto(environ, start_response)

    def _refuse(
        self, caller: Caller, request: Request, route: str | None, region: str, service: str
    ) -> Response | None:
        """The refusal of what the caller's role may not do."""
        try:
            call = None if route is None else ("sagemaker", route, _params(request))
            self._authorization.check_request(caller, request, call, region, service)
        except ApiError as error:
            log.info("%s", error)
            # An unread body would be taken for the next request on a connection that stays open.
            request.get_data()
            if request.headers.get("X-Amz-Target"):
                error.status = 400
            elif route is None:
                return denied_response(error, request, service)
            return error_response(error)
        return None

    def _found_by(self, caller: Caller, request: Request) -> Response:
        """Moto's answer, but that an object is not there is told only to those who may list the bucket."""
        response = Response.from_app(self._moto, request.environ)
        denied: AccessDenied | None = None
        if response.status_code == 404:
            denied = self._authorization.hidden(caller, request)
        return denied_response(denied, request, "s3") if denied else response

    def _route(self, request: Request, service: str) -> str | None:
        """SageMaker operation that a request is for, or None if moto is to answer it."""
        target = request.headers.get("X-Amz-Target", "")
        if target.startswith("SageMaker."):
            return target.removeprefix("SageMaker.")
        if service not in ("sagemaker", ""):
            return None
        if match := _ENDPOINT.fullmatch(request.path):
            return {
                "invocations": "InvokeEndpoint",
                "async-invocations": "InvokeEndpointAsync",
                "invocations-response-stream": "InvokeEndpointWithResponseStream",
            }.get(match[2])
        if match := _FEATURE_GROUP.fullmatch(request.path):
            method = (request.method, match[2])
            return {
                ("PUT", ""): "PutRecord",
                ("GET", ""): "GetRecord",
                ("DELETE", ""): "DeleteRecord",
                ("POST", "/ListRecords"): "ListRecords",
                ("POST", "/Record"): "UpdateRecord",
            }.get(method)
        if request.path in ("/BatchGetRecord", "/BatchWriteRecord") and request.method == "POST":
            return request.path[1:]
        return None

    def _answer(self, request: Request, operation: str, region: str) -> Response:
        runtime = not request.headers.get("X-Amz-Target")
        request.get_data()
        try:
            if operation == "InvokeEndpoint" and self.invoke is not None:
                match = _ENDPOINT.fullmatch(request.path)
                assert match is not None
                return self.invoke(request, unquote(match[1]), region)
            if runtime:
                return _json_response(self._runtime(request, operation, region))
            return _json_response(self._control(request, operation, region))
        except ApiError as error:
            return error_response(error)
        except Exception as error:
            log.exception("%s", operation)
            return error_response(ApiError("InternalFailure", f"{type(error).__name__}: {error}", 500))

    def _answer_glue(self, request: Request, region: str) -> Response:
        try:
            return self._glue.answer(request, region)
        except ApiError as error:
            return error_response(error)

    def _control(self, request: Request, operation: str, region: str) -> dict[str, Any]:
        if operation_model("sagemaker", operation) is None:
            raise ApiError("UnknownOperationException", f"SageMaker has no operation {operation}.")
        handler = self.operations.get(operation)
        if handler is None:
            raise not_emulated(operation)
        params = _params(request)
        check("sagemaker", operation, params)
        return handler(Call(operation, params, region))

    def _runtime(self, request: Request, operation: str, region: str) -> dict[str, Any]:
        handler = self.runtime_operations.get(operation)
        if handler is None:
            raise not_emulated(operation)
        params = _params(request)
        check("sagemaker-featurestore-runtime", operation, params, code="ValidationError")
        return handler(Call(operation, params, region))

    def _apply_faults(self, request: Request, service: str, operation: str) -> Response | None:
        names = [f"{service}:{operation}"]
        if service in ("sagemaker", ""):
            names.append(operation)
        if delay := self._faults.for_operation("delay_response", names):
            time.sleep(delay.after)
        fault: Fault | None = self._faults.for_operation("throttle", names)
        if fault is None:
            return None
        # An unread body would be taken for the next request on a connection that stays open.
        request.get_data(cache=False)
        if service == "s3":
            body = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            return Response(body, status=503, content_type="application/xml")
        return error_response(ApiError("ThrottlingException", "Rate exceeded"))


class Servers:
    """The same application on several addresses of this machine."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._servers: list[tuple[BaseWSGIServer, threading.Thread]] = []

    def listen(self, address: str, port: int, device: str | None = None) -> int:
        """Serve on an address; with `device`, only to what arrives through that network device."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if device is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode() + b"\0")
        try:
            listener.bind((address, port))
            listener.listen(256)
            server = make_server(
                address,
                listener.getsockname()[1],
                self._application,
                threaded=True,
                request_handler=_QuietHandler,
                fd=listener.fileno(),
            )
        finally:
            listener.close()
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, name=f"emulator-{address}", daemon=True
        )
        thread.start()
        self._servers.append((server, thread))
        return int(server.port)

    def close(self) -> None:
        """Stop serving."""
        for server, thread in self._servers:
            server.shutdown()
            server.server_close()
            thread.join(5)
        self._servers.clear()


class _QuietHandler(MotoRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        log.debug(message, *args)


def error_response(error: ApiError) -> Response:
    """An error as both JSON protocols expect it."""
    body = {"__type": error.code, "message": error.message, "Message": error.message, **error.extra}
    response = _json_response(body, error.status)
    response.headers["x-amzn-ErrorType"] = error.code
    return response


def _json_response(body: Any, status: int = 200) -> Response:
    return Response(json.dumps(body), status=status, content_type="application/x-amz-json-1.1")


def _target(request: Request) -> str:
    return request.headers.get("X-Amz-Target", "").rpartition(".")[2]


def _params(request: Request) -> Params:
    """Parameters of an operation of SageMaker's, wherever they stand in the request."""
    if match := _ENDPOINT.fullmatch(request.path):
        return {"EndpointName": unquote(match[1])}
    control = "X-Amz-Target" in request.headers
    try:
        params = json.loads(request.get_data() or b"{}")
    except ValueError as error:
        raise ApiError("SerializationException" if control else "ValidationError", str(error)) from error
    if control:
        return params
    if match := _FEATURE_GROUP.fullmatch(request.path):
        params["FeatureGroupName"] = unquote(match[1])
    for name in ("RecordIdentifierValueAsString", "EventTime", "DeletionMode", "ExpirationTimeResponse"):
        if name in request.args:
            params[name] = request.args[name]
    for name, member in (("FeatureName", "FeatureNames"), ("TargetStores", "TargetStores")):
        if name in request.args:
            params[member] = request.args.getlist(name)
    return params
