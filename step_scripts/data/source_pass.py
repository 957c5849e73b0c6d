"""The driver's side of reading CSV files: fragment by fragment; is it all that they hold, and what was rejected?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import polars as pl
import ray

from step_scripts.data.csv_fragments import (
    LISTED_REJECTIONS,
    CsvFragments,
    Fragment,
    FragmentReport,
    RowsPlan,
    plan_fragments,
    write_rows,
)
from step_scripts.data.csv_header import CsvFile, content_digest
from step_scripts.data.csv_rows import REJECTIONS, RowCounts
from step_scripts.data.row_files import first_duplicates
from step_scripts.parameters import SourceFile, ValidateSourceParams
from step_scripts.runner import storage
from step_scripts.runner.contract import StepContext, StepError
from step_scripts.runner.local_files import lasting
from step_scripts.runner.ray_data import Progress, source_reports
from step_scripts.runner.wording import are, counted, listed, percent

_SMALLEST_SHARE = 4 << 20  # of a file that is divided only to occupy all CPUs; bytes
_THREADS = 16
_NAMED_REASONS = 3
_MOST_TO_ADVISE = 0.5  # where more is wrong, the file is, and not its bad rows


@dataclass(frozen=True)
class FileReport:
    """A file and the reports of its fragments, in order."""

    file: CsvFile
    fragments: Sequence[FragmentReport]

    @property
    def counts(self) -> RowCounts:
        """Rows that were found, accepted or not; equal rows are not looked for."""
        return RowCounts.total(report.counts for report in self.fragments)

    @property
    def rows(self) -> int:
        """Rows that were written."""
        return sum(report.written.digest.rows for report in self.fragments)

    def with_lines_before(self) -> list[tuple[FragmentReport, int]]:
        """Each report, and how many lines of the file stand before the fragment."""
        lines = accumulate((report.lines for report in self.fragments), initial=self.file.header_lines)
        return list(zip(self.fragments, lines, strict=False))


@dataclass(frozen=True)
class Reason:
    """A reason to reject, how often it applied, and its first case."""

    column: str
    problem: str
    count: int
    file: str
    line: int
    value: str

    def sentence(self) -> str:
        """For example `PRICE is outside 0 <= value <= 1e9 in 3 cells, first -5 in line 7 of a.csv`."""
        subject = f"{self.column} {self.problem}" if self.column else f"the {self.problem}"
        value = f"{self.value!r} in " if self.value and self.column else ""
        return f"{subject} ({counted(self.count, 'time')}, first {value}line {self.line} of {self.file})"


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
    context.log.info(f"{counted(sum(file.counts.records for file in found), 'row')} validated")
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
        rows = found.counts.records
        if not rows:
            raise StepError(f"{uri} has a header and no rows: export it again with its rows")
        if rows == found.counts.malformed:
            problem, line = next(
                (report.problems["problem"][0], lines + report.problems["line"][0])
                for report, lines in found.with_lines_before()
                if report.problems is not None
            )
            raise StepError(
                f"{uri}, line {line}: the {problem}, and no row fits the header ({counted(rows, 'row')}). "
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
        rejected = sum(report.counts.rejected + dropped.get(report.fragment.index, 0) for report in found.fragments)
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
        return (state.bytes, lasting(state.change)) != (file.bytes, lasting(file.change))

    with ThreadPoolExecutor(_THREADS) as pool:
        known = [file for file in files if file.change]
        changed = [file.uri for file, answer in zip(known, pool.map(written, known), strict=True) if answer]
    if changed:
        raise StepError(
            f"written to, or replaced, since the run looked for files: {listed(changed, 5)}. "
            "Wait until nothing writes there, then start again"
        )


def files_read(files: Sequence[FileReport]) -> list[dict[str, int | str]]:
    """Of each file: bytes, rows accepted and rejected, and the digest of its content."""
    return [
        {
            "file": found.file.uri,
            "bytes": found.file.bytes,
            "rows": found.rows,
            "rejected_rows": found.counts.records - found.rows,
            "content": content_digest(found.file.bytes, [found.file.head_sum, *(r.content for r in found.fragments)]),
        }
        for found in files
    ]


def rejections(
    files: Sequence[FileReport], plan: RowsPlan, duplicate_uris: Sequence[str], dropped: int
) -> tuple[pl.DataFrame, list[Reason]]:
    """The first rejected cells in order of file and line (file, line, column, value, reason), and all reasons.

    There are at most `LISTED_REJECTIONS` cells. Of the reasons the commonest comes first. `dropped` duplicates were
    rejected, which `duplicate_uris` tell.
    """
    reports = [(report, found.file.uri, lines) for found in files for report, lines in found.with_lines_before()]
    places = pl.DataFrame(
        [(report.fragment.index, uri, lines) for report, uri, lines in reports],
        schema={"fragment": pl.Int32, "file": pl.String, "before": pl.Int64},
        orient="row",
    )
    frames, problems, listed_cells = [], [], 0
    for report, *_ in reports:
        if report.problems is not None:
            problems.append(report.problems)
            if listed_cells < LISTED_REJECTIONS:
                frames.append(pl.read_parquet(storage.read_bytes(plan.rejections_uri(report.fragment.index))))
                listed_cells += frames[-1].height
    if dropped:
        frames.append(_duplicates(duplicate_uris, places, plan.params.table.key_columns))
        first = pl.lit("").alias("column"), pl.lit(dropped, pl.UInt32).alias("count")
        problems.append(frames[-1].head(1).select(first[0], "problem", first[1], "line", "value", "fragment"))
    empty = pl.DataFrame(schema={**REJECTIONS, "fragment": pl.Int32})
    table = pl.concat([empty, *frames]).sort("fragment", "line", maintain_order=True).head(LISTED_REJECTIONS)
    reasons = pl.concat(problems) if problems else empty.with_columns(count=pl.lit(0))
    groups = _located(reasons, places).group_by("column", "problem", maintain_order=True)
    totals = groups.agg(pl.col("count").sum(), pl.col("file", "line", "value").first())
    ordered = totals.sort("count", "column", "problem", descending=[True, False, False])
    return (
        _located(table, places).select("file", "line", "column", "value", "reason"),
        [Reason(**row) for row in ordered.iter_rows(named=True)],
    )


def _located(frame: pl.DataFrame, places: pl.DataFrame) -> pl.DataFrame:
    """The frame with the file of each fragment, and lines of files instead of fragments."""
    joined = frame.join(places, on="fragment", how="left", maintain_order="left")
    return joined.with_columns(pl.col("line") + pl.col("before"))


def _duplicates(duplicate_uris: Sequence[str], places: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """The first rejected duplicates as rejected cells."""
    found = first_duplicates(duplicate_uris, LISTED_REJECTIONS)
    firsts = _located(found.select(fragment="first_fragment", line="first_line"), places)
    problem = f"row has the same {', '.join(keys)} as an earlier row" if keys else "row equals an earlier row"
    reason = "the row has the same key as line {} of {}" if keys else "the row equals line {} of {}"
    return found.select(
        pl.col("line").cast(pl.Int64),
        pl.lit(", ".join(keys)).alias("column"),
        pl.lit("").alias("value"),
        firsts.select(pl.format(reason, "line", "file").alias("reason")).to_series(),
        pl.lit(problem).alias("problem"),
        "fragment",
    )


def rejection_message(
    counts: RowCounts, reasons: Sequence[Reason], params: ValidateSourceParams, listed_in: str
) -> str:
    """Why the step fails: figures, the commonest reasons with an example each, remedies.

    `listed_in`: the file that lists the rejected rows.
    """
    fraction, limit = counts.rejected_fraction, params.max_rejected_fraction
    remedies = ["correct the rows"]
    if any(reason.problem.startswith("is outside ") for reason in reasons):
        remedies.append("widen the bounds with column_ranges")
    if any(r.problem.startswith("row ") and "earlier row" in r.problem for r in reasons):
        remedies.append("keep equal rows with duplicate_rows: keep")
    if fraction <= _MOST_TO_ADVISE:
        remedies.append(f"raise max_rejected_fraction above {fraction:.4g}")
    kinds = "; ".join(reason.sentence() for reason in reasons[:_NAMED_REASONS])
    more = f"; and {counted(len(reasons) - _NAMED_REASONS, 'other reason')}" if len(reasons) > _NAMED_REASONS else ""
    several = counts.record_lines > counts.records
    lines = f", {counts.rejected_lines:,} of {counted(counts.record_lines, 'line')}," if several else ""
    rows = f"{counts.rejected:,} of {counted(counts.records, 'row')}{lines} {are(counts.rejected)} rejected"
    return (
        f"{rows} ({percent(fraction)}); "
        f"at most {percent(limit)} may be (max_rejected_fraction). Reasons: {kinds}{more}. "
        f"Remedy: {', or '.join(remedies)}. {listed_in} lists them, up to {LISTED_REJECTIONS:,}"
    )
