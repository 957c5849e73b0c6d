"""What was read of each file: where its lines are, and whether it is all that the file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

from step_scripts.data.accepted_rows import FragmentReport
from step_scripts.data.csv_header import CsvFile, content_digest
from step_scripts.parameters import SourceFile
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.wording import counted

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


class LineNumbers:
    """Where the lines of each fragment stand in their file."""

    def __init__(self, files: Sequence[FileReport]) -> None:
        self._before: dict[int, tuple[str, int]] = {}
        for found in files:
            lines = accumulate((report.lines for report in found.fragments), initial=found.file.header_lines)
            for report, before in zip(found.fragments, lines, strict=False):
                self._before[report.index] = (found.file.uri, before)

    def locate(self, fragment: int, line: int) -> tuple[str, int]:
        """File and line, from 1, of line `line` of a fragment."""
        uri, before = self._before[fragment]
        return uri, before + line


def check_rows(files: Sequence[FileReport], lines: LineNumbers) -> None:
    """Raise `StepError` for a file without rows, and for one in which no row has the header's number of fields."""
    for found in files:
        uri = found.file.uri
        if not found.records:
            raise StepError(f"{uri} has a header and no rows: export it again with its rows")
        if found.records == sum(report.malformed_rows for report in found.fragments):
            fragment, problem = next((r.index, p) for r in found.fragments for p in r.problems)
            raise StepError(
                f"{uri}, line {lines.locate(fragment, problem.line)[1]}: the {problem.problem}, and no row fits the "
                f"header ({counted(found.records, 'row')}). Does the header lack a name, does each line end with a "
                "delimiter, or are decimals written with a comma? Export the file again so that header and rows agree"
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
        rejected = sum(report.rejected_rows + dropped.get(report.index, 0) for report in found.fragments)
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
