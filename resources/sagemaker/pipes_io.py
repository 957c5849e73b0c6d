"""Pipes context and messages on S3 under keys that depend on the job alone.

dagster-aws's S3 reader and injector choose random keys, so a second Dagster process could not find them.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster_pipes import PIPES_PROTOCOL_VERSION_FIELD

from resources.aws.calls import is_transient
from resources.sagemaker.job_files import CONTEXT, MESSAGES, JobPrefix

if TYPE_CHECKING:
    from dagster_pipes import PipesContextData, PipesParams


class JobContextInjector(dg.PipesContextInjector):
    """Writes the context to `<job prefix>/context.json`, for `dagster_pipes.PipesS3ContextLoader`.

    With `write=False` (the job runs already) the context that was written when it was started stays.
    """

    def __init__(self, prefix: JobPrefix, *, write: bool = True) -> None:
        self._prefix = prefix
        self._write = write

    @contextmanager
    def inject_context(self, context_data: PipesContextData) -> Iterator[PipesParams]:
        """Write the context; yields bucket and key. It stays, as a record of what the job was told."""
        if self._write:
            self._prefix.put(CONTEXT, json.dumps(context_data).encode())
        yield {"bucket": self._prefix.bucket, "key": self._prefix.path(CONTEXT)}

    def no_messages_debug_text(self) -> str:
        """Where the context is and what reads it."""
        return (
            f"The context is in {self._prefix.uri}{CONTEXT}. PipesS3ContextLoader has to be given to "
            "open_dagster_pipes in the job."
        )


class JobMessageReader(dg.PipesMessageReader):
    """Reads the chunks `<job prefix>/messages/<n>.json` in order, from the first, each once.

    A thread reads while the job runs. `drain` reads what is left after its end. A message that cannot be handled ends
    the reading; `check` raises its error in the caller's thread. Throttling and outages only delay it.
    """

    def __init__(self, prefix: JobPrefix, *, interval_seconds: float = 1.0, idle_seconds: float = 10.0) -> None:
        self._prefix = prefix
        self._interval, self._idle = interval_seconds, idle_seconds
        self._closing, self._nudge, self._caught_up = threading.Event(), threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._closed: dict[str, Any] | None = None
        self._next = 1
        self._thread: threading.Thread | None = None

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[PipesParams]:
        """Read in a thread while the context is open; yields bucket and key prefix for `PipesS3MessageWriter`."""
        self._thread = threading.Thread(
            target=self._run, args=(handler,), name=f"messages of {self._prefix.key}", daemon=True
        )
        self._thread.start()
        try:
            yield {"bucket": self._prefix.bucket, "key_prefix": self._prefix.path(MESSAGES)}
        finally:
            self._closing.set()
            self._nudge.set()
            self._thread.join(10.0)

    @property
    def received_closed(self) -> bool:
        """Whether the job has closed its Pipes session."""
        return self._closed is not None

    @property
    def exception(self) -> dict[str, Any] | None:
        """The exception that the job's Pipes session was closed with, as the protocol carries it."""
        return (self._closed or {}).get("exception")

    def check(self) -> None:
        """Raise the error, if any, that ended the reading."""
        if self._error is not None:
            raise self._error

    def drain(self, seconds: float) -> bool:
        """Read on until `closed` has arrived and nothing is left, for at most `seconds`. Whether `closed` arrived.

        Raises the error of a message that could not be handled.
        """
        deadline = time.monotonic() + seconds
        while True:
            self._caught_up.clear()
            self._nudge.set()
            while not self._caught_up.wait(0.05) and self._error is None and time.monotonic() < deadline:
                pass
            self.check()
            if self.received_closed and self._caught_up.is_set():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return self.received_closed
            time.sleep(min(left, self._interval))

    def no_messages_debug_text(self) -> str:
        """Where messages are expected and what writes them."""
        return (
            f"Messages were expected below {self._prefix.uri}{MESSAGES}/. PipesS3MessageWriter has to be given to "
            "open_dagster_pipes in the job."
        )

    def _run(self, handler: dg.PipesMessageHandler) -> None:
        pause = self._interval
        try:
            while True:
                last_pass = self._closing.is_set()
                self._nudge.clear()
                found = self._read_new(handler)
                self._caught_up.set()
                if last_pass:
                    return
                pause = self._interval if found else min(1.5 * pause, self._idle)
                self._nudge.wait(pause)
        except BaseException as error:  # noqa: BLE001  # re-raised in the main thread by `check`
            self._error = error
            self._caught_up.set()

    def _read_new(self, handler: dg.PipesMessageHandler) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        found = False
        while True:
            try:
                chunk = self._prefix.message_chunk(self._next, abandoned=self._closing)
            except (ClientError, BotoCoreError) as error:
                if self._closing.is_set() and is_transient(error):
                    return found
                raise
            if chunk is None:
                return found
            for message in chunk:
                if PIPES_PROTOCOL_VERSION_FIELD not in message:
                    continue
                handler.handle_message(message)  # pyright: ignore[reportArgumentType]  # a TypedDict of these keys
                if message.get("method") == "closed":
                    self._closed = message.get("params") or {}
            self._next += 1
            found = True
