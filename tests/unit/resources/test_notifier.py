"""Messages reach a real HTTP server and a real SMTP conversation."""

from __future__ import annotations

import ipaddress
import json
import logging
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from housing_assets.deployments import load_resources
from resources.services.notifier import EmailNotifier, LogNotifier, SlackNotifier
from resources.services.optional import attempt


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
        facts: dict[str, Any] = {"host": "127.0.0.1", "port": port, "sender": "a@example.com"}
        notifier = EmailNotifier(**facts, recipients=["b@example.com"], user="u", password="secret")
        with pytest.raises(OSError, match=r"does not offer STARTTLS.*HOUSING_SMTP_ALLOW_INSECURE=on"):
            notifier.notify("Run failed", "because")
        assert {line.split(" ")[0].upper() for line in received} <= {"EHLO", "QUIT"}
        EmailNotifier(**facts, recipients=["b@example.com"], allow_insecure=True).notify("Run failed", "because")
    assert {"Subject: Run failed", "To: b@example.com", "because"} <= set(received)


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate of this machine's loopback address, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=2))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key_file.write_bytes(key.private_bytes(*form))
    return certificate_file, key_file


def test_email_is_encrypted_for_a_server_whose_certificate_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    received: list[tuple[bool, str]] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(30)
            channel, safe, in_data = self.request, False, False
            channel.sendall(b"220 ready\r\n")
            with suppress(OSError):
                lines = channel.makefile("rb")
                while raw := lines.readline():
                    line = raw.decode().rstrip("\r\n")
                    received.append((safe, line))
                    verb = line.split(" ")[0].upper()
                    if in_data:
                        if line == ".":
                            in_data = False
                            channel.sendall(b"250 taken\r\n")
                    elif verb == "STARTTLS":
                        channel.sendall(b"220 go\r\n")
                        channel, safe = context.wrap_socket(channel, server_side=True), True
                        lines = channel.makefile("rb")
                    elif verb == "EHLO":
                        channel.sendall(b"250-me\r\n" + b"250-STARTTLS\r\n" * (not safe) + b"250 AUTH PLAIN\r\n")
                    else:
                        in_data = verb == "DATA"
                        codes = {"DATA": b"354", "AUTH": b"235", "QUIT": b"221"}
                        channel.sendall(codes.get(verb, b"250") + b" ok\r\n")

    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as port:
        facts: dict[str, Any] = {"host": "127.0.0.1", "port": port, "sender": "a@example.com", "user": "u"}
        facts |= {"recipients": ["b@example.com"], "password": "secret"}
        with pytest.raises(ssl.SSLCertVerificationError, match=r"self.signed"):
            EmailNotifier(**facts).notify("Run failed", "because")
        assert all(line.split(" ")[0].upper() in ("EHLO", "STARTTLS") for _, line in received)
        EmailNotifier(**facts, allow_insecure=True).notify("Run failed", "unverified")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        EmailNotifier(**facts).notify("Run failed", "verified")
    texts = {line for safe, line in received if safe}
    assert {"unverified", "verified"} <= texts
    assert not any(line.startswith("AUTH") or "verified" in line for safe, line in received if not safe)


def test_a_message_that_cannot_be_sent_in_time_is_given_up() -> None:
    held = threading.Event()
    assert attempt(lambda: held.wait(60), seconds=0.05) == "no answer within 0.05 s"
    held.set()
    assert attempt(lambda: 1 / 0) == "ZeroDivisionError: division by zero"
    assert attempt(lambda: None) is None


def test_the_address_of_a_webhook_is_in_no_message() -> None:
    for url in ("https://hooks.example.com/secret\n", "https://hooks.example.com/sec ret"):
        with pytest.raises(ValueError, match="has blanks") as caught:
            SlackNotifier(webhook_url=url).notify("x", "y")
        assert "sec" not in str(caught.value)


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
