"""The table of rejected rows, and what to say about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from step_scripts.data.accepted_rows import LISTED_REJECTIONS, rejections_file
from step_scripts.data.csv_fragments import REJECTIONS
from step_scripts.data.partitions import first_duplicates
from step_scripts.data.source_pass import FileReport
from step_scripts.parameters import ValidateSourceParams
from step_scripts.runner import storage
from step_scripts.runner.wording import are, counted, percent

_NAMED_REASONS = 3
_MOST_TO_ADVISE = 0.5  # where more is wrong, the file is, and not its bad rows


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


def rejections(
    files: Sequence[FileReport], scratch_uri: str, duplicate_uris: Sequence[str], dropped: int, keys: Sequence[str]
) -> tuple[pl.DataFrame, list[Reason]]:
    """The first rejected cells in order of file and line (file, line, column, value, reason), and all reasons.

    There are at most `LISTED_REJECTIONS` cells. Of the reasons the commonest comes first. `dropped` duplicates were
    rejected, which `duplicate_uris` tell.
    """
    places = pl.DataFrame(
        [
            (report.fragment.index, found.file.uri, lines)
            for found in files
            for report, lines in found.with_lines_before()
        ],
        schema={"fragment": pl.Int32, "file": pl.String, "before": pl.Int64},
        orient="row",
    )
    frames, problems, listed = [], [], 0
    for report in (report for found in files for report in found.fragments):
        if report.problems is None:
            continue
        fragment = pl.lit(report.fragment.index, pl.Int32).alias("fragment")
        problems.append(report.problems.with_columns(fragment))
        if listed < LISTED_REJECTIONS:
            stored = storage.read_bytes(storage.join(scratch_uri, rejections_file(report.fragment.index)))
            frames.append(pl.read_parquet(stored).with_columns(fragment))
            listed += frames[-1].height
    if dropped:
        frames.append(_duplicates(duplicate_uris, places, keys))
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
    rows: tuple[int, int],
    lines: tuple[int, int],
    reasons: Sequence[Reason],
    params: ValidateSourceParams,
    listed_in: str,
) -> str:
    """Why the step fails: figures, the commonest reasons with an example each, remedies.

    `rows` and `lines`: how many are rejected, and of how many. `listed_in`: the file that lists them.
    """
    (rejected, total), fraction = rows, max(rows[0] / rows[1], lines[0] / lines[1])
    limit = params.max_rejected_fraction
    remedies = ["correct the rows"]
    if any(reason.problem.startswith("is outside ") for reason in reasons):
        remedies.append("widen the bounds with column_ranges")
    if any(r.problem.startswith("row ") and "earlier row" in r.problem for r in reasons):
        remedies.append("keep equal rows with duplicate_rows: keep")
    if fraction <= _MOST_TO_ADVISE:
        remedies.append(f"raise max_rejected_fraction above {fraction:.4g}")
    kinds = "; ".join(reason.sentence() for reason in reasons[:_NAMED_REASONS])
    more = f"; and {counted(len(reasons) - _NAMED_REASONS, 'other reason')}" if len(reasons) > _NAMED_REASONS else ""
    taken = f", {lines[0]:,} of {counted(lines[1], 'line')}," if lines != rows else ""
    return (
        f"{rejected:,} of {counted(total, 'row')}{taken} {are(rejected)} rejected ({percent(fraction)}); "
        f"at most {percent(limit)} may be (max_rejected_fraction). Reasons: {kinds}{more}. "
        f"Remedy: {', or '.join(remedies)}. {listed_in} lists them, up to {LISTED_REJECTIONS:,}"
    )
