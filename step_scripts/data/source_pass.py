"""Reads CSV files fragment by fragment, and checks what was read of each: is it all that the file holds?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import ray

from step_scripts.data.accepted_rows import FragmentReport, RowsPlan, write_rows
from step_scripts.data.csv_fragments import CsvFragments, Fragment, plan_fragments
from step_scripts.data.csv_header import CsvFile, content_digest
from step_scripts.parameters import SourceFile
from step_scripts.runner import storage
from step_scripts.runner.contract import StepContext, StepError
from step_scripts.runner.ray_data import Progress, source_reports
from step_scripts.runner.wording import counted

_SMALLEST_SHARE = 4 << 20  # of a file that is divided only to occupy all CPUs; bytes
_THREADS = 16


@dataclass(frozen=True)
class FileReport:
    """A file and the reports of its fragments, in order."""

    file: CsvFile
    fragments: Sequence[FragmentReport]

    @property
    def records(self) -> int:
        """Rows that were found, accepted or not."""
        return sum(report.records for report in self.fragments)

    @property
    def rows(self) -> int:
        """Rows that were written."""
        return sum(report.written.rows for report in self.fragments)

    def with_lines_before(self) -> list[tuple[FragmentReport, int]]:
        """Each report, and how many lines of the file stand before the fragment."""
        lines = accumulate((report.lines for report in self.fragments), initial=self.file.header_lines)
        return list(zip(self.fragments, lines, strict=False))


def read_files(context: StepContext, plan: RowsPlan, files: Sequence[CsvFile]) -> list[FileReport]:
    """Read all files, and write what is accepted. Returns what was found in each.

    Raises `StepError` for what is wrong with a file as a whole, with its lines.
    """
    # As many fragments for each CPU, so that none waits for the last.
    largest = plan.params.chunk_bytes
    share = -(-sum(file.bytes for file in files) // max(1, int(ray.cluster_resources().get("CPU", 1))))
    wanted = -(-share // -(-share // largest))
    chosen = fragments = plan_fragments(files, min(largest, max(wanted, _SMALLEST_SHARE)))
    progress = Progress(context.log, "validate_source", len(fragments), "fragment")
    reports: dict[int, FragmentReport] = {}
    found: list[FileReport] = []
    while chosen:
        for report in source_reports(CsvFragments(chosen), len(chosen), write_rows, plan):
            reports[report.fragment.index] = report
            progress.add(1)
            if report.fault:
                _raise_faults(_rightly_read(fragments, reports)[0])
        found, chosen = _rightly_read(fragments, reports)
        if chosen:
            context.log.info(f"{counted(len(chosen), 'fragment')} cut inside of a quoted field: reading them again")
    _raise_faults(found)
    context.log.info(f"{counted(sum(report.records for report in reports.values()), 'row')} validated")
    return found


def _rightly_read(
    fragments: Sequence[Fragment], reports: Mapping[int, FragmentReport]
) -> tuple[list[FileReport], list[Fragment]]:
    """Each file with its reports up to the first fragment that is to be read (again); which are to be read again."""
    found, again = [], []
    for file, own in groupby(fragments, key=lambda fragment: fragment.file):
        right: list[FragmentReport] = []
        quoted, known = False, True
        for fragment in own:
            if not (report := reports.get(fragment.index)):
                break
            if report.fragment.quoted != quoted:
                again.append(replace(fragment, quoted=quoted))
                known = False
            if known:
                right.append(report)
            quoted ^= report.odd_quotes
        found.append(FileReport(file, right))
    return found, again


def _raise_faults(files: Sequence[FileReport]) -> None:
    """Raise `StepError` for the first fragment of a file that is damaged."""
    for found in files:
        for report, lines in found.with_lines_before():
            if fault := report.fault:
                first, last = lines + fault.line, lines + fault.last
                where = f"line {first}" if first == last else f"lines {first} to {last}"
                raise StepError(f"{found.file.uri}, {where}: {fault.problem}")


def check_rows(files: Sequence[FileReport]) -> None:
    """Raise `StepError` for a file without rows, and for one in which no row has the header's number of fields."""
    for found in files:
        uri = found.file.uri
        if not found.records:
            raise StepError(f"{uri} has a header and no rows: export it again with its rows")
        if found.records == sum(report.malformed_rows for report in found.fragments):
            problem, line = next(
                (report.problems["problem"][0], lines + report.problems["line"][0])
                for report, lines in found.with_lines_before()
                if report.problems is not None
            )
            raise StepError(
                f"{uri}, line {line}: the {problem}, and no row fits the header ({counted(found.records, 'row')}). "
                "Does the header lack a name, does each line end with a delimiter, or are decimals written with a "
                "comma? Export the file again so that header and rows agree"
            )


def check_counts(files: Sequence[FileReport], dropped: Mapping[int, int]) -> None:
    """Raise `StepError` unless every byte was read once, and every record counted is accepted or rejected.

    `dropped`: how many duplicates were left out of which fragment.
    """
    for found in files:
        file, uri = found.file, found.file.uri
        starts = [*(report.start for report in found.fragments), file.bytes]
        if starts != [file.data_start, *(report.end for report in found.fragments)]:
            raise StepError(f"{uri} changed while it was read. Wait until it is completely written, then start again")
        counted_rows = sum(report.counted for report in found.fragments)
        rejected = sum(report.rejected_rows + dropped.get(report.fragment.index, 0) for report in found.fragments)
        if counted_rows != found.rows + rejected:
            raise StepError(
                f"{uri} holds {counted(counted_rows, 'row')}, but {found.rows:,} were accepted and {rejected:,} "
                "rejected. The reader is at fault: nothing was kept. Report it with the file"
            )


def check_unchanged(files: Sequence[SourceFile]) -> None:
    """Raise `StepError` if a file was written while it was read: what was read may be neither of its two states."""

    def written(file: SourceFile) -> bool:
        try:
            state = storage.file_state(file.uri)
        except FileNotFoundError:  # removed after it was read
            return False
        except OSError as error:
            raise StepError(f"{file.uri} cannot be looked at again: {error}") from error
        return (state.bytes, storage.lasting(state.change)) != (file.bytes, storage.lasting(file.change))

    with ThreadPoolExecutor(_THREADS) as pool:
        known = [file for file in files if file.change]
        changed = [file.uri for file, answer in zip(known, pool.map(written, known), strict=True) if answer]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise StepError(
            f"written to, or replaced, since the run looked for files: {', '.join(changed[:5])}{more}. "
            "Wait until nothing writes there, then start again"
        )


def files_read(files: Sequence[FileReport]) -> list[dict[str, int | str]]:
    """Of each file: bytes, rows accepted and rejected, and the digest of its content."""
    return [
        {
            "file": found.file.uri,
            "bytes": found.file.bytes,
            "rows": found.rows,
            "rejected_rows": found.records - found.rows,
            "content": content_digest(found.file.bytes, [found.file.head_sum, *(r.content for r in found.fragments)]),
        }
        for found in files
    ]
