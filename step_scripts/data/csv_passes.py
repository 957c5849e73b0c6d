"""Reads CSV files range by range, and those again in which fields span lines and a range was cut inside of one."""

from __future__ import annotations

import time
from collections.abc import Sequence

import ray

from step_scripts.data.accepted_rows import ChunkReport, RowsPlan, write_rows
from step_scripts.data.csv_chunks import Chunk, plan_chunks, safe_cuts
from step_scripts.data.csv_header import CsvFile
from step_scripts.data.csv_source import CsvRanges
from step_scripts.data.source_checks import by_file
from step_scripts.parameters import ValidateSourceParams
from step_scripts.runner.contract import StepContext, StepError
from step_scripts.runner.ray_data import each_call, source_reports
from step_scripts.runner.wording import counted

_SMALLEST_SHARE = 4 << 20  # of a file that is divided only to occupy all CPUs; bytes
_SECONDS_BETWEEN_MESSAGES = 2.0


def validate_files(
    context: StepContext, params: ValidateSourceParams, files: list[CsvFile], scratch_uri: str, buckets: int
) -> tuple[list[Chunk], list[ChunkReport]]:
    """Read all files in ranges, and write what is accepted. Returns the ranges, and the report of each.

    Raises `StepError` for what is wrong with a file as a whole, with its lines.
    """
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
