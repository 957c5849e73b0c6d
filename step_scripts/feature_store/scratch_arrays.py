"""Columns of numbers that the pieces of an ingestion hand to each other through scratch files.

Locally NumPy's format, lane after lane, mapped into memory. On S3 row after row without a header, so that a range of
rows is one range of bytes, and one request.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from step_scripts.runner import storage
from step_scripts.runner.disk_space import file_named


def save_lanes(uri: str, lanes: np.ndarray) -> None:
    """Write an array of 64-bit numbers, of shape (lanes, rows), in place of what is there."""
    if not storage.is_remote(uri):
        path = storage.local_path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_named(path), path.open("wb") as file:
            np.save(file, lanes)
        return
    storage.write_bytes(uri, np.ascontiguousarray(lanes.T).tobytes())


def load_lanes(uri: str, count: int, dtype: type[np.generic], start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows `start` to `stop` (all, if None) of an array with `count` lanes; shape (count, rows)."""
    if not storage.is_remote(uri):
        return np.load(Path(storage.local_path(uri)), mmap_mode="r")[:, start:stop]
    if stop is not None and stop <= start:
        return np.empty((count, 0), dtype)
    width = count * np.dtype(dtype).itemsize
    with storage.open_input(uri) as file:
        if start:
            file.seek(start * width)
        data = file.read() if stop is None else file.read((stop - start) * width)
    return np.frombuffer(data, dtype).reshape(-1, count).T
