"""HTTP that is meant to hurt, or unusual: offers to change the protocol, heads that never end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from step_scripts import serve_model
from step_scripts.serving import app as serving_app
from step_scripts.serving.app import RequestProtocol
from step_scripts.serving.deployment import DeploymentRecord
from tests.serving_models import small_model

OFFER = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    answer = json.dumps([scope["method"], scope["path"], len(scope["headers"]), body.decode()]).encode()
    headers = [(b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@pytest.fixture
def port() -> Iterator[int]:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    config = uvicorn.Config(
        echo, http=RequestProtocol, ws="none", lifespan="off", log_config=None, timeout_keep_alive=2  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(30)


def answers(connection: socket.socket, count: int) -> list[Any]:
    """The bodies of so many answers."""
    found, received = [], b""
    while len(found) < count:
        head, end, rest = received.partition(b"\r\n\r\n")
        length = next((int(x[15:]) for x in head.split(b"\r\n") if x.startswith(b"content-length:")), 0)
        if end and len(rest) >= length:
            assert head.startswith(b"HTTP/1.1 200"), head
            found.append(json.loads(rest[:length]))
            received = rest[length:]
            continue
        data = connection.recv(65536)
        assert data, received
        received += data
    return found


@pytest.mark.parametrize("pieces", [1, 7, 10_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_offer_to_change_the_protocol_is_passed_over(port: int, pieces: int, chunked: bool) -> None:
    body = "1,2\n" * 500
    framed = f"Content-Length: {len(body)}\r\n\r\n{body}"
    if chunked:
        framed = f"Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n{body}\r\n0\r\n\r\n"
    offered = f"POST /invocations HTTP/1.1\r\nHost: x\r\n{OFFER}{framed}".encode()
    empty = f"POST /empty HTTP/1.1\r\nHost: x\r\n{OFFER}Content-Length: 0\r\n\r\n".encode()
    ping = f"GET /ping HTTP/1.1\r\nHost: x\r\n{OFFER}\r\n".encode()
    plain = f"POST /plain HTTP/1.1\r\nHost: x\r\n{framed}".encode()
    data = offered + ping + empty + plain + offered
    size = -(-len(data) // pieces)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(data), size):
            connection.sendall(data[start : start + size])
        found = answers(connection, 5)
    assert found == [
        ["POST", "/invocations", 5, body],
        ["GET", "/ping", 4, ""],
        ["POST", "/empty", 5, ""],
        ["POST", "/plain", 2, body],
        ["POST", "/invocations", 5, body],
    ]


@pytest.mark.parametrize("sent", [b"GET /ping HT", b"GET /ping HTTP/1.1\r\nA: b\r\n", b"G", b""])
def test_a_head_that_never_ends_is_given_up(port: int, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_app, "HEAD_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            answer = connection.recv(1000)
            assert answer.startswith(b"HTTP/1.1 408") or (not sent and not answer)


def test_a_head_that_comes_byte_by_byte_is_given_up(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_app, "HEAD_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        received = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError, TimeoutError):
            connection.sendall(b"GET /ping HTTP/1.1\r\nA: ")
            connection.settimeout(0.02)
            for _ in range(200):
                connection.sendall(b"b")
                with contextlib.suppress(TimeoutError):
                    received = connection.recv(1000)
                    break
        assert received.startswith(b"HTTP/1.1 408")


def test_an_endless_head_is_refused(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET /ping HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(200):
                connection.sendall(b"A: " + b"b" * 997 + b"\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 400")


def test_what_libraries_print_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_model, "_OUTPUT_SECONDS", 0.02)
    record = DeploymentRecord.model_validate(
        {
            "deployment_id": "d", "endpoint_name": "e", "version": "g/1", "deployed_at": "2026-11-29T00:00:00Z",
            "model": small_model(tmp_path / "model"),
        }
    )  # fmt: skip
    log, kept = tmp_path / "start.log", os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)

        async def print_much() -> None:
            task = asyncio.create_task(serve_model.ModelServer(record, tmp_path)._bound_output())
            for _ in range(40):
                os.write(2, b"panicked\n" * 20_000)
                await asyncio.sleep(0.05)
            task.cancel()

        asyncio.run(print_much())
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    assert log.stat().st_size < 3 << 20
    assert b"the file had grown too large" in log.read_bytes()
