"""Step `validate_source`: CSV files of any size to validated Parquet, with a table of the rows that were rejected.

Headers are checked first, in the driver. Then ranges of the files are read as blocks of Ray Data (`csv_source`), and
what is accepted of a block is written as one part (`accepted_rows`); only small reports come back. What the step writes
does not depend on how many ranges there were, other than the names of the parts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import ray

from step_scripts.data.accepted_rows import ChunkReport, RowsPlan, ids_uri, write_rows
from step_scripts.data.content_digest import content_digest
from step_scripts.data.csv_chunks import Chunk, plan_chunks, safe_cuts
from step_scripts.data.csv_header import CsvFile, read_header
from step_scripts.data.csv_source import CsvRanges
from step_scripts.data.duplicate_rows import bucket_count, find_duplicates, rewrite_part
from step_scripts.data.rejected_rows import LineNumbers, as_details, reasons, rejected_table, rejection_message
from step_scripts.data.source_checks import by_file, check_counts, check_rows
from step_scripts.data.source_parts import merged_statistics, rows_digest
from step_scripts.parameters import SourceFile, ValidateSourceParams
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepContext, StepDefinition, StepError, StepOutcome, file_info
from step_scripts.runner.file_state import file_state, lasting
from step_scripts.runner.ray_data import each_call, source_reports
from step_scripts.runner.wording import are, counted

_SMALLEST_SHARE = 4 << 20  # of a file that is divided only to occupy all CPUs; bytes
_HEADER_THREADS = 16
_SECONDS_BETWEEN_MESSAGES = 2.0
_FILES_SHOWN = 200
_REJECTED = "rejected_rows.csv"


def run(context: StepContext, params: ValidateSourceParams) -> StepOutcome:
    """Write outputs `rows` and `rejected`.

    Raises `StepError` for files that are no such table, and if too many rows are rejected.
    """
    with context.phase("read headers"):
        files = _read_headers(context, params)
    scratch_uri = storage.join(context.attempt_uri, "scratch")
    try:
        return _run(context, params, files, scratch_uri)
    finally:
        storage.delete(scratch_uri)


def _run(context: StepContext, params: ValidateSourceParams, files: list[CsvFile], scratch_uri: str) -> StepOutcome:
    buckets = bucket_count(sum(f.bytes for f in files))
    with context.phase("validate"):
        chunks, reports = _validate(context, params, files, scratch_uri, buckets)
        lines = LineNumbers.of(chunks, reports)
        check_rows(chunks, reports, lines)
        _check_unchanged(params)
    with context.phase("find duplicates"):
        duplicates, duplicate_uris = _find_duplicates(context, reports, scratch_uri, buckets)
        _rewrite(context, params, reports, duplicates, duplicate_uris)
    check_counts(chunks, reports, {} if params.duplicate_rows == "keep" else duplicates)
    keep = params.duplicate_rows == "keep"
    dropped = 0 if keep else sum(duplicates.values())
    with context.phase("list rejected rows"):
        keys = params.table.key_columns
        table, duplicate_rows = rejected_table(scratch_uri, reports, lines, [] if keep else duplicate_uris, keys)
        why = reasons(reports, lines, dropped, duplicate_rows, keys)
        rejected_uri = storage.join(context.output_uri("rejected"), _REJECTED)
        storage.write_bytes(rejected_uri, table.write_csv().encode())
    total = sum(r.records for r in reports)
    rejected = sum(r.rejected_rows for r in reports) + dropped
    # A row that takes many lines may be many rows, swallowed by a stray quote.
    rejected_lines, lines_total = sum(r.rejected_lines for r in reports) + dropped, sum(r.record_lines for r in reports)
    fraction = max(rejected / total, rejected_lines / lines_total)
    details = as_details(table, why)
    if fraction > params.max_rejected_fraction or rejected == total:
        message = rejection_message(
            (rejected, total), (rejected_lines, lines_total), why, params, context.request.kept_uri(_REJECTED)
        )
        raise StepError(message, details=details, keep={_REJECTED: rejected_uri})
    if rejected:
        context.log.warning(
            f"{rejected:,} of {counted(total, 'row')} {are(rejected)} rejected: "
            f"{'; '.join(r.sentence() for r in why[:5])}. {rejected_uri} lists them"
        )
    rejected_file = file_info(rejected_uri, context.output_uri("rejected"), rows=table.height)
    extra = {f.uri: list(f.extra_columns) for f in files if f.extra_columns}
    return StepOutcome(
        outputs={
            "rows": _rows_artifact(context.output_uri("rows"), reports, params),
            "rejected": Artifact.of(context.output_uri("rejected"), [rejected_file]),
        },
        metrics={
            "rows": total - rejected,
            "rejected_rows": rejected,
            "rejected_fraction": fraction,
            "duplicate_rows": sum(duplicates.values()),
            "extra_columns": len({name for names in extra.values() for name in names}),
            "files": len(files),
        },
        details={
            **details,
            "extra_columns": dict(list(extra.items())[:_FILES_SHOWN]),
            "files": _files(chunks, reports)[:_FILES_SHOWN],
            "statistics": {k: v.model_dump() for k, v in merged_statistics([r.part for r in reports]).items()},
        },
    )


def _read_headers(context: StepContext, params: ValidateSourceParams) -> list[CsvFile]:
    if not params.files:
        raise StepError("there are no source files: name a CSV file, a folder, a glob or an s3:// URI as source")
    if not params.delimiter.isascii() or params.delimiter in '"\r\n':
        raise StepError(f"delimiter {params.delimiter!r} must be one ASCII character, neither a quote nor a line end")
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        files = list(pool.map(lambda file: read_header(file, params), params.files))
    for file in files[:_FILES_SHOWN]:
        if file.extra_columns:
            context.log.warning(
                f"{file.uri}: columns that the table lacks are left out: {', '.join(file.extra_columns)}"
            )
    return files


def _validate(
    context: StepContext, params: ValidateSourceParams, files: list[CsvFile], scratch_uri: str, buckets: int
) -> tuple[list[Chunk], list[ChunkReport]]:
    """All pieces, and the report of each."""
    # As many pieces for each CPU, so that none waits for the last.
    share = -(-sum(f.bytes for f in files) // max(1, int(ray.cluster_resources().get("CPU", 1))))
    piece = -(-share // -(-share // params.chunk_bytes))
    chunks = plan_chunks(files, min(params.chunk_bytes, max(piece, _SMALLEST_SHARE)))
    reports: dict[int, ChunkReport] = {}
    progress = _Progress(context, len(chunks))

    modified = {chunk.index: chunk.file.modified for chunk in chunks}
    plan = RowsPlan(params, modified, context.output_uri("rows"), scratch_uri, buckets)

    def process(ranges: Sequence[Chunk]) -> None:
        for report in source_reports(CsvRanges(ranges, params), len(ranges), write_rows, plan):
            reports[report.index] = report
            progress.add(report)
            if report.fault:
                _raise_fault(chunks, reports)

    process(chunks)
    if odd := [uri for uri, pieces in by_file(chunks) if any(reports[c.index].odd_quotes for c in pieces)]:
        context.log.info(f"fields span lines in {', '.join(odd[:5])}: cutting the files again between records")
        chunks, faults = _cut_again(params, chunks, odd)
        again = [c for c in chunks if c.file.uri in odd]
        for chunk in again:
            del reports[chunk.index]
        process(again)
        for file, fault in faults:  # what comes before it has been found to be in order
            raise _fault(file.uri, file.header_lines, *fault)
    _raise_fault(chunks, reports)
    return chunks, [reports[c.index] for c in chunks]


def _raise_fault(chunks: Sequence[Chunk], reports: dict[int, ChunkReport]) -> None:
    """Raise `StepError` for the first damaged piece of a file whose earlier pieces are all known to be cut rightly."""
    for uri, pieces in by_file(chunks):
        line = pieces[0].file.header_lines
        for chunk in pieces:
            report = reports.get(chunk.index)
            if report is None or report.odd_quotes:
                break
            if report.fault:
                raise _fault(uri, line, *report.fault)
            line += report.lines


def _fault(uri: str, lines_before: int, first: int, last: int, problem: str) -> StepError:
    first, last = lines_before + first, lines_before + last
    where = f"line {first}" if first == last else f"lines {first} to {last}"
    return StepError(f"{uri}, {where}: {problem}")


def _cut_again(
    params: ValidateSourceParams, chunks: list[Chunk], uris: Sequence[str]
) -> tuple[list[Chunk], list[tuple[CsvFile, tuple[int, int, str]]]]:
    """The same number of pieces, those of `uris` cut between records, and where such a file is damaged.

    The pieces of a damaged file end where the damage begins.
    """
    pieces_of = {uri: pieces for uri, pieces in by_file(chunks) if uri in uris}
    calls = [
        (pieces[0].file, [c.start for c in pieces[1:]], params.delimiter, params.max_line_bytes)
        for pieces in pieces_of.values()
    ]
    cut, faults = list(chunks), {}
    for index, (ends, fault) in each_call(_safe_cuts, calls):
        pieces = pieces_of[uris[index]]
        if fault is not None:
            faults[index] = (pieces[0].file, fault)
        bounds = [pieces[0].start, *ends]
        for chunk, start, end in zip(pieces, bounds, ends, strict=False):
            cut[chunk.index] = chunk.model_copy(update={"start": start, "end": end})
    return cut, [faults[index] for index in sorted(faults)]


def _safe_cuts(
    file: CsvFile, cuts: Sequence[int], delimiter: str, max_line_bytes: int
) -> tuple[list[int], tuple[int, int, str] | None]:
    ends, fault = safe_cuts(file, cuts, delimiter, max_line_bytes)
    return ends, (fault.line, fault.last, fault.problem) if fault is not None else None


def _check_unchanged(params: ValidateSourceParams) -> None:
    """Raise `StepError` if a file was written while it was read: what was read may be neither of its two states."""

    def written(file: SourceFile) -> bool:
        try:
            state = file_state(file.uri)
        except FileNotFoundError:  # removed after it was read
            return False
        except OSError as error:
            raise StepError(f"{file.uri} cannot be looked at again: {error}") from error
        return (state.bytes, lasting(state.change)) != (file.bytes, lasting(file.change))

    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        known = [file for file in params.files if file.change]
        changed = [file.uri for file, answer in zip(known, pool.map(written, known), strict=True) if answer]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise StepError(
            f"written to, or replaced, since the run looked for files: {', '.join(changed[:5])}{more}. "
            "Wait until nothing writes there, then start again"
        )


def _find_duplicates(
    context: StepContext, reports: Sequence[ChunkReport], scratch_uri: str, buckets: int
) -> tuple[dict[int, int], list[str]]:
    """How many rows of which part equal an earlier row, and the files that tell which."""
    parts = [r.index for r in reports if r.part.rows]
    if not parts:
        return {}, []
    id_uris = [ids_uri(scratch_uri, index) for index in parts]
    uris = [storage.join(scratch_uri, f"duplicates-{bucket:05d}.parquet") for bucket in range(buckets)]
    calls = [(id_uris, parts, buckets, bucket, uris[bucket]) for bucket in range(buckets)]
    duplicates: dict[int, int] = {}
    written: list[str] = []
    for bucket, found in each_call(find_duplicates, calls):
        for part, count in found.items():
            duplicates[part] = duplicates.get(part, 0) + count
        if found:
            written.append(uris[bucket])
    if duplicates:
        context.log.info(f"rows that equal an earlier row: {sum(duplicates.values()):,}")
    return duplicates, sorted(written)


def _rewrite(
    context: StepContext,
    params: ValidateSourceParams,
    reports: Sequence[ChunkReport],
    duplicates: dict[int, int],
    duplicate_uris: list[str],
) -> None:
    """Write the parts again that hold duplicates, and correct their reports."""
    keep = params.duplicate_rows == "keep"
    parts = sorted(duplicates)
    calls = [(duplicate_uris, part, context.output_uri("rows"), params.table, keep) for part in parts]
    by_index = {r.index: r for r in reports}
    for index, part in each_call(rewrite_part, calls):
        by_index[parts[index]].part = part


def _rows_artifact(uri: str, reports: Sequence[ChunkReport], params: ValidateSourceParams) -> Artifact:
    """The digest is one of the set of rows: cutting the source otherwise does not change it."""
    schema = params.table.model_dump_json(include={"columns": {"__all__": {"name", "dtype"}}, "key_columns": True})
    files = [r.part.file for r in reports if r.part.file is not None]
    return Artifact.of(uri, files, digest=rows_digest([r.part for r in reports], schema))


def _files(chunks: Sequence[Chunk], reports: Sequence[ChunkReport]) -> list[dict[str, int | str]]:
    by_index = {r.index: r for r in reports}
    listed = []
    for uri, pieces in by_file(chunks):
        mine = [by_index[c.index] for c in pieces]
        rows = sum(r.part.rows for r in mine)
        records, file = sum(r.records for r in mine), pieces[0].file
        listed.append(
            {
                "file": uri,
                "bytes": file.bytes,
                "rows": rows,
                "rejected_rows": records - rows,
                "content": content_digest(file.bytes, [file.head_sum, *(r.content for r in mine)]),
            }
        )
    return listed


class _Progress:
    """Reports rows and seconds, not more often than every `_SECONDS_BETWEEN_MESSAGES`."""

    def __init__(self, context: StepContext, pieces: int) -> None:
        self._context, self._pieces = context, pieces
        self._start = self._last = time.monotonic()
        self._done = self._rows = 0

    def add(self, report: ChunkReport) -> None:
        self._done += 1
        self._rows += report.records
        now = time.monotonic()
        if self._done == self._pieces or now - self._last >= _SECONDS_BETWEEN_MESSAGES:
            self._last = now
            message = (
                f"{counted(self._rows, 'row')} validated in {now - self._start:.1f} s, "
                f"{self._done} of {counted(self._pieces, 'piece')}"
            )
            self._context.log.info(message)


STEP = StepDefinition(params=ValidateSourceParams, run=run, outputs=("rows", "rejected"))
