"""The table of rejected rows, and what to say about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from step_scripts.data.accepted_rows import LISTED_REJECTIONS, REJECTION_SCHEMA, FragmentReport, rejections_file
from step_scripts.data.duplicate_rows import first_duplicates
from step_scripts.data.source_report import LineNumbers
from step_scripts.parameters import ValidateSourceParams
from step_scripts.runner import storage
from step_scripts.runner.wording import are, counted, percent

_SCHEMA = {"file": pl.String(), **REJECTION_SCHEMA}
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


def rejection_reasons(
    reports: Sequence[FragmentReport],
    lines: LineNumbers,
    duplicates: int,
    duplicate_rows: pl.DataFrame,
    keys: Sequence[str],
) -> list[Reason]:
    """All reasons, the commonest first."""
    found: dict[tuple[str, str], Reason] = {}
    for report in reports:
        for p in report.problems:
            file, line = lines.locate(report.index, p.line)
            before = found.get((p.column, p.problem))
            count = p.count + (before.count if before else 0)
            first = before or Reason(p.column, p.problem, 0, file, line, p.value)
            found[p.column, p.problem] = Reason(first.column, first.problem, count, first.file, first.line, first.value)
    if duplicates:
        row = duplicate_rows.row(0, named=True)
        file, line = lines.locate(row["fragment"], row["line"])
        problem = f"row has the same {', '.join(keys)} as an earlier row" if keys else "row equals an earlier row"
        found["", problem] = Reason("", problem, duplicates, file, line, "")
    return sorted(found.values(), key=lambda r: (-r.count, r.column, r.problem))


def rejected_table(
    scratch_uri: str,
    reports: Iterable[FragmentReport],
    lines: LineNumbers,
    duplicate_uris: Sequence[str],
    keys: Sequence[str],
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The first `LISTED_REJECTIONS` rejections in order of file and line: file, line, column, value, reason.

    The second frame holds the first rejected duplicates as `first_duplicates` returns them.
    """
    frames: list[pl.DataFrame] = []
    listed = 0
    for report in reports:
        if report.problems and listed < LISTED_REJECTIONS:
            stored = storage.read_bytes(storage.join(scratch_uri, rejections_file(report.index)))
            frame = pl.read_parquet(stored).head(LISTED_REJECTIONS - listed)
            uri, base = lines.locate(report.index, 0)
            file, fragment = pl.lit(uri).alias("file"), pl.lit(report.index).alias("fragment")
            frames.append(frame.select(file, pl.col("line") + base, "column", "value", "reason", fragment))
            listed += frame.height
    duplicates = first_duplicates(duplicate_uris, LISTED_REJECTIONS) if duplicate_uris else pl.DataFrame()
    if duplicates.height:
        frames.append(_as_rejections(duplicates, lines, keys))
    if not frames:
        return pl.DataFrame(schema=_SCHEMA), duplicates
    table = pl.concat([f.with_columns(pl.col("fragment").cast(pl.Int32)) for f in frames])
    return table.sort("fragment", "line", maintain_order=True).head(LISTED_REJECTIONS).drop("fragment"), duplicates


def _as_rejections(duplicates: pl.DataFrame, lines: LineNumbers, keys: Sequence[str]) -> pl.DataFrame:
    relation = "the row has the same key as" if keys else "the row equals"
    rows = []
    for row in duplicates.iter_rows(named=True):
        file, line = lines.locate(row["fragment"], row["line"])
        first_file, first_line = lines.locate(row["first_fragment"], row["first_line"])
        reason = f"{relation} line {first_line} of {first_file}"
        rows.append((file, line, ", ".join(keys), "", reason, row["fragment"]))
    return pl.DataFrame(rows, schema={**_SCHEMA, "fragment": pl.Int64()}, orient="row")


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


def as_details(table: pl.DataFrame, reasons: Sequence[Reason], listed: int = 50) -> dict[str, Any]:
    """The first rejected rows and all reasons, as plain data."""
    return {
        "rejected_rows": table.head(listed).to_dicts(),
        "rejection_reasons": [vars(reason) for reason in reasons[:200]],
    }
