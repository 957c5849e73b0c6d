"""The small files of a job on S3: Pipes context and messages, what the caller adds, the lease."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from resources.aws.calls import error_code, is_missing

CONTEXT = "context.json"
BOOTSTRAP = "pipes.json"
MESSAGES = "messages"


@dataclass(frozen=True)
class JobInputs:
    """What a job needs beside its request.

    `files` and `secrets` (name → content) are put below the job's prefix before it starts; secrets are removed when
    it has ended. `uri_variable` and `name_variable` name environment variables that tell the job its prefix and its
    name. With `uri_variable` the Pipes bootstrap parameters go into `pipes.json` below the prefix instead of the
    environment, whose values are short on SageMaker (256 characters in processing jobs). `digest` identifies the
    work; without it, it is a digest of the request.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    secrets: Mapping[str, bytes] = field(default_factory=dict)
    uri_variable: str | None = None
    name_variable: str | None = None
    digest: str | None = None


@dataclass(frozen=True)
class JobPrefix:
    """`<job root>/<job name>/` on S3, and the calls on the objects below it."""

    client: Any
    call: Callable[..., Any]
    bucket: str
    key: str

    @classmethod
    def of(cls, client: Any, call: Callable[..., Any], job_root: str, name: str) -> JobPrefix:
        """The prefix of job `name`. `job_root` is an `s3://bucket/prefix` URI."""
        bucket, _, prefix = job_root.removeprefix("s3://").strip("/").partition("/")
        return cls(client, call, bucket, "/".join(part for part in (prefix, name) if part))

    @property
    def uri(self) -> str:
        """The prefix as a URI that ends with a slash."""
        return f"s3://{self.bucket}/{self.key}/"

    def path(self, name: str) -> str:
        """Key of the object `name`."""
        return f"{self.key}/{name}"

    def put(self, name: str, data: bytes, **params: Any) -> str:
        """Write an object; returns its entity tag."""
        answer = self.call(self.client.put_object, Bucket=self.bucket, Key=self.path(name), Body=data, **params)
        return str(answer["ETag"])

    def get(self, name: str, **options: Any) -> tuple[bytes, str] | None:
        """Content and entity tag of an object; `None` if there is none."""
        from botocore.exceptions import ClientError

        try:
            answer = self.call(self.client.get_object, Bucket=self.bucket, Key=self.path(name), **options)
            return answer["Body"].read(), str(answer["ETag"])
        except ClientError as error:
            if is_missing(error):
                return None
            raise

    def put_if_unchanged(self, name: str, data: bytes, entity_tag: str) -> str | None:
        """Replace an object if nobody else has since; the new entity tag, or `None` if somebody has."""
        from botocore.exceptions import ClientError

        try:
            return self.put(name, data, IfMatch=entity_tag)
        except ClientError as error:
            if error_code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412", "NoSuchKey"):
                return None
            raise

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens if there is none."""
        self.call(self.client.delete_object, Bucket=self.bucket, Key=self.path(name))

    def clear_messages(self) -> None:
        """Remove the messages of an earlier use of the same prefix."""
        while True:
            found = self.call(self.client.list_objects_v2, Bucket=self.bucket, Prefix=self.path(MESSAGES) + "/")
            for item in found.get("Contents", []):
                self.call(self.client.delete_object, Bucket=self.bucket, Key=item["Key"])
            if not found.get("IsTruncated"):
                return

    def message_chunk(self, index: int, **options: Any) -> list[dict[str, Any]] | None:
        """The Pipes messages of chunk `index` (from 1); `None` if it has not been written."""
        found = self.get(f"{MESSAGES}/{index}.json", **options)
        if found is None:
            return None
        messages: list[dict[str, Any]] = []
        for line in found[0].decode(errors="replace").splitlines():
            try:
                message = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(message, dict):
                messages.append(message)
        return messages

    def has_closed(self) -> bool:
        """Whether the job's messages end with a `closed` that reports no exception."""
        index, closed = 1, False
        while (chunk := self.message_chunk(index)) is not None:
            for message in chunk:
                if message.get("method") == "closed":
                    closed = "exception" not in (message.get("params") or {})
            index += 1
        return closed
