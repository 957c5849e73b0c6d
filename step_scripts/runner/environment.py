"""Environment variables for processes that are started in a block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping


def environment_defaults(values: Mapping[str, str]) -> contextlib.AbstractContextManager[None]:
    """Set those of `values` that the user has not set, for the block."""
    return environment_set({name: value for name, value in values.items() if name not in os.environ})


@contextlib.contextmanager
def environment_set(values: Mapping[str, str]) -> Iterator[None]:
    """Set `values`, whatever there is, for the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
