"""Pipes context and messages on S3 under keys that depend on the job alone.

dagster-aws's classes choose random keys, so a second Dagster process could not find them. This module imports boto3:
import it when a job is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster_aws.pipes import PipesS3ContextInjector, PipesS3MessageReader

from resources.aws.calls import is_transient
from resources.sagemaker.job_files import CONTEXT, MESSAGES, JobPrefix

if TYPE_CHECKING:
    from dagster_pipes import PipesContextData, PipesParams


class JobContextInjector(PipesS3ContextInjector):
    """Writes the context to `<job prefix>/context.json`, for `dagster_pipes.PipesS3ContextLoader`.

    With `write=False` (the job runs already) the context that was written when it was started stays.
    """

    def __init__(self, prefix: JobPrefix, *, write: bool = True) -> None:
        super().__init__(bucket=prefix.bucket, client=prefix.client)
        self._prefix, self._write = prefix, write

    @contextmanager
    def inject_context(self, context: PipesContextData) -> Iterator[PipesParams]:
        """Write the context; yields bucket and key. It stays, as a record of what the job was given."""
        if self._write:
            self._prefix.put(CONTEXT, json.dumps(context).encode())
        yield {"bucket": self._prefix.bucket, "key": self._prefix.path(CONTEXT)}


class JobMessageReader(PipesS3MessageReader):
    """Reads the chunks `<job prefix>/messages/<n>.json` in order, from the first, each once, about every second.

    `closed` holds what the job's Pipes session was closed with, once it has been. A message that cannot be handled ends
    the reading; `check` raises its error in the caller's thread.
    """

    def __init__(self, prefix: JobPrefix) -> None:
        super().__init__(interval=0, bucket=prefix.bucket, client=prefix.client)
        self._prefix = prefix
        self.closed: dict[str, Any] | None = None
        self.abandoned = False
        self.error: BaseException | None = None

    def check(self) -> None:
        """Raise the error, if any, that ended the reading."""
        if self.error is not None:
            raise self.error

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[PipesParams]:
        """Read in a thread while the context is open; yields bucket and key prefix for `PipesS3MessageWriter`."""
        observed: Any = _ObservedHandler(handler, self)
        with super().read_messages(observed) as params:
            try:
                yield params
            finally:
                self.abandoned = True

    @contextmanager
    def get_params(self) -> Iterator[PipesParams]:
        """Bucket and key prefix of the messages."""
        yield {"bucket": self._prefix.bucket, "key_prefix": self._prefix.path(MESSAGES)}

    def messages_are_readable(self, params: PipesParams) -> bool:
        """Always true: `download_messages_chunk` finds out whether a chunk is there."""
        return True

    def download_messages(self, cursor: int | None, params: PipesParams) -> tuple[int, str] | None:
        """All chunks that have arrived: a run that attaches to a job has to catch up with it."""
        chunks = []
        while (chunk := self.download_messages_chunk(self.counter, params)) is not None:
            chunks.append(chunk)
            self.counter += 1
        return (self.counter, "\n".join(chunks)) if chunks else None

    def download_messages_chunk(self, index: int, params: PipesParams) -> str | None:
        """One chunk; `None` if it is not there yet, or S3 does not answer. The base class hides all other errors."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return self._prefix.message_chunk(index)
        except (ClientError, BotoCoreError) as error:
            if is_transient(error):
                return None
            raise


class _ObservedHandler:
    """The session's handler as the reader's thread sees it: tells the reader how the session was closed, and errors."""

    def __init__(self, handler: dg.PipesMessageHandler, reader: JobMessageReader) -> None:
        self._handler, self._reader = handler, reader

    @property
    def received_closed_message(self) -> bool:
        """Ends the thread: dagster's own would wait ten seconds for a job that was stopped."""
        return self._reader.abandoned or self._reader.closed is not None

    def handle_message(self, message: Any) -> None:
        self._handler.handle_message(message)
        if message["method"] == "closed":
            self._reader.closed = message.get("params") or {}

    def report_pipes_framework_exception(self, origin: str, exc_info: Any) -> None:
        self._reader.error = exc_info[1]
        self._handler.report_pipes_framework_exception(origin, exc_info)
