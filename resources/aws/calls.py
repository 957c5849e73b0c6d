"""Clients of AWS, which botocore retries for a known time, and what the errors of their calls mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg

_MISSING = ("ResourceNotFound", "ResourceNotFoundException", "EntityNotFoundException", "NoSuchKey", "404", "NotFound")
_MISSING_TEXTS = ("not found", "could not find", "does not exist")
_LONGEST_PAUSE, _RETRY_QUOTA = 20.0, 100  # of botocore's standard retry mode; seconds, retries


def aws_client(service: str, region_name: str | None = None, *, retry_seconds: float = 900.0) -> Any:
    """A boto3 client that repeats throttled and unanswered calls for about `retry_seconds`, as botocore does.

    It is shared by all that ask for the same one, in any thread. That a call is repeated is logged once.
    """
    from step_scripts.runner.storage import service_client

    client = service_client(service, region_name, attempts=attempts_within(retry_seconds))
    client.meta.events.register("request-created", _log_retry, unique_id="log-retry")
    return client


def attempts_within(seconds: float) -> int:
    """How many attempts botocore makes in about `seconds` while it is throttled.

    Before attempt n + 2 it waits `random() * min(2**n, 20)` seconds. Its retry quota allows 100 in a row. Servers that
    fail or do not answer are asked again sooner, and 35 times at most: after 3 to 5 minutes their error is raised.
    """
    attempts, waited = 1, 0.0
    while waited < seconds and attempts <= _RETRY_QUOTA:
        waited += 0.5 * min(2.0 ** (attempts - 1), _LONGEST_PAUSE)
        attempts += 1
    return attempts


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
        return status == 429 or status >= 500 or "Throttl" in error_code(error)
    return isinstance(error, ConnectionError | HTTPClientError)


def is_missing(error: BaseException) -> bool:
    """Whether the error says that the named job, object, table, group or model package does not exist.

    Most of SageMaker answers `ValidationException` for a name that it does not know.
    """
    code = error_code(error)
    if code in _MISSING:
        return True
    return code == "ValidationException" and any(text in error_message(error).lower() for text in _MISSING_TEXTS)


def if_found(function: Callable[..., Any], **params: Any) -> Any:
    """The answer of a call; None if what it names does not exist."""
    from botocore.exceptions import ClientError

    try:
        return function(**params)
    except ClientError as error:
        if is_missing(error):
            return None
        raise


def already_exists(error: BaseException) -> bool:
    """Whether the error says that the name is taken."""
    return error_code(error) == "ResourceInUse" or "already exist" in error_message(error).lower()


def pages(client: Any, operation: str, member: str, **params: Any) -> Iterator[Any]:
    """The entries of all pages of a List operation, such as `list_models`; `member` holds them."""
    for page in client.get_paginator(operation).paginate(**params):
        yield from page.get(member, [])


def _log_retry(request: Any, operation_name: str, **_: Any) -> None:
    if request.context.get("retries", {}).get("attempt") == 2:
        dg.get_dagster_logger().warning(f"AWS throttles {operation_name} or does not answer; trying again")
