"""AWS calls that survive throttling and short outages, for a bounded time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_THROTTLING = {
    "Throttling",
    "ThrottlingException",
    "ThrottledException",
    "RequestThrottled",
    "RequestThrottledException",
    "TooManyRequestsException",
    "RequestLimitExceeded",
    "BandwidthLimitExceeded",
    "LimitExceededException",
    "PriorRequestNotComplete",
    "SlowDown",
}
_OUTAGE = {
    "InternalFailure",
    "InternalServerError",
    "InternalError",
    "ServiceUnavailable",
    "ServiceUnavailableException",
    "RequestTimeout",
    "RequestTimeoutException",
}
_MISSING = {
    "ResourceNotFound",
    "ResourceNotFoundException",
    "EntityNotFoundException",
    "NoSuchKey",
    "404",
    "NotFound",
}


def aws_client(service: str, region_name: str | None = None) -> Any:
    """A boto3 client that does not retry by itself: `AwsCaller` does, visibly and for a known time."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"}, connect_timeout=10, read_timeout=60, tcp_keepalive=True
    )
    return boto3.client(service, region_name=region_name, config=config)  # pyright: ignore[reportCallIssue, reportArgumentType]


def error_code(error: BaseException) -> str:
    """The code of a botocore `ClientError`; an empty string for anything else."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def error_message(error: BaseException) -> str:
    """The message of a botocore `ClientError`, or the exception's text."""
    response = getattr(error, "response", None)
    found = response.get("Error", {}).get("Message") if isinstance(response, dict) else None
    return str(found or error)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: throttling, an error of the server, a broken connection."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return error_code(error) in _THROTTLING | _OUTAGE or status == 429 or status >= 500
    return isinstance(error, ConnectionError | HTTPClientError)


def is_missing(error: BaseException) -> bool:
    """Whether the error says that the named job, object, table or log group does not exist.

    SageMaker answers `ValidationException` for a job that it does not know.
    """
    code = error_code(error)
    if code in _MISSING:
        return True
    text = error_message(error).lower()
    return code == "ValidationException" and ("not found" in text or "could not find" in text)


@dataclass
class AwsCaller:
    """Repeats a call while its error is transient, with exponential backoff and full jitter.

    `patience_seconds` counts from the first of a row of failures of one call. `warn` is called once for such a row.
    """

    patience_seconds: float = 900.0
    first_delay_seconds: float = 0.5
    longest_delay_seconds: float = 20.0
    warn: Callable[[str], None] | None = None

    def __call__(
        self,
        function: Callable[..., Any],
        *,
        patience_seconds: float | None = None,
        abandoned: threading.Event | None = None,
        **params: Any,
    ) -> Any:
        """The answer of `function(**params)`. Raises its last error when patience is at an end or `abandoned` is set.

        Waits in `time.sleep` in the main thread, which an interrupt of the run ends at once.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        patience = self.patience_seconds if patience_seconds is None else patience_seconds
        deadline = time.monotonic() + patience
        delay = self.first_delay_seconds
        warned = False
        while True:
            try:
                return function(**params)
            except (ClientError, BotoCoreError) as error:
                left = deadline - time.monotonic()
                if not is_transient(error) or left <= 0 or (abandoned is not None and abandoned.is_set()):
                    raise
                if not warned and self.warn is not None:
                    name = getattr(function, "__name__", "call")
                    self.warn(f"{name}: {error}; trying again for up to {patience:.0f} s")
                    warned = True
            pause = min(left, random.uniform(delay / 2, delay))
            if abandoned is None:
                time.sleep(pause)
            else:
                abandoned.wait(pause)
            delay = min(2 * delay, self.longest_delay_seconds)
