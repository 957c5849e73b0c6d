"""The inference server's ASGI application: SageMaker's container contract, and its runtime API beside it.

`GET /ping`, `POST /invocations`, `POST /endpoints/<name>/invocations`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from step_scripts.serving.capture import Exchange, RequestCapture, now
from step_scripts.serving.media import JSON, RequestError, encode, request_media, response_media
from step_scripts.serving.served_model import ServedModel

MAX_BODY_BYTES = 6_291_456
_DRAINED_BYTES = 64 << 20  # of a body that is too large; then the connection is closed
_BODY_SECONDS = 60.0
_INLINE_BYTES = 4096  # smaller bodies are answered faster than another thread could take them over
_ERROR_TYPES = {404: "ValidationError", 500: "InternalFailure", 503: "ServiceUnavailable"}

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

logger = logging.getLogger("housing.serving")


class ClientGoneError(Exception):
    """The client closed the connection before its request was complete."""


class InferenceApp:
    """Answers from `model`, which may be replaced at any time; a request is answered by one model throughout."""

    def __init__(self) -> None:
        self.model: ServedModel | None = None
        self.capture: RequestCapture | None = None
        self._waiting: list[tuple[ServedModel, np.ndarray, asyncio.Future[np.ndarray]]] = []
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="predict")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served, not {scope['type']}")
        request_id = str(uuid.uuid4())
        model = self.model
        headers = [(b"x-amzn-requestid", request_id.encode())]
        try:
            body, media = await self._respond(scope, receive, model)
            status = 200
            if model is not None:
                headers.append((b"x-amzn-invoked-production-variant", model.version.encode()))
                headers.append((b"x-model-digest", model.digest.encode()))
        except RequestError as error:
            status, media = error.status, JSON
            body = json.dumps(error.body()).encode()
            headers.append((b"x-amzn-errortype", _ERROR_TYPES.get(status, "ValidationError").encode()))
            if status == 405:
                headers.append((b"allow", b"GET, HEAD" if scope["path"] == "/ping" else b"POST"))
            if status in (408, 413):
                headers.append((b"connection", b"close"))
        except ClientGoneError:
            return
        except Exception:  # the boundary of a request: the server goes on with the next one
            logger.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            status, media = 500, JSON
            body = json.dumps({"error": "internal error", "message": f"internal error, request {request_id}"}).encode()
            headers.append((b"x-amzn-errortype", _ERROR_TYPES[500].encode()))
        headers.append((b"content-type", media.encode()))
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _respond(self, scope: Message, receive: Receive, model: ServedModel | None) -> tuple[bytes, str]:
        path, method = scope["path"], scope["method"]
        if path == "/ping":
            if method not in ("GET", "HEAD"):
                raise RequestError(405, f"{method} is not allowed on /ping; use GET")
            return json.dumps(self._description(_loaded(model))).encode(), JSON
        if path != "/invocations":
            self._check_endpoint(path, model)
        if method != "POST":
            raise RequestError(405, f"{method} is not allowed on {path}; use POST")
        model = _loaded(model)
        received = dict(scope["headers"])
        body = await _read_body(received, receive)
        given = request_media(received.get(b"content-type", b"").decode("latin-1"))
        wanted = response_media(received.get(b"accept", b"").decode("latin-1"), given)
        if len(body) <= _INLINE_BYTES:
            answer = encode(await self._together(model, model.parser.parse(body, given)), wanted)
        else:
            loop = asyncio.get_running_loop()
            predicted = await loop.run_in_executor(self._threads, _predict, model, body, given)
            answer = await loop.run_in_executor(self._threads, encode, predicted, wanted)
        if self.capture is not None:
            inference_id = received.get(b"x-amzn-sagemaker-inference-id", b"").decode("latin-1")
            self.capture.add(Exchange(now(), given, body, wanted, answer, inference_id))
        return answer, wanted

    def _description(self, model: ServedModel) -> dict[str, Any]:
        """What `/ping` says."""
        if self.capture is None:
            return model.description()
        return {**model.description(), "captured": self.capture.counts().model_dump()}

    def _together(self, model: ServedModel, features: np.ndarray) -> asyncio.Future[np.ndarray]:
        """The predictions of a small request, made in one call with those of the requests that arrived with it.

        A call takes about 0.2 ms for one row and little more for many.
        """
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._predict_waiting)
        predicted: asyncio.Future[np.ndarray] = loop.create_future()
        self._waiting.append((model, features, predicted))
        return predicted

    def _predict_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for _, group in itertools.groupby(waiting, key=lambda entry: id(entry[0])):
            entries = [entry for entry in group if not entry[2].done()]  # done: its request was cancelled
            if not entries:
                continue
            try:
                values = entries[0][0].predict(np.concatenate([features for _, features, _ in entries]))
            except Exception as error:  # noqa: BLE001  # each request reports it
                for _, _, predicted in entries:
                    predicted.set_exception(error)
                continue
            ends = np.cumsum([len(features) for _, features, _ in entries])[:-1]
            for (_, _, predicted), part in zip(entries, np.split(values, ends), strict=True):
                predicted.set_result(part)

    @staticmethod
    def _check_endpoint(path: str, model: ServedModel | None) -> None:
        parts = path.split("/")
        if len(parts) != 4 or parts[1] != "endpoints" or parts[3] != "invocations":
            raise RequestError(
                404, f"there is no {path[:200]}; use /ping, /invocations or /endpoints/<name>/invocations"
            )
        if parts[2] != _loaded(model).endpoint_name:
            raise RequestError(
                404, f"Endpoint {parts[2][:100]} not found; this server serves {_loaded(model).endpoint_name}."
            )


def _loaded(model: ServedModel | None) -> ServedModel:
    if model is None:
        raise RequestError(503, "the model is being loaded")
    return model


def _predict(model: ServedModel, body: bytes, media: str) -> np.ndarray:
    return model.predict(model.parser.parse(body, media))


async def _read_body(headers: dict[bytes, bytes], receive: Receive) -> bytes:
    declared = headers.get(b"content-length", b"0")
    if int(declared) > MAX_BODY_BYTES and headers.get(b"expect", b"").lower() == b"100-continue":
        raise _too_large()  # nothing has been sent yet, nothing needs to be read
    message = await receive()
    body = message.get("body", b"")
    if message["type"] == "http.request" and message.get("more_body"):
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                message, body = await _read_rest(body, receive)
        except TimeoutError:
            raise RequestError(408, f"the body did not arrive within {_BODY_SECONDS:g} s") from None
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    if len(body) > MAX_BODY_BYTES:
        raise _too_large()
    if not body:
        raise RequestError(400, "the body is empty")
    return body


async def _read_rest(first: bytes, receive: Receive) -> tuple[Message, bytes]:
    parts, total = [first], len(first)
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return message, b""
        total += len(message["body"])
        if total <= MAX_BODY_BYTES:
            parts.append(message["body"])
        elif total > _DRAINED_BYTES:
            raise _too_large()
        if not message.get("more_body"):
            if total > MAX_BODY_BYTES:  # read to its end: a client that is still sending may not see the answer
                raise _too_large()
            return message, b"".join(parts)


def _too_large() -> RequestError:
    return RequestError(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send the rows in several requests")
