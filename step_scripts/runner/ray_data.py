"""Ray Data, set up in one place: passes over the blocks of a dataset that return one report a block.

A pass is one fused operator: it reads a block, works on all of it, writes its output under names that depend on the
block alone, and returns a report. The driver reads the reports while the pass is running.
"""

from __future__ import annotations

import logging
import pickle
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.cloudpickle import dumps as pickle_by_value  # pyright: ignore
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasource
from ray.exceptions import OutOfMemoryError, RayActorError, WorkerCrashedError

from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, Reporter, StepError, noted_operators
from step_scripts.runner.wording import counted

_RETRIES = 3  # of a task whose process has ended; Ray Data's default is for ever
BOUNDED: dict[str, Any] = {"max_retries": _RETRIES}
"""Ray options of all tasks."""
_BOUNDED_ACTORS = {"max_restarts": _RETRIES, "max_task_retries": _RETRIES}
PATH = "path"
"""The column that names each row's file."""
# Bounds of a block: a task holds a few copies of it.
_LARGEST_BLOCK_CELLS = 6_000_000
_SMALLEST_BLOCK_ROWS = 25_000
_BLOCKS_WANTED = 8
_FOOTER_THREADS = 16
# Loggers of Ray Data that report each execution, missing progress bars, and errors that are raised here anyway.
_QUIET = {
    "ray.data": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
    "ray.data._internal.execution.streaming_executor_state": logging.CRITICAL,
}


def configure() -> DataContext:
    """Ray Data as this project uses it. Returns the context of this process; tasks get a copy.

    Figures: `step_scripts` on 2 cores. Without these settings small data takes about three times as long.
    """
    context = DataContext.get_current()
    context.use_datasource_v2 = False  # the new Parquet reader takes over a second longer to start
    context.op_resource_reservation_enabled = False  # would keep a part of the CPUs idle for other operators
    context.min_parallelism = context.read_op_min_num_blocks = 1  # would divide small data into 200 blocks
    context.target_max_block_size = None  # whoever reads decides how large a block is
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)
    # `max_retries` has no other place in the readers' arguments.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    return context


@dataclass(frozen=True)
class ParquetBlocks:
    """A dataset of an artifact's files, None without rows; the numbers of its rows and blocks; each file's place.

    Column `PATH` names each row's file.
    """

    dataset: Dataset | None
    rows: int
    count: int
    files: dict[str, int]

    def select(self, *columns: str) -> ParquetBlocks:
        """The same blocks, with those of these columns that they have."""
        if self.dataset is None:
            return self
        present = self.dataset.columns() or []
        return replace(self, dataset=self.dataset.select_columns([n for n in (*columns, PATH) if n in present]))

    def each(
        self, function: Callable[..., Any], *args: Any, progress: Progress | None = None
    ) -> Iterator[tuple[int, Any]]:
        """The place of each block's first file, and what `function(rows, *args)` returns for it, a Polars frame."""
        if self.dataset is not None:
            for path, rows, report in reports(self.dataset, _of_rows, function, args):
                yield self.files[path], report
                if progress is not None:
                    progress.add(rows)

    def reports(self, function: Callable[..., Any], *args: Any, progress: Progress | None = None) -> list[Any]:
        """What `each` yields, in order of the files."""
        found = dict(self.each(function, *args, progress=progress))
        return [found[place] for place in sorted(found)]


def parquet_blocks(artifact: Artifact, columns: Sequence[str], optional: Sequence[str] = ()) -> ParquetBlocks:
    """The Parquet files of `artifact`, as blocks of whole files in order of path.

    Blocks have `columns`, those `optional` ones that any of the files has, null for the others, and `PATH`. How many
    blocks there are depends on rows and columns, not on the number of CPUs. Raises `StepError` for a file that cannot
    be read or lacks one of `columns`.
    """
    configure()
    uris = artifact.file_uris(".parquet")
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda uri: _footer(uri, columns), uris))
    wanted = [*columns, *optional]
    filled = [(uri, rows, schema) for uri, (rows, schema) in zip(uris, footers, strict=True) if rows]
    rows = sum(count for _, count, _ in filled)
    if not filled:
        return ParquetBlocks(None, 0, 0, {})
    schema = pa.unify_schemas([schema for *_, schema in filled], promote_options="permissive")
    schema = pa.schema([schema.field(name) for name in wanted if name in schema.names])
    count = min(len(filled), _block_count(rows, len(schema)))
    places = [storage.filesystem(uri) for uri, *_ in filled]
    blocks = ray.data.read_parquet(
        [path for _, path in places],
        filesystem=places[0][0],
        schema=schema,
        include_paths=True,
        override_num_blocks=count,
        ray_remote_args=BOUNDED,
        file_extensions=None,
        partitioning=None,
    )
    return ParquetBlocks(blocks, rows, count, {path: place for place, (_, path) in enumerate(places)})


