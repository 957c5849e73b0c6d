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
    """Reads the chunks `<job prefix>/messages/<n>.json` in order, from the first, each once, whenever it is polled.

    The base class reads in a thread, one chunk an interval: a run that attaches to a job has to catch up with it, and
    a message that cannot be handled has to end the run. `closed` holds what the job's Pipes session was closed with.
    """

    _handler: dg.PipesMessageHandler

    def __init__(self, prefix: JobPrefix) -> None:
        super().__init__(bucket=prefix.bucket, client=prefix.client)
        self._prefix = prefix
        self.closed: dict[str, Any] | None = None

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[PipesParams]:
        """Yields bucket and key prefix for `PipesS3MessageWriter`."""
        self._handler = handler
        yield {"bucket": self._prefix.bucket, "key_prefix": self._prefix.path(MESSAGES)}

    def poll(self) -> bool:
        """Hand on what has arrived; whether the session is closed. That S3 does not answer is left to the next poll."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            for messages in self._prefix.message_chunks(self.counter):
                self.counter += 1
                for message in messages:
                    self._handler.handle_message(message)  # pyright: ignore[reportArgumentType]  # parsed JSON
                    if message["method"] == "closed":
                        self.closed = message.get("params") or {}
        except (ClientError, BotoCoreError) as error:
            if not is_transient(error):
                raise
        return self.closed is not None
