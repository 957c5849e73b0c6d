"""Messages reach a real HTTP server and a real SMTP conversation."""

from __future__ import annotations

import json
import logging
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from housing_assets.deployments import load_resources
from resources.notifier import EmailNotifier, LogNotifier, SlackNotifier


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        address: Any = server.server_address
        yield address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        LogNotifier().notify("Run failed", "because")
    assert "Run failed\nbecause" in caplog.text


def test_slack_webhook() -> None:
    bodies: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(HTTPServer(("127.0.0.1", 0), Handler)) as port:
        SlackNotifier(webhook_url=f"http://127.0.0.1:{port}/hook").notify("Run failed", "because")
    assert bodies == [{"text": "*Run failed*\nbecause"}]
    with pytest.raises(ValueError, match="must begin with https"):
        SlackNotifier(webhook_url="http://example.com/hook").notify("x", "y")


def test_email() -> None:
    received: list[str] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 ready\r\n")
            in_data = False
            for raw in self.rfile:
                line = raw.decode().rstrip("\r\n")
                received.append(line)
                if in_data:
                    if line == ".":
                        in_data = False
                        self.wfile.write(b"250 taken\r\n")
                    continue
                verb = line.split(" ")[0].upper()
                in_data = verb == "DATA"
                self.wfile.write(b"354 go\r\n" if in_data else b"221 bye\r\n" if verb == "QUIT" else b"250 ok\r\n")

    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as port:
        notifier = EmailNotifier(host="127.0.0.1", port=port, sender="a@example.com", recipients=["b@example.com"])
        notifier.notify("Run failed", "because")
    assert {"Subject: Run failed", "To: b@example.com", "because"} <= set(received)


def test_the_deployment_chooses_the_notifier_and_keeps_its_secret_out() -> None:
    assert isinstance(load_resources({})["notifier"], LogNotifier)
    secret = {"HOUSING_NOTIFIER": "slack", "HOUSING_SLACK_WEBHOOK": "https://hooks.example.com/secret"}
    notifier = load_resources(secret)["notifier"]
    assert isinstance(notifier, SlackNotifier)
    assert "secret" not in repr(notifier)
    with pytest.raises(ValueError, match="HOUSING_NOTIFIER='pigeon'"):
        load_resources({"HOUSING_NOTIFIER": "pigeon"})
    with pytest.raises(ValueError, match="HOUSING_SNS_TOPIC is not set"):
        load_resources({"HOUSING_NOTIFIER": "sns"})
