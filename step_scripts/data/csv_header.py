"""The first line of a CSV file: is it such a table at all, and which field holds which column?

Also the digest of a file's content, which starts with the header and is continued by the tasks that read the rows.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import io
import re

from step_scripts.data.csv_text import DamagedText, count_lines, line_end, long_line_fault, record_end, with_newlines
from step_scripts.parameters import SourceFile, ValidateSourceParams
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError

DIGEST_BLOCK = 1 << 16
"""Bytes that are hashed at once. A task reads so much beyond its fragment, for the last block that begins in it."""
UTF8_BOM = b"\xef\xbb\xbf"
_FIRST_READ = 1 << 16
_DELIMITERS = {";": "';'", "\t": "a tab", "|": "'|'", ",": "','"}
_UTF_16 = (
    "encoded in UTF-16 (byte order mark at byte 0, line 1)",
    "convert it to UTF-8: iconv -f UTF-16 -t UTF-8",
)
_SIGNATURES = (
    (b"PAR1", "a Parquet file", "export it as CSV"),
    (b"\x1f\x8b", "gzip-compressed", "unpack it with gunzip"),
    (b"BZh", "bzip2-compressed", "unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "xz-compressed", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard-compressed", "unpack it with unzstd"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "export the sheet as CSV"),
    (b"%PDF", "a PDF document", "export the table as CSV"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"\xff\xfe\x00\x00", "encoded in UTF-32", "convert it to UTF-8: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", *_UTF_16),
    (b"\xfe\xff", *_UTF_16),
)


class CsvFile(SourceFile):
    """A source file whose header was read. Rows start at byte `data_start`, after `header_lines` lines.

    `positions` holds, for each column of the table, the index of its field; a row has `fields` fields. `head_sum`: of
    the blocks that begin before the rows (`block_sum`).
    """

    data_start: int
    header_lines: int
    fields: int
    positions: tuple[int, ...]
    extra_columns: tuple[str, ...]
    head_sum: int


def read_header(file: SourceFile, params: ValidateSourceParams) -> CsvFile:
    """Read and check the header. Raises `StepError` naming file, line, column and remedy for what is no such table."""
    head = _read_head(file, params.max_line_bytes)
    _check_content(file.uri, head)
    complete = len(head) == file.bytes
    head = with_newlines(head)
    try:
        check_text(head, complete=complete)
    except DamagedText as fault:
        raise StepError(f"{file.uri}, line {fault.line}: {fault.problem}") from fault
    start = len(UTF8_BOM) if head.startswith(UTF8_BOM) else 0
    first = _first_line(file, head, start, params.max_line_bytes)
    line = count_lines(head[:first]) + 1
    end = record_end(head, first, quoted=False, complete=complete)
    if end < 0 and (not complete or head.count(b'"', first) % 2):
        raise StepError(f"{file.uri}, line {line}: a quoted column name is not closed. Add the closing quote")
    end = end if end >= 0 else len(head)
    header_lines = count_lines(head[:end])
    try:
        header = io.StringIO(head[first:end].decode("utf-8"), newline="")
        names, *beyond = csv.reader(header, delimiter=params.delimiter)
    except csv.Error as error:
        raise StepError(f"{file.uri}, line {line}: the header is not readable as CSV ({error})") from error
    # No column name, but what stands between two stray quote characters.
    row_like = [text.count(params.delimiter) for name in names for text in name.splitlines()[1:]]
    if beyond or max(row_like, default=0) >= max(1, len(names) - 1):
        raise StepError(
            f"{file.uri}, lines {line} to {header_lines}: a quoted column name holds rows of the table. "
            "Remove the quote character that is out of place"
        )
    positions = _positions(f"{file.uri}, line {line}", names, params)
    if not head[end:].strip() and complete:
        raise StepError(f"{file.uri} has a header (line {line}) and no rows: export it again with its rows")
    extra = [name.strip() or f"(no name, field {i + 1})" for i, name in enumerate(names) if i not in positions]
    return CsvFile(
        **file.model_dump(),
        data_start=end,
        header_lines=header_lines,
        fields=len(names),
        positions=positions,
        extra_columns=tuple(extra),
        head_sum=block_sum(head, 0, 0, end),
    )


def check_text(data: bytes, offset: int = 0, *, complete: bool = True) -> None:
    """Raise `DamagedText` unless `data`, which stands at `offset` in its file, is text in UTF-8.

    Unless it is `complete`, it may end within a character.
    """
    if (position := data.find(b"\0")) >= 0:
        problem = "the file is binary, damaged or encoded in UTF-16. Export it again as CSV in UTF-8"
        raise DamagedText(count_lines(data[:position]) + 1, f"byte 0x00 at offset {offset + position:,}: {problem}")
    if not data.isascii():
        try:
            codecs.utf_8_decode(data, "strict", complete)
        except UnicodeDecodeError as error:
            byte = f"byte 0x{data[error.start]:02X} at offset {offset + error.start:,}"
            remedy = "Convert the file, for example from Latin-1: iconv -f ISO-8859-1 -t UTF-8"
            raise DamagedText(count_lines(data[: error.start]) + 1, f"{byte} is not UTF-8. {remedy}") from error


def _read_head(file: SourceFile, max_line_bytes: int) -> bytes:
    try:
        with storage.open_input(file.uri) as source:
            head = source.read(_FIRST_READ)
            if len(head) == _FIRST_READ and line_end(head.lstrip(), 0, complete=True) < 0:
                head += source.read(max_line_bytes)
            if head.endswith(b"\r"):
                head += source.read(1)
            size = source.seek(0, io.SEEK_END)
    except FileNotFoundError as error:
        raise StepError(f"{file.uri} does not exist any more: restore it, or correct the source") from error
    except OSError as error:
        raise StepError(f"{file.uri} cannot be read: {error}") from error
    if size != file.bytes:
        raise StepError(
            f"{file.uri} has {size:,} bytes; it had {file.bytes:,} when it was found. "
            "Wait until it is completely written, then start again"
        )
    return head


def _check_content(uri: str, head: bytes) -> None:
    if not head:
        raise StepError(f"{uri} is empty (0 bytes): export it again, with a header line and rows")
    if head.startswith(b"PK\x03\x04"):
        kind = "an Excel workbook" if b"[Content_Types].xml" in head or b"xl/" in head else "a ZIP archive"
        remedy = "export the sheet as CSV" if kind == "an Excel workbook" else "unpack it with unzip"
        raise StepError(f"{uri} is {kind}, not a CSV file: {remedy}")
    for signature, kind, remedy in _SIGNATURES:
        if head.startswith(signature):
            raise StepError(f"{uri} is {kind}, not a CSV file in UTF-8: {remedy}")
    start = head.lstrip(UTF8_BOM + b" \t\r\n")[:200].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise StepError(f"{uri} is an HTML or XML page, not a CSV file: was a download answered by an error page?")
    if start.startswith((b"{", b'["', b"[{", b"[[", b"[\n")):
        raise StepError(f"{uri} is JSON, not a CSV file: export the table as CSV")
    if not head.strip(UTF8_BOM + b" \t\r\n"):
        raise StepError(f"{uri} holds nothing but blanks: export it again, with a header line and rows")


def _first_line(file: SourceFile, head: bytes, start: int, max_line_bytes: int) -> int:
    """Offset of the first line that is not blank."""
    first = len(head) - len(head[start:].lstrip(b" \t\r\n"))
    first = head.rfind(b"\n", start, first) + 1 or start
    end = head.find(b"\n", first)
    line = head.count(b"\n", 0, first) + 1
    if (end if end >= 0 else len(head)) - first > max_line_bytes:
        raise StepError(f"{file.uri}, line {line} is {long_line_fault(max_line_bytes)}")
    return first


def _positions(where: str, names: list[str], params: ValidateSourceParams) -> tuple[int, ...]:
    """The field of each column of the table."""
    columns = params.table.column_names
    normalized = [name.strip().casefold() for name in names]
    found = {c: [i for i, n in enumerate(normalized) if n == c.strip().casefold()] for c in columns}
    for name, positions in found.items():
        if len(positions) > 1:
            fields = ", ".join(f"field {i + 1} ({names[i]!r})" for i in positions)
            raise StepError(f"{where}: column {name} is there {len(positions)} times: {fields}. Remove or rename one")
    if missing := [name for name, positions in found.items() if not positions]:
        raise StepError(f"{where}{_missing_columns(names, missing, params)}")
    return tuple(positions[0] for positions in found.values())


def _missing_columns(names: list[str], missing: list[str], params: ValidateSourceParams) -> str:
    """What may have been meant: another delimiter, rows without a header, or columns of similar names."""
    columns, line = params.table.column_names, params.delimiter.join(names)
    folded = {name.casefold() for name in columns}
    here = len(columns) - len(missing)
    for delimiter, shown in _DELIMITERS.items():
        known = {name.strip().strip('"').casefold() for name in line.split(delimiter)} & folded
        if delimiter != params.delimiter and len(known) > max(here, 1):
            setting = "\\t" if delimiter == "\t" else delimiter
            expected = _DELIMITERS.get(params.delimiter, params.delimiter)
            return (
                f": fields are separated by {shown}, not by {expected}. "
                f'Set delimiter to "{setting}", or export the file with the configured one'
            )
    if all(re.fullmatch(r"\s*[-+]?[\d.]+(e[-+]?\d+)?\s*", name, re.IGNORECASE) for name in names):
        return f" holds data, not column names. Add a first line: {params.delimiter.join(columns)}"
    spare = {name.casefold(): name for name in map(str.strip, names) if name.casefold() not in folded}
    hints = "".join(
        f"is {spare[close]!r} meant to be {column}? "
        for column in missing
        for close in difflib.get_close_matches(column.casefold(), spare, n=1, cutoff=0.6)
    )
    header = ", ".join(repr(name[:60]) for name in names[:30])
    plural = "columns" if len(missing) > 1 else "column"
    return (
        f": {plural} {', '.join(missing)} missing; the header has {header}. {hints}"
        "Add or rename the column, or adapt the schema"
    )


def block_sum(data: bytes, offset: int, start: int, end: int) -> int:
    """The sum of the hashes of those blocks of a file that begin at or after byte `start` and before `end`.

    `data` is what stands at `offset` in the file, up to the end of the last of these blocks or of the file.
    """
    total, content = 0, memoryview(data)
    for begin in range(-(-start // DIGEST_BLOCK) * DIGEST_BLOCK, end, DIGEST_BLOCK):
        block = content[begin - offset : begin - offset + DIGEST_BLOCK]
        total += int.from_bytes(hashlib.sha256(begin.to_bytes(8, "big") + block).digest(), "big")
    return total % (1 << 256)


def content_digest(size: int, sums: list[int]) -> str:
    """SHA-256, in hexadecimal, over a file's size in bytes and the hashes of all its blocks, however it was divided."""
    return hashlib.sha256(f"{size}\0{sum(sums) % (1 << 256)}".encode()).hexdigest()
