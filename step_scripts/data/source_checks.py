"""Is what was read of each file all that it holds?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from step_scripts.runner.contract import StepError
from step_scripts.data.csv_chunks import Chunk
from step_scripts.data.rejected_rows import LineNumbers
from step_scripts.data.accepted_rows import ChunkReport
from step_scripts.runner.wording import counted


def by_file(chunks: Sequence[Chunk]) -> Iterator[tuple[str, list[Chunk]]]:
    """The pieces of each file."""
    for uri, pieces in groupby(chunks, key=lambda c: c.file.uri):
        yield uri, list(pieces)


def check_rows(chunks: Sequence[Chunk], reports: Sequence[ChunkReport], lines: LineNumbers) -> None:
    """Raise `StepError` for a file without rows, and for one in which no row has the header's number of fields."""
    by_index = {r.index: r for r in reports}
    for uri, pieces in by_file(chunks):
        mine = [by_index[c.index] for c in pieces]
        records = sum(r.records for r in mine)
        if not records:
            raise StepError(f"{uri} has a header and no rows: export it again with its rows")
        if records == sum(r.misfits for r in mine):
            index, problem = next((r.index, p) for r in mine for p in r.problems)
            raise StepError(
                f"{uri}, line {lines.locate(index, problem.line)[1]}: the {problem.problem}, and no row fits the "
                f"header ({counted(records, 'row')}). Does the header lack a name, does each line end with a "
                "delimiter, or are decimals written with a comma? Export the file again so that header and rows agree"
            )


def check_counts(chunks: Sequence[Chunk], reports: Sequence[ChunkReport], dropped: Mapping[int, int]) -> None:
    """Raise `StepError` unless every byte was read once, and every record counted is accepted or rejected.

    `dropped`: how many duplicates were left out of which part.
    """
    by_index = {r.index: r for r in reports}
    for uri, pieces in by_file(chunks):
        mine = [by_index[c.index] for c in pieces]
        bounds = [(r.start, r.end) for r in mine]
        file = pieces[0].file
        if [start for start, _ in [*bounds, (file.bytes, 0)]] != [file.data_start, *(end for _, end in bounds)]:
            raise StepError(f"{uri} changed while it was read. Wait until it is completely written, then start again")
        found = sum(r.counted for r in mine)
        accepted = sum(r.part.rows for r in mine)
        rejected = sum(r.rejected_rows + dropped.get(r.index, 0) for r in mine)
        if found != accepted + rejected:
            raise StepError(
                f"{uri} holds {counted(found, 'row')}, but {accepted:,} were accepted and {rejected:,} rejected. "
                "The reader is at fault: nothing was kept. Report it with the file"
            )
