"""Step `validate_source`: CSV files of any size to validated Parquet, with a table of the rows that were rejected.

Headers are checked first, in the driver. Then fragments of the files are read as blocks of Ray Data (`csv_source`), and
what is accepted of a block is written as one file (`accepted_rows`); only small reports come back. What the step writes
does not depend on how many fragments there were, other than the names of the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from step_scripts.data.accepted_rows import FragmentReport, RowsPlan, merged_statistics, rewrite_rows, rows_artifact
from step_scripts.data.csv_header import CsvFile, read_header
from step_scripts.data.duplicate_rows import find_duplicates, partition_count
from step_scripts.data.rejected_rows import as_details, rejected_table, rejection_message, rejection_reasons
from step_scripts.data.source_pass import divided, read_files
from step_scripts.data.source_report import LineNumbers, check_counts, check_rows, check_unchanged, files_read
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
    fragments = divided(files, params.chunk_bytes)
    plan = RowsPlan(
        params=params,
        modified={fragment.index: fragment.file.modified for fragment in fragments},
        rows_uri=context.output_uri("rows"),
        scratch_uri=scratch_uri,
        partitions=partition_count(sum(file.bytes for file in files)),
    )
    with context.phase("validate"):
        found = read_files(context, plan, fragments)
        lines = LineNumbers(found)
        check_rows(found, lines)
        check_unchanged(params.files)
    reports = [report for file in found for report in file.fragments]
    with context.phase("find duplicates"):
        duplicates, duplicate_uris = _find_duplicates(context, reports, plan)
        _rewrite(reports, duplicates, duplicate_uris, plan)
    keep = params.duplicate_rows == "keep"
    check_counts(found, {} if keep else duplicates)
    dropped = 0 if keep else sum(duplicates.values())
    with context.phase("list rejected rows"):
        keys = params.table.key_columns
        table, duplicate_rows = rejected_table(scratch_uri, reports, lines, [] if keep else duplicate_uris, keys)
        reasons = rejection_reasons(reports, lines, dropped, duplicate_rows, keys)
        rejected_uri = storage.join(context.output_uri("rejected"), _REJECTED)
        storage.write_bytes(rejected_uri, table.write_csv().encode())
    total = sum(r.records for r in reports)
    rejected = sum(r.rejected_rows for r in reports) + dropped
    # A row that takes many lines may be many rows, swallowed by a stray quote.
    rejected_lines, lines_total = sum(r.rejected_lines for r in reports) + dropped, sum(r.record_lines for r in reports)
    fraction = max(rejected / total, rejected_lines / lines_total)
    details = as_details(table, reasons)
    if fraction > params.max_rejected_fraction or rejected == total:
        message = rejection_message(
            (rejected, total), (rejected_lines, lines_total), reasons, params, context.request.kept_uri(_REJECTED)
        )
        raise StepError(message, details=details, keep={_REJECTED: rejected_uri})
    if rejected:
        context.log.warning(
            f"{rejected:,} of {counted(total, 'row')} {are(rejected)} rejected: "
            f"{'; '.join(r.sentence() for r in reasons[:5])}. {rejected_uri} lists them"
        )
    rejected_file = file_info(rejected_uri, context.output_uri("rejected"), rows=table.height)
    extra = {f.uri: list(f.extra_columns) for f in files if f.extra_columns}
    return StepOutcome(
        outputs={
            "rows": rows_artifact(plan.rows_uri, [r.written for r in reports], params.table),
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
            "files": files_read(found)[:_FILES_SHOWN],
            "statistics": merged_statistics(r.written for r in reports),
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
    context: StepContext, reports: Sequence[FragmentReport], plan: RowsPlan
) -> tuple[dict[int, int], list[str]]:
    """How many rows of which fragment equal an earlier row, and the files that tell which."""
    id_uris = [plan.ids_uri(report.index) for report in reports if report.written.rows]
    if not id_uris:
        return {}, []
    uris = [storage.join(plan.scratch_uri, f"duplicates-{number:05d}.parquet") for number in range(plan.partitions)]
    duplicates: dict[int, int] = {}
    written: list[str] = []
    for number, found in each_call(find_duplicates, [(id_uris, number, uri) for number, uri in enumerate(uris)]):
        for fragment, count in found.items():
            duplicates[fragment] = duplicates.get(fragment, 0) + count
        if found:
            written.append(uris[number])
    if duplicates:
        context.log.info(f"rows that equal an earlier row: {sum(duplicates.values()):,}")
    return duplicates, sorted(written)


def _rewrite(
    reports: Sequence[FragmentReport], duplicates: dict[int, int], duplicate_uris: list[str], plan: RowsPlan
) -> None:
    """Write the rows of fragments again that hold duplicates, and correct their reports."""
    fragments = sorted(duplicates)
    by_index = {report.index: report for report in reports}
    for number, written in each_call(rewrite_rows, [(duplicate_uris, index, plan) for index in fragments]):
        by_index[fragments[number]].written = written


STEP = StepDefinition(params=ValidateSourceParams, run=run, outputs=("rows", "rejected"))
