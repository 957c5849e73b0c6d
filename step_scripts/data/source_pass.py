"""Reads CSV files fragment by fragment, and those again in which a fragment was cut inside of a quoted field."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import ray

from step_scripts.data.accepted_rows import FragmentReport, RowsPlan, write_rows
from step_scripts.data.csv_fragments import Fragment, plan_fragments, safe_cuts
from step_scripts.data.csv_header import CsvFile
from step_scripts.data.csv_source import CsvFragments
from step_scripts.data.csv_text import DamagedText
from step_scripts.data.source_report import FileReport
from step_scripts.runner.contract import StepContext, StepError
from step_scripts.runner.ray_data import Progress, each_call, source_reports
from step_scripts.runner.wording import counted

_SMALLEST_SHARE = 4 << 20  # of a file that is divided only to occupy all CPUs; bytes


def divided(files: Sequence[CsvFile], largest_bytes: int) -> list[Fragment]:
    """The fragments of all files: as many for each CPU, so that none waits for the last."""
    share = -(-sum(file.bytes for file in files) // max(1, int(ray.cluster_resources().get("CPU", 1))))
    wanted = -(-share // -(-share // largest_bytes))
    return plan_fragments(files, min(largest_bytes, max(wanted, _SMALLEST_SHARE)))


def read_files(context: StepContext, plan: RowsPlan, fragments: list[Fragment]) -> list[FileReport]:
    """Read all fragments, and write what is accepted. Returns what was found in each file.

    Raises `StepError` for what is wrong with a file as a whole, with its lines.
    """
    reports: dict[int, FragmentReport] = {}
    progress = Progress(context.log, "validate_source", len(fragments), "fragment")
    _read(plan, fragments, fragments, reports, progress)
    if odd := [uri for uri, own in by_file(fragments) if any(reports[f.index].odd_quotes for f in own)]:
        context.log.info(f"fields span lines in {', '.join(odd[:5])}: cutting the files again between records")
        fragments, damages = _cut_again(plan, fragments, odd)
        again = [fragment for fragment in fragments if fragment.file.uri in odd]
        for fragment in again:
            del reports[fragment.index]
        _read(plan, again, fragments, reports, progress)
        for file, damage in damages:  # what comes before it has been found to be in order
            raise _damaged(file, file.header_lines, damage)
    _raise_damage(fragments, reports)
    context.log.info(f"{counted(sum(report.records for report in reports.values()), 'row')} validated")
    return [FileReport(own[0].file, [reports[f.index] for f in own]) for _, own in by_file(fragments)]


def by_file(fragments: Sequence[Fragment]) -> list[tuple[str, list[Fragment]]]:
    """The fragments of each file."""
    return [(uri, list(own)) for uri, own in groupby(fragments, key=lambda fragment: fragment.file.uri)]


def _read(
    plan: RowsPlan,
    chosen: Sequence[Fragment],
    fragments: Sequence[Fragment],
    reports: dict[int, FragmentReport],
    progress: Progress,
) -> None:
    """Read the chosen ones of all fragments, and add their reports."""
    for report in source_reports(CsvFragments(chosen, plan.params), len(chosen), write_rows, plan):
        reports[report.index] = report
        progress.add(1)
        if report.fault:
            _raise_damage(fragments, reports)


def _raise_damage(fragments: Sequence[Fragment], reports: dict[int, FragmentReport]) -> None:
    """Raise `StepError` for the first damaged fragment of a file whose earlier ones are all known to be cut rightly."""
    for _, own in by_file(fragments):
        line = own[0].file.header_lines
        for fragment in own:
            report = reports.get(fragment.index)
            if report is None or report.odd_quotes:
                break
            if report.fault:
                raise _damaged(fragment.file, line, DamagedText(*report.fault))
            line += report.lines


def _damaged(file: CsvFile, lines_before: int, damage: DamagedText) -> StepError:
    first, last = lines_before + damage.line, lines_before + damage.last
    where = f"line {first}" if first == last else f"lines {first} to {last}"
    return StepError(f"{file.uri}, {where}: {damage.problem}")


def _cut_again(
    plan: RowsPlan, fragments: list[Fragment], uris: Sequence[str]
) -> tuple[list[Fragment], list[tuple[CsvFile, DamagedText]]]:
    """The same number of fragments, those of `uris` cut between records, and where such a file is damaged.

    The fragments of a damaged file end where the damage begins.
    """
    chosen = [own for uri, own in by_file(fragments) if uri in uris]
    limits = (plan.params.delimiter, plan.params.max_line_bytes)
    calls = [(own[0].file, [fragment.start for fragment in own[1:]], *limits) for own in chosen]
    cut, damages = list(fragments), {}
    for index, (ends, damage) in each_call(safe_cuts, calls):
        own = chosen[index]
        if damage is not None:
            damages[index] = (own[0].file, damage)
        for fragment, start, end in zip(own, [own[0].start, *ends], ends, strict=False):
            cut[fragment.index] = fragment.model_copy(update={"start": start, "end": end})
    return cut, [damages[index] for index in sorted(damages)]
