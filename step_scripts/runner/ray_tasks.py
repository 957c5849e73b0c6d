"""Pieces of a table, and Ray tasks that work on them in parallel with bounded memory.

Plain Ray tasks, and not Ray Data: the pieces are independent and their results small. An execution costs 7 ms
instead of 130, and workers need not import `ray.data` (2 cores, warm workers).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, Reporter, StepError
from step_scripts.runner.wording import counted

# Bounds of a piece: a task holds a few copies of it.
_LARGEST_PIECE_CELLS = 6_000_000
_SMALLEST_PIECE_ROWS = 25_000
_PIECES_WANTED = 8
_RETRIES = 3  # of a task whose process ended
_SECONDS_TO_CANCEL = 5.0


class FilePart(NamedTuple):
    """Row groups of a Parquet file, one after the other; all of it if `row_groups` is None."""

    uri: str
    row_groups: tuple[int, ...] | None
    rows: int


class Piece(NamedTuple):
    """What one task reads."""

    parts: tuple[FilePart, ...]

    @property
    def rows(self) -> int:
        """Rows in all parts."""
        return sum(part.rows for part in self.parts)


def pieces_of(artifact: Artifact, columns: int, *, piece_rows: int | None = None) -> list[Piece]:
    """The Parquet files of `artifact` in order of path, grouped or divided at row groups into pieces of similar size.

    `piece_rows` is the number of rows wanted in a piece; without it, as many as make 8 pieces, but no fewer than 25,000
    and no more than 6 million cells, `columns` to a row. The number of CPUs has no influence, so that the files that
    tasks write are the same everywhere.
    """
    root = artifact.uri if storage.is_remote(artifact.uri) else str(storage.local_path(artifact.uri).absolute())
    files = [(storage.join(root, f.path), f.rows) for f in artifact.files if f.path.endswith(".parquet")]
    counted = [(uri, rows if rows is not None else _footer(uri).num_rows) for uri, rows in files]
    total = sum(rows for _, rows in counted)
    largest = max(1, _LARGEST_PIECE_CELLS // max(columns, 1))
    wanted = piece_rows or min(max(_SMALLEST_PIECE_ROWS, -(-total // _PIECES_WANTED)), largest)
    pieces: list[Piece] = []
    current: list[FilePart] = []
    for uri, rows in counted:
        for part in _parts(uri, rows, wanted) if rows else ():
            if current and sum(p.rows for p in current) + part.rows > wanted:
                pieces.append(Piece(tuple(current)))
                current = []
            current.append(part)
    if current:
        pieces.append(Piece(tuple(current)))
    return pieces


def _parts(uri: str, rows: int, wanted: int) -> Iterator[FilePart]:
    if rows <= wanted:
        yield FilePart(uri, None, rows)
        return
    footer = _footer(uri)
    groups: list[int] = []
    held = 0
    for index in range(footer.num_row_groups):
        size = footer.row_group(index).num_rows
        if groups and held + size > wanted:
            yield FilePart(uri, tuple(groups), held)
            groups, held = [], 0
        groups.append(index)
        held += size
    if groups:
        yield FilePart(uri, tuple(groups), held)


def _footer(uri: str) -> pq.FileMetaData:
    with storage.open_input(uri) as file:
        return _parquet_file(uri, file).metadata


def _parquet_file(uri: str, file: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise StepError(f"{uri} is not a readable Parquet file ({error}); make its asset again") from error


def read_part(part: FilePart, columns: Sequence[str], optional: Sequence[str] = ()) -> pl.DataFrame:
    """The columns of a part, in that order, with those `optional` ones that the file has.

    Raises `StepError` naming the file and the columns that it lacks.
    """
    with storage.open_input(part.uri) as file:
        parquet = _parquet_file(part.uri, file)
        there = set(parquet.schema_arrow.names)
        if lacking := [name for name in columns if name not in there]:
            raise StepError(
                f"{part.uri} lacks the columns {lacking}; it has {sorted(there)}. "
                "It was written for another table: make its asset again, or correct the schema"
            )
        names = [*columns, *(name for name in optional if name in there)]
        if not storage.is_remote(part.uri):
            return _read_local(part, parquet.metadata, names)
        groups = list(range(parquet.num_row_groups)) if part.row_groups is None else list(part.row_groups)
        frame = pl.from_arrow(parquet.read_row_groups(groups, columns=names, use_threads=False))
    assert isinstance(frame, pl.DataFrame)
    return frame.select(names)


def _read_local(part: FilePart, footer: pq.FileMetaData, names: Sequence[str]) -> pl.DataFrame:
    """By Polars, which takes a third less time than Arrow and the conversion of its texts."""
    rows = pl.scan_parquet(storage.local_path(part.uri), glob=False, hive_partitioning=False)
    if part.row_groups is not None:
        first = sum(footer.row_group(index).num_rows for index in range(part.row_groups[0]))
        rows = rows.slice(first, part.rows)
    return rows.select(names).collect()


class Progress:
    """Reports how many of `total` rows are done, at most once a second, and when all are."""

    def __init__(self, log: Reporter, what: str, total: int) -> None:
        self._log, self._what, self._total = log, what, total
        self._done = 0
        self._start = self._reported = time.perf_counter()

    def add(self, rows: int) -> None:
        """Count `rows` more."""
        self._done += rows
        now = time.perf_counter()
        if self._done >= self._total or now - self._reported >= 1.0:
            self._reported = now
            self._log.info(f"{self._what}: {self._done:,} of {counted(self._total, 'row')}, {now - self._start:.1f} s")


def completed_tasks(
    function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], *, results_each: int = 1
) -> Iterator[tuple[int, Any]]:
    """Run `function(*call)` for each call as a Ray task; yield (index of the call, result) as they finish.

    No more than twice as many tasks as CPUs are under way. A `StepError` of a task is raised as such; whatever ends the
    loop early, the other tasks are cancelled. A task whose process ends is tried again, and if that does not help,
    `StepError` is raised. With `results_each` > 1 a call has that many results; they stay in Ray's object store, and a
    list of references is yielded.
    """
    options = {"max_retries": _RETRIES, "num_returns": results_each}
    remote = ray.remote(function).options(**options)
    limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = iter(enumerate(calls))
    running: dict[ray.ObjectRef, tuple[int, Any]] = {}

    def start() -> None:
        while len(running) < limit and (following := next(waiting, None)) is not None:
            index, call = following
            answer: Any = remote.remote(*call)
            running[answer if results_each == 1 else answer[0]] = (index, answer)

    try:
        start()
        while running:
            (first, *_), _ = ray.wait(list(running), num_returns=1)
            index, answer = running.pop(first)
            result = ray.get(first)  # raises what the task raised
            yield index, result if results_each == 1 else answer
            del result, answer, first
            start()
    except RayTaskError as error:
        if isinstance(error.cause, StepError):
            raise error.cause from error
        raise
    except (OutOfMemoryError, WorkerCrashedError) as error:
        name = getattr(function, "__name__", "call")
        raise StepError(
            f"the process of a Ray task ended {_RETRIES + 1} times in {name}: {str(error).splitlines()[0]} "
            "If memory is short, give the session fewer CPUs, so that fewer tasks run at once"
        ) from error
    finally:
        # By force, and waited for: a task that went on would write below a folder that its step has removed.
        for reference in running:
            ray.cancel(reference, force=True)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=_SECONDS_TO_CANCEL)
