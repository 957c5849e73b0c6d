"""Is what was read of each file all that it holds?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from step_scripts.data.accepted_rows import ChunkReport
from step_scripts.data.content_digest import content_digest
from step_scripts.data.csv_chunks import Chunk
from step_scripts.data.rejected_rows import LineNumbers
from step_scripts.parameters import SourceFile
from step_scripts.runner.contract import StepError
from step_scripts.runner.storage import file_state, lasting
from step_scripts.runner.wording import counted

_THREADS = 16


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


def check_unchanged(files: Sequence[SourceFile]) -> None:
    """Raise `StepError` if a file was written while it was read: what was read may be neither of its two states."""

    def written(file: SourceFile) -> bool:
        try:
            state = file_state(file.uri)
        except FileNotFoundError:  # removed after it was read
            return False
        except OSError as error:
            raise StepError(f"{file.uri} cannot be looked at again: {error}") from error
        return (state.bytes, lasting(state.change)) != (file.bytes, lasting(file.change))

    with ThreadPoolExecutor(_THREADS) as pool:
        known = [file for file in files if file.change]
        changed = [file.uri for file, answer in zip(known, pool.map(written, known), strict=True) if answer]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise StepError(
            f"written to, or replaced, since the run looked for files: {', '.join(changed[:5])}{more}. "
            "Wait until nothing writes there, then start again"
        )


def files_read(chunks: Sequence[Chunk], reports: Sequence[ChunkReport]) -> list[dict[str, int | str]]:
    """Of each file: bytes, rows accepted and rejected, and the digest of its content."""
    by_index = {r.index: r for r in reports}
    listed = []
    for uri, pieces in by_file(chunks):
        mine = [by_index[c.index] for c in pieces]
        rows = sum(r.part.rows for r in mine)
        records, file = sum(r.records for r in mine), pieces[0].file
        listed.append(
            {
                "file": uri,
                "bytes": file.bytes,
                "rows": rows,
                "rejected_rows": records - rows,
                "content": content_digest(file.bytes, [file.head_sum, *(r.content for r in mine)]),
            }
        )
    return listed
