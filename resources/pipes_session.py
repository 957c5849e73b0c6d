"""A Pipes session that is left in order, or with a reason of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg


@contextmanager
def pipes_session(context: dg.OpExecutionContext | dg.AssetExecutionContext, **parts: Any) -> Iterator[dg.PipesSession]:
    """`dagster.open_pipes_session`, without its advice on messages that are missing where an error has ended it.

    A canceled process could not close its session; that is no fault of its script.
    """

    def is_no_advice(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("[pipes] did not receive")

    try:
        with dg.open_pipes_session(context=context, **parts) as session:
            try:
                yield session
            except BaseException:
                context.log.addFilter(is_no_advice)
                raise
    finally:
        context.log.removeFilter(is_no_advice)
