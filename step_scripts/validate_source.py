"""Step `validate_source`: CSV files of any size to validated Parquet, with a table of the rows that were rejected.

Headers are checked first, in the driver. Then each fragment of the files is read by a task, which writes what is
accepted as one file (`csv_fragments`); only small reports come back. What the step writes does not depend on how many
fragments there were, other than the names of the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from step_scripts.data.csv_fragments import FragmentReport, RowsPlan, merged_statistics, rewrite_rows, rows_artifact
from step_scripts.data.csv_header import CsvFile, read_header
from step_scripts.data.csv_rows import RowCounts
from step_scripts.data.row_files import find_duplicates, partition_count
from step_scripts.data.source_pass import (
    check_counts,
    check_rows,
    check_unchanged,
    files_read,
    read_files,
    rejection_message,
    rejections,
)
from step_scripts.parameters import ValidateSourceParams
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepContext, StepDefinition, StepError, StepOutcome, file_info
from step_scripts.runner.ray_data import each_call
from step_scripts.runner.wording import are, counted

_HEADER_THREADS = 16
_FILES_SHOWN, _REASONS_SHOWN, _ROWS_SHOWN = 200, 200, 50
_REJECTED = "rejected_rows.csv"


def run(context: StepContext, params: ValidateSourceParams) -> StepOutcome:
    """Write outputs `rows` and `rejected`.

    Raises `StepError` for files that are no such table, and if too many rows are rejected.
    """
    with context.phase("read headers"):
        files = _read_headers(context, params)
    plan = RowsPlan(
        params=params,
        rows_uri=context.output_uri("rows"),
        scratch_uri=storage.join(context.attempt_uri, "scratch"),
        partitions=partition_count(sum(file.bytes for file in files)),
    )
    keep = params.duplicate_rows == "keep"
    with context.phase("validate"):
        found = read_files(context, plan, files)
        check_rows(found)
        check_unchanged(params.files)
    reports = [report for file in found for report in file.fragments]
    with context.phase("find duplicates"):
        duplicates, duplicate_uris = _find_duplicates(context, reports, plan)
    check_counts(found, {} if keep else duplicates)
    dropped = 0 if keep else duplicates.total()
    with context.phase("list rejected rows"):
        table, reasons = rejections(found, plan, duplicate_uris, dropped)
        rejected_uri = storage.join(context.output_uri("rejected"), _REJECTED)
        storage.write_bytes(rejected_uri, table.write_csv().encode())
    storage.delete_folder(plan.scratch_uri)
    counts = RowCounts.total([*(r.counts for r in reports), RowCounts(rejected=dropped, rejected_lines=dropped)])
    details: dict[str, Any] = {
        "rejected_rows": table.head(_ROWS_SHOWN).to_dicts(),
        "rejection_reasons": [vars(reason) for reason in reasons[:_REASONS_SHOWN]],
    }
    if counts.rejected_fraction > params.max_rejected_fraction or counts.rejected == counts.records:
        message = rejection_message(counts, reasons, params, context.request.kept_uri(_REJECTED))
        raise StepError(message, details=details, keep={_REJECTED: rejected_uri})
    if counts.rejected:
        context.log.warning(
            f"{counts.rejected:,} of {counted(counts.records, 'row')} {are(counts.rejected)} rejected: "
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
            "rows": counts.records - counts.rejected,
            "rejected_rows": counts.rejected,
            "rejected_fraction": counts.rejected_fraction,
            "duplicate_rows": duplicates.total(),
            "extra_columns": len({name for names in extra.values() for name in names}),
            "files": len(files),
        },
        details={
            **details,
            "extra_columns": dict(list(extra.items())[:_FILES_SHOWN]),
            "files": files_read(found)[:_FILES_SHOWN],
            "statistics": merged_statistics([r.written for r in reports], params.table),
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
) -> tuple[Counter[int], list[str]]:
    """How many rows of which fragment equal an earlier row, and the files that tell which.

    The rows of these fragments are written again without them, or with ids of their own; their reports are corrected.
    """
    id_uris = [plan.ids_uri(report.fragment.index) for report in reports if report.written.file]
    uris = [storage.join(plan.scratch_uri, f"duplicates-{number:05d}.parquet") for number in range(plan.partitions)]
    duplicates, written = Counter[int](), []
    for number, found in each_call(find_duplicates, [(id_uris, *call) for call in enumerate(uris) if id_uris]):
        duplicates.update(found)
        written += [uris[number]] if found else []
    if duplicates:
        context.log.info(f"rows that equal an earlier row: {duplicates.total():,}")
    written.sort()
    fragments = sorted(duplicates)
    for number, rows in each_call(rewrite_rows, [(written, index, plan) for index in fragments]):
        reports[fragments[number]].written = rows
    return duplicates, written


STEP = StepDefinition(params=ValidateSourceParams, run=run, outputs=("rows", "rejected"))
