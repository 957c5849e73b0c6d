"""Step `validate_source`: CSV files of any size to validated Parquet, with a table of the rows that were rejected.

Headers are checked first, in the driver. Then ranges of the files are read as blocks of Ray Data (`csv_source`), and
what is accepted of a block is written as one part (`accepted_rows`); only small reports come back. What the step writes
does not depend on how many ranges there were, other than the names of the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from step_scripts.data.accepted_rows import ChunkReport, ids_uri
from step_scripts.data.csv_header import CsvFile, read_header
from step_scripts.data.csv_passes import validate_files
from step_scripts.data.duplicate_rows import bucket_count, find_duplicates, rewrite_part
from step_scripts.data.rejected_rows import LineNumbers, as_details, reasons, rejected_table, rejection_message
from step_scripts.data.source_checks import check_counts, check_rows, check_unchanged, files_read
from step_scripts.data.source_parts import merged_statistics, rows_artifact
from step_scripts.parameters import ValidateSourceParams
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepContext, StepDefinition, StepError, StepOutcome, file_info
from step_scripts.runner.ray_data import each_call
from step_scripts.runner.wording import are, counted

_HEADER_THREADS = 16
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
        chunks, reports = validate_files(context, params, files, scratch_uri, buckets)
        lines = LineNumbers.of(chunks, reports)
        check_rows(chunks, reports, lines)
        check_unchanged(params.files)
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
            "rows": rows_artifact(context.output_uri("rows"), [r.part for r in reports], params.table),
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
            "files": files_read(chunks, reports)[:_FILES_SHOWN],
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


STEP = StepDefinition(params=ValidateSourceParams, run=run, outputs=("rows", "rejected"))
