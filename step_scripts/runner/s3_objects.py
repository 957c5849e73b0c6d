"""What S3 can do and Arrow's file system cannot: entity tags, deletion without folder markers; and boto3's clients."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from step_scripts.runner.wording import counted

_ATTEMPTS = 10  # of one request, with exponential backoff: about a minute of throttling
_DELETED_AT_ONCE = 1000


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URI."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def region() -> str | None:
    """The region of this process. Boto3 does not read `AWS_REGION`, which is what SageMaker sets in its jobs."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


def service_client(
    service: str, region_name: str | None = None, connections: int = 32, attempts: int = _ATTEMPTS
) -> Any:
    """A boto3 client that makes `attempts` attempts where it is throttled. It may be used by several threads."""
    environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    return _client(service, region_name or region(), connections, attempts, environment)


@functools.lru_cache(maxsize=32)
def _client(
    service: str, region_name: str | None, connections: int, attempts: int, environment: tuple[tuple[str, str], ...]
) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=connections,
        tcp_keepalive=True,
    )
    # A session of its own: boto3's default session must not be used by several threads at once.
    session = boto3.Session(region_name=region_name)
    return session.client(service, config=config)  # pyright: ignore[reportCallIssue, reportArgumentType]


def listed(uri: str, **options: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The key that a prefix stands for, and each page of what is below it."""
    bucket, key = split_uri(uri.rstrip("/"))
    prefix = f"{key}/" if key else ""
    pages = service_client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, **options)
    return ((prefix, page) for page in pages)


@contextmanager
def os_errors(uri: str) -> Iterator[None]:
    """Turns the errors of boto3 in the block into `OSError`, `FileNotFoundError` if there is no object at `uri`."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        if isinstance(error, ClientError) and error.response["Error"]["Code"] == "404":
            raise FileNotFoundError(f"{uri} does not exist") from error
        raise OSError(str(error)) from error


def delete_objects(uri: str, paths: Sequence[str]) -> None:
    """Delete objects given by their paths below a prefix; missing ones are ignored. Raises `OSError`."""
    bucket, key = split_uri(uri)
    for start in range(0, len(paths), _DELETED_AT_ONCE):
        chosen = [{"Key": f"{key.rstrip('/')}/{path}"} for path in paths[start : start + _DELETED_AT_ONCE]]
        answer = service_client("s3").delete_objects(Bucket=bucket, Delete={"Objects": chosen, "Quiet": True})
        if errors := answer.get("Errors"):
            first = errors[0]
            raise OSError(
                f"{counted(len(errors), 'object')} below {uri} could not be deleted, the first is {first.get('Key')}: "
                f"{first.get('Code')} {first.get('Message')}. Allow s3:DeleteObject for this prefix"
            )


def delete_prefix(uri: str) -> None:
    """Delete everything below a prefix, folder markers included. Raises `ValueError` for a whole bucket."""
    if not split_uri(uri)[1].strip("/"):
        raise ValueError(f"{uri} is a bucket")
    for prefix, page in listed(uri):
        delete_objects(uri, [item["Key"].removeprefix(prefix) for item in page.get("Contents", [])])