def _block_count(rows: int, columns: int) -> int:
    largest = max(1, _LARGEST_BLOCK_CELLS // max(columns, 1))
    return -(-rows // min(max(_SMALLEST_BLOCK_ROWS, -(-rows // _BLOCKS_WANTED)), largest))


def _footer(uri: str, required: Sequence[str]) -> tuple[int, pa.Schema]:
    """Rows and columns of a Parquet file that has all that are required."""
    with storage.open_input(uri) as file:
        try:
            footer = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise StepError(f"{uri} is not a readable Parquet file ({error}); make its asset again") from error
        there = set(footer.schema_arrow.names)
        if lacking := [name for name in required if name not in there]:
            raise StepError(
                f"{uri} lacks the columns {lacking}; it has {sorted(there)}. "
                "It was written for another table: make its asset again, or correct the schema"
            )
        return footer.metadata.num_rows, footer.schema_arrow.remove_metadata()


def reports(
    blocks: Dataset, function: Callable[..., Any], *args: Any, compute: ActorPoolStrategy | None = None
) -> Iterator[Any]:
    """What `function(table, *args)` returns for each block, an Arrow table, as they are finished.

    A `StepError` or `OSError` of the function is raised unchanged. If the loop ends early, the remaining tasks are
    ended by force and waited for: one that went on would write below a folder that its step has removed. Raises
    `StepError` if the process of a task keeps ending.
    """
    configure()
    call: Any = _report if compute is None else _Reporting  # `map_batches` has types for one argument only
    limits: dict[str, Any] = BOUNDED if compute is None else _BOUNDED_ACTORS
    passing = blocks.map_batches(
        call,
        fn_args=(function, args),
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        compute=compute,
        **limits,
    )
    # The name holds the iterator until `_end_tasks`.
    batches = iter(passing.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    try:
        found: Any
        for found in batches:
            report = pickle.loads(found["report"][0].as_py())  # noqa: S301  # written by a task of this session
            if isinstance(report, (StepError, OSError)):
                raise report
            yield report
    except (OutOfMemoryError, WorkerCrashedError, RayActorError) as error:
        kind, fewer = ("task", "give the session fewer CPUs, so that fewer tasks run at once")
        if compute is not None:
            kind, fewer = "actor", "use fewer actors"
        raise StepError(
            f"the process of a Ray {kind} ended {_RETRIES + 1} times in {_named(function, args)}: "
            f"{str(error).splitlines()[0]} If memory is short, {fewer}"
        ) from error
    finally:
        _end_tasks(passing)
        _note_operators(_named(function, args), passing)


def _note_operators(function: str, dataset: Dataset) -> None:
    if (found := noted_operators.get()) is None:
        return
    for operator in dataset.get_stats_summary().operators_stats:
        wall, cpu, rows = operator.wall_time, operator.cpu_time, operator.task_rows
        found.append(
            {
                "operator": operator.operator_name.replace("MapBatches(_report)", function),
                "tasks": rows.count if rows else 0,
                "seconds": round(operator.time_total_s or 0.0, 4),
                "task_seconds": round(wall.sum, 4) if wall else 0.0,
                "cpu_seconds": round(cpu.sum, 4) if cpu else 0.0,
            }
        )


def _named(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    inner = args[0] if function in (_call, _of_rows) else function
    return getattr(inner, "__name__", "call")


def source_reports(source: Datasource, count: int, function: Callable[..., Any], *args: Any) -> Iterator[Any]:
    """See `reports`, for the `count` blocks of a source."""
    configure()
    blocks = ray.data.read_datasource(source, override_num_blocks=count, ray_remote_args=BOUNDED)
    yield from reports(blocks, function, *args)


def each_call(
    function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], *, actors: int | None = None
) -> Iterator[tuple[int, Any]]:
    """`function(*call)` for each call; yields (index, result) as they are finished. For work that finds its own data.

    In tasks, or in that many `actors`, at most one a CPU. See `reports` for errors.
    """
    listed = list(calls)
    if not listed:
        return
    configure()
    numbers = ray.data.from_arrow([pa.table({"index": [index]}) for index in range(len(listed))])
    arguments = (function, ray.put(listed))
    if actors is None:
        yield from reports(numbers, _call, *arguments)
        return
    size = min(actors, len(listed), max(1, int(ray.cluster_resources().get("CPU", 1))))
    yield from reports(numbers, _call, *arguments, compute=ActorPoolStrategy(size=size))


def _call(numbers: pa.Table, function: Callable[..., Any], calls: ray.ObjectRef) -> tuple[int, Any]:
    [index] = numbers["index"].to_pylist()
    return index, function(*ray.get(calls)[index])


def _report(block: pa.Table, function: Callable[..., Any], args: tuple[Any, ...]) -> pa.Table:
    try:
        report = function(block, *args)
    except (StepError, OSError) as error:
        report = error  # the driver raises it: Ray Data would change the message, and an OSError would lose its file
    return pa.table({"report": [pickle_by_value(report)]})  # Ray Data would turn tuples into lists


def _of_rows(block: pa.Table, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, int, Any]:
    return block[PATH][0].as_py(), block.num_rows, function(pl.from_arrow(block), *args)


class _Reporting:
    """`_report` in an actor."""

    __call__ = staticmethod(_report)


def _end_tasks(dataset: Dataset) -> None:
    """End the tasks of a pass, and wait for them.

    Ray Data has no public way: it ends tasks when nobody refers to the iterator any more, without waiting for them, and
    after an error it only asks them to end.
    """
    executor: Any = dataset._current_executor
    if executor is not None:
        executor.shutdown(force=True)
        for operator in executor._topology:
            operator._cancel_active_tasks(force=True)


class Progress:
    """Reports how many of `total` rows (or another `unit`) are done, at most once a second, and when all are."""

    def __init__(self, log: Reporter, what: str, total: int, unit: str = "row") -> None:
        self._log, self._what, self._total = log, what, counted(total, unit)
        self._all = total
        self._done = 0
        self._start = self._reported = time.perf_counter()

    def add(self, done: int) -> None:
        """Count `done` more."""
        self._done += done
        now = time.perf_counter()
        if self._done >= self._all or now - self._reported >= 1.0:
            self._reported = now
            self._log.info(f"{self._what}: {self._done:,} of {self._total}, {now - self._start:.1f} s")
