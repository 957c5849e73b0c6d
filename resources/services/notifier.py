"""Notifications: in the log, by Slack, by e-mail, or through an SNS topic."""

from __future__ import annotations

import json
import logging
import smtplib
import ssl
import urllib.request
from abc import ABC, abstractmethod
from email.message import EmailMessage

import dagster as dg
from pydantic import Field

_SECONDS = 20.0
_SUBJECT_LENGTH = 100  # SNS's limit
_log = logging.getLogger(__name__)


class Notifier(dg.ConfigurableResource, ABC):
    """Sends short messages. Which implementation is used is decided in `housing_assets.deployments`."""

    @abstractmethod
    def notify(self, title: str, text: str) -> None:
        """Send a message. Raises `OSError` (or what the service's client raises) if it cannot be delivered."""


class LogNotifier(Notifier):
    """Writes messages into the log of the process, which is the daemon's for sensors."""

    def notify(self, title: str, text: str) -> None:
        """Log at level error."""
        _log.error("%s\n%s", title, text)


class SlackNotifier(Notifier):
    """Posts messages to an incoming webhook of Slack (or of what understands the same)."""

    webhook_url: str = Field(description="URL of the webhook. It is a secret: give it as an environment variable.")

    def notify(self, title: str, text: str) -> None:
        """Post the message."""
        if self.webhook_url.split() != [self.webhook_url]:  # the client's own message would show it
            raise ValueError("the URL of the webhook has blanks or line ends in it")
        if not self.webhook_url.startswith(("https://", "http://127.0.0.1:", "http://localhost:")):
            raise ValueError("the URL of the webhook must begin with https://")
        body = json.dumps({"text": f"*{title}*\n{text}"}).encode()
        request = urllib.request.Request(self.webhook_url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_SECONDS):
            pass


class EmailNotifier(Notifier):
    """Sends messages through an SMTP server: encrypted (STARTTLS), to a server whose certificate is verified."""

    host: str = Field(description="SMTP server.")
    port: int = Field(default=587, ge=1, le=65535, description="Its port.")
    sender: str = Field(description="Address of the sender.")
    recipients: list[str] = Field(min_length=1, description="Addresses that receive the messages.")
    user: str | None = Field(default=None, description="User name, if the server wants one.")
    password: str | None = Field(default=None, description="Password. Give it as an environment variable.")

    allow_insecure: bool = Field(
        default=False,
        description="Send also where the server offers no encryption, or its certificate cannot be verified.",
    )

    def notify(self, title: str, text: str) -> None:
        """Send the message. Before the connection is safe nothing is sent; raises `OSError` if it cannot be."""
        message = EmailMessage()
        message["Subject"], message["From"], message["To"] = title, self.sender, ", ".join(self.recipients)
        message.set_content(text)
        with smtplib.SMTP(self.host, self.port, timeout=_SECONDS) as server:
            server.ehlo()
            if server.has_extn("starttls"):
                context = ssl.create_default_context()  # what the system trusts, and the file SSL_CERT_FILE names
                if self.allow_insecure:
                    context.check_hostname = False
                    context.verify_mode = ssl.CERT_NONE
                server.starttls(context=context)
                server.ehlo()
            elif not self.allow_insecure:
                raise OSError(
                    f"{self.host}:{self.port} does not offer STARTTLS, and nothing is sent in clear; use the server's "
                    "port for STARTTLS, or HOUSING_SMTP_ALLOW_INSECURE=on"
                )
            if self.user:
                server.login(self.user, self.password or "")
            server.send_message(message)


class SnsNotifier(Notifier):
    """Publishes messages to an SNS topic."""

    topic_arn: str = Field(description="ARN of the topic.")
    region_name: str | None = Field(default=None, description="AWS region. Empty: boto3's.")

    def notify(self, title: str, text: str) -> None:
        """Publish the message."""
        import boto3

        client = boto3.client("sns", region_name=self.region_name)
        # A subject is one line of ASCII.
        subject = title.encode("ascii", "replace").decode().replace("\n", " ")[:_SUBJECT_LENGTH]
        client.publish(TopicArn=self.topic_arn, Subject=subject, Message=text or title)
