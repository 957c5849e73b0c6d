"""The inference server's application: SageMaker's container contract, and its runtime API beside it.

`GET /ping` and `POST /invocations` answer as a container does, `POST /endpoints/<name>/invocations` as SageMaker does,
which passes on what the container refuses as a `ModelError` with the status and the answer of the container.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from http import HTTPMethod
from typing import Any

import h11
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from step_scripts.serving.deployment import JSON, MAX_BODY_BYTES, RequestCapture
from step_scripts.serving.request_rows import RequestError
from step_scripts.serving.served_model import ServedModel, too_large

_DRAINED_BYTES = 64 << 20  # of a body that is too large; then the connection is closed
_BODY_SECONDS = 60.0
HEAD_SECONDS = 20.0
_HEAD_TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_INLINE_BYTES = 4096  # smaller bodies are answered faster than another thread could take them over
_ERROR_TYPES = {404: "ValidationError", 424: "ModelError", 500: "InternalFailure", 503: "ServiceUnavailable"}
_BY_CONTAINER = (400, 406, 415, 500)  # statuses with which a container refuses or fails

logger = logging.getLogger("housing.serving")


class InferenceApp(Starlette):
    """Answers from `model`, which may be replaced at any time; a request is answered by one model throughout."""

    def __init__(self) -> None:
        self.model: ServedModel | None = None
        self.capture: RequestCapture | None = None
        self.refused: dict[str, str] | None = None  # the deployment that could not be changed to, and the error
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="predict")
        routes = [
            Route("/ping", self._ping, methods=[HTTPMethod.GET]),
            Route("/invocations", self._invoke, methods=[HTTPMethod.POST]),
            Route("/endpoints/{endpoint}/invocations", self._invoke, methods=[HTTPMethod.POST]),
        ]
        super().__init__(routes=routes, exception_handlers={HTTPException: _no_route})
        self.router.redirect_slashes = False

    async def _ping(self, _: Request) -> Response:
        model, capture = self.model, self.capture
        if model is None:
            return _refusal(_loading())
        said = {
            "status": "InService",
            "endpoint_name": model.record.endpoint_name,
            "version": model.record.version,
            "model_digest": model.record.model.digest,
            "deployment_id": model.record.deployment_id,
            **({"captured": capture.counts().model_dump()} if capture else {}),
            **({"refused": self.refused} if self.refused else {}),
        }
        return _response(json.dumps(said), 200, JSON, _identity(model))

    async def _invoke(self, request: Request) -> Response:
        endpoint = request.path_params.get("endpoint")
        model = self.model
        try:
            if model is None:
                raise _loading()
            if endpoint not in (None, model.record.endpoint_name):
                served = model.record.endpoint_name
                raise RequestError(404, f"Endpoint {endpoint[:100]} not found; this server serves {served}.")
            headers, body = request.headers, await _body(request)
            asked = (body, headers.get("content-type", ""), headers.get("accept", ""))
            encoding = headers.get("content-encoding", "")
            if len(body) <= _INLINE_BYTES and not encoding:
                answer = model.answer(*asked)
            else:
                loop = asyncio.get_running_loop()
                answer = await loop.run_in_executor(self._threads, model.answer, *asked, encoding)
            if self.capture is not None:
                self.capture.add(answer._replace(inference_id=headers.get("x-amzn-sagemaker-inference-id", "")))
            return _response(answer.output_body, 200, answer.output_type, _identity(model))
        except RequestError as error:
            return _refusal(error, by_runtime=endpoint is not None)
        except ClientDisconnect:
            return Response()  # nobody is there to read it
        except Exception:  # the boundary of a request: the server goes on with the next one
            number = uuid.uuid4()
            logger.exception("request %s: %s %s failed", number, request.method, request.url.path)
            return _refusal(RequestError(500, f"internal error, request {number}"), by_runtime=endpoint is not None)


async def _no_route(request: Request, error: Exception) -> Response:
    """What Starlette refuses: another path or method than those of the routes."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 404:
        reason = f"there is no {path}; use /ping, /invocations or /endpoints/<name>/invocations"
    else:
        allowed = "GET" if path == "/ping" else "POST"
        reason = f"{request.method} is not allowed on {path}; use {allowed}"
    return _refusal(RequestError(error.status_code, reason), headers=dict(error.headers or {}))


async def _body(request: Request) -> bytes:
    """The body. Raises `RequestError` where it is too large, too slow or empty, `ClientDisconnect`."""
    declared = int(request.headers.get("content-length", "0"))
    if declared > MAX_BODY_BYTES and request.headers.get("expect", "").lower() == "100-continue":
        raise too_large()  # nothing has been sent yet, nothing needs to be read
    body, total = bytearray(), 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                total += len(part)
                if total <= MAX_BODY_BYTES:
                    body += part
                elif total > _DRAINED_BYTES:  # till then it is read: a client that still sends may not see the answer
                    break
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive within {_BODY_SECONDS:g} s") from None
    if total > MAX_BODY_BYTES:
        raise too_large()
    return bytes(body)


def _refusal(error: RequestError, *, by_runtime: bool = False, headers: dict[str, str] | None = None) -> Response:
    status, body = error.status, error.body()
    if by_runtime and status in _BY_CONTAINER:
        text = json.dumps(body)
        side = "server" if status >= 500 else "client"
        message = f'Received {side} error ({status}) from primary with message "{text}".'
        body = {"message": message, "OriginalStatusCode": status, "OriginalMessage": text, "LogStreamArn": ""}
        status = 424
    more = {"x-amzn-errortype": _ERROR_TYPES.get(status, "ValidationError"), **(headers or {})}
    if status in (408, 413):
        more["connection"] = "close"
    return _response(json.dumps(body), status, JSON, more)


def _response(body: bytes | str, status: int, media: str, headers: dict[str, str]) -> Response:
    content = body.encode() if isinstance(body, str) else body
    return Response(content, status, {"content-type": media, "x-amzn-requestid": str(uuid.uuid4()), **headers})


def _identity(model: ServedModel) -> dict[str, Any]:
    return {"x-amzn-invoked-production-variant": model.record.version, "x-model-digest": model.record.model.digest}


def _loading() -> RequestError:
    return RequestError(503, "the model is being loaded")


class RequestProtocol(H11Protocol):
    """One connection: uvicorn's protocol on h11, with a time limit for the head of a request.

    h11 bounds the size of the head (64 KiB), and passes over offers to change to another protocol (`Upgrade: h2c`, as
    Java's client and `curl --http2` make them), where uvicorn's faster protocol on httptools loses the body.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A connection on which no request comes is closed like one on which no further one comes."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the head that was waited for."""
        self._stop_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Where what was received ends within a head, the rest of it has to come in time."""
        super().handle_events()
        if self.conn.their_state is not h11.IDLE or not self.conn.trailing_data[0]:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._refuse_head)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse_head(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(_HEAD_TIMEOUT)
            self.transport.close()
