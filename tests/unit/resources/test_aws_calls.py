"""Clients of AWS: how often botocore repeats a call, and what is said about it."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from botocore.exceptions import ClientError

from resources.aws.calls import attempts_within, aws_client, if_found, is_missing, is_transient


class Service(BaseHTTPRequestHandler):
    """Answers with each of `answers`, status and error code, and then with success."""

    answers: list[tuple[int, str]]
    calls: int

    def do_POST(self) -> None:
        type(self).calls += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        status, code = self.answers.pop(0) if self.answers else (200, "")
        body = json.dumps({"__type": code, "message": "model was not found"} if code else {"Tags": []}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Service]]:
    handler = type("Answers", (Service,), {"answers": [], "calls": 0})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_attempts_follow_from_the_time() -> None:
    assert [attempts_within(seconds) for seconds in (0, 0.2, 1, 15, 900, 1e9)] == [1, 2, 3, 6, 95, 101]


def test_a_throttled_call_is_repeated_and_said_once(service: type[Service], caplog: pytest.LogCaptureFixture) -> None:
    service.answers = [(400, "ThrottlingException")] * 2
    client = aws_client("sagemaker", "us-east-1", retry_seconds=10)
    with caplog.at_level(logging.WARNING, logger="dagster"):
        assert client.list_tags(ResourceArn="arn:aws:sagemaker:us-east-1:123456789012:model/m")["Tags"] == []
    assert service.calls == 3
    assert [r.getMessage() for r in caplog.records] == ["AWS throttles ListTags or does not answer; trying again"]


def test_after_the_time_the_error_is_raised_and_is_transient(service: type[Service]) -> None:
    service.answers = [(400, "ThrottlingException")] * 10
    with pytest.raises(ClientError) as caught:
        aws_client("sagemaker", "us-east-1", retry_seconds=0.5).list_tags(ResourceArn="arn:aws:sagemaker:x")
    assert service.calls == 2
    assert is_transient(caught.value)
    assert not is_missing(caught.value)


def test_what_does_not_exist_is_none_and_is_asked_for_once(service: type[Service]) -> None:
    client = aws_client("sagemaker", "us-east-1")
    service.answers = [(400, "ValidationException")]
    assert if_found(client.describe_model, ModelName="m") is None
    assert service.calls == 1
    service.answers = [(400, "AccessDeniedException")]
    with pytest.raises(ClientError):
        if_found(client.describe_model, ModelName="m")
