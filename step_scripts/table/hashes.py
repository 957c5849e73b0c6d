"""The one family of hashes: of rows, texts, a row's content, events; record ids; digests of sets; files by hash.

A hash has 128 bits, as two independent halves that mix in one value after the other: `hash_hi` with the finalizer of
splitmix64, `hash_lo` with that of MurmurHash3. All is computed in numpy, in columns, both halves at once: whatever is
not the same for both has shape (2, 1) or (2, rows).

The values are stable. Feature stores hold record ids made of them, and digests of what they hold, so they must be the
same on every machine and with every version of the libraries: no library's own hash function is used. The hashes tell
records apart; they are no protection against somebody who constructs collisions.
"""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import polars as pl
import pyarrow as pa

from step_scripts.runner import storage

Hash128 = np.ndarray
"""`hash_hi` and `hash_lo`: uint64, shape (2, rows)."""

ID_DIGITS = 32
_MODULUS = 1 << 64
_WORD_BYTES = 8
_BLOCK_ROWS = 1 << 14  # intermediate arrays stay in the CPU's cache
_ROW_SEEDS = np.array([[0x243F6A8885A308D3], [0x13198A2E03707344]], np.uint64)  # digits of pi
_NULLS = np.array([[0xA4093822299F31D0], [0x082EFA98EC4E6C89]], np.uint64)
# Shift, multiplier, shift, multiplier, shift.
_MIXERS = np.array(
    [(30, 0xBF58476D1CE4E5B9, 27, 0x94D049BB133111EB, 31), (33, 0xFF51AFD7ED558CCD, 33, 0xC4CEB9FE1A85EC53, 33)],
    np.uint64,
).T.reshape(5, 2, 1)
_STEPS = np.array([[0x9E3779B97F4A7C15], [0xD1B54A32D192ED03]], np.uint64)


def row_hashes(frame: pl.DataFrame, columns: Sequence[str]) -> Hash128:
    """Hashes of the rows over `columns`, in that order: what record ids are made of.

    Equal values of one column type hash equally: 0.0 and -0.0, all NaNs, one instant in any time unit or zone. Null
    differs from every value. Raises `ValueError` for a column whose type is none of integer, float, bool, string,
    datetime, and `polars.exceptions.ColumnNotFoundError` for one that is not there.
    """
    hashes = np.full((2, frame.height), _ROW_SEEDS)
    _mix_in(hashes, [_column_bits(frame[name]) for name in columns])
    return hashes


def content_hashes(frame: pl.DataFrame, columns: Sequence[str]) -> Hash128:
    """Hashes of the values of `columns`. Their order, and columns that the frame lacks, make no difference.

    A null adds nothing, so a column that is added later, and is null in older rows, changes no hash.
    """
    total = np.zeros((2, frame.height), np.uint64)
    present = [frame[name] for name in columns if name in frame.columns]
    bits = [_column_bits(column) for column in present]
    nulls = [column.is_null().to_numpy() if column.null_count() else None for column in present]
    for block in _blocks(frame.height):
        for column, values, null in zip(present, bits, nulls, strict=True):
            hashes = np.full_like(total[:, block], seeds(column.name))
            _mix_in(hashes, [values[..., block]])
            if null is not None:
                hashes[:, null[block]] = 0
            total[:, block] += hashes
    return total


def text_hashes(column: pl.Series) -> Hash128:
    """Hashes of texts without nulls, by their UTF-8 bytes."""
    hashes = np.full((2, len(column)), seeds("text"))
    _mix_in(hashes, [_text_bits(column)])
    return hashes


def event_hashes(
    record: Hash128, event_time: np.ndarray, content: Hash128, deleted: np.ndarray | None = None
) -> Hash128:
    """Hashes of events: record id, time (int64, microseconds since 1970), content, and whether it is a deletion."""
    hashes = record.copy()
    moment = event_time.view(np.uint64)
    if deleted is not None and deleted.any():
        moment = np.where(deleted, moment ^ seeds("deleted")[0], moment)
    _mix_in(hashes, [moment, content])
    return hashes


def hash_sums(hashes: Hash128) -> tuple[int, int]:
    """Sums of each half modulo 2^64: a digest of a set of rows or events that does not depend on their order."""
    high, low = hashes.sum(axis=1, dtype=np.uint64).tolist()
    return high, low


def add_sums(*sums: Sequence[int]) -> tuple[int, int]:
    """Digests of disjoint sets to the digest of all."""
    return sum(s[0] for s in sums) % _MODULUS, sum(s[1] for s in sums) % _MODULUS


def subtract_sums(whole: Sequence[int], part: Sequence[int]) -> tuple[int, int]:
    """The digest of a set without one of its subsets."""
    return (whole[0] - part[0]) % _MODULUS, (whole[1] - part[1]) % _MODULUS


def ids_of_hashes(hashes: Hash128) -> pl.Series:
    """The hashes as 32 hexadecimal digits, `hash_hi` first: column `record_id`, if they are those of rows."""
    rows = hashes.shape[1]
    digits = binascii.hexlify(hashes.T.astype(">u8", order="C").data)
    offsets = np.arange(0, ID_DIGITS * rows + 1, ID_DIGITS, dtype=np.int64)
    texts = pa.LargeStringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(digits))
    return pl.Series("record_id", texts, dtype=pl.String)


def hashes_of_ids(ids: pl.Series) -> Hash128:
    """The inverse of `ids_of_hashes`; what follows the 32nd digit is ignored. Raises `ValueError` for other texts."""
    lengths = ids.str.len_bytes()
    texts = ids.str.slice(0, ID_DIGITS) if (lengths > ID_DIGITS).any() else ids
    no_ids = f"column {ids.name!r} holds texts that do not begin with {ID_DIGITS} hexadecimal digits"
    if ids.null_count() or (lengths < ID_DIGITS).any():
        raise ValueError(no_ids)
    try:
        numbers = np.frombuffer(binascii.unhexlify(texts.str.join("").item()), ">u8").reshape(-1, 2)
    except ValueError as error:  # other characters
        raise ValueError(no_ids) from error
    return numbers.T.astype(np.uint64, order="C")


def distinct_hashes(ids: pl.Series, hashes: Hash128) -> Hash128:
    """The hashes of ids, other where more follows the digits: duplicates that were kept differ from the original."""
    longer = (ids.str.len_bytes() > ID_DIGITS).to_numpy()
    if not longer.any():
        return hashes
    distinct = hashes.copy()
    distinct[:, longer] ^= text_hashes(ids.filter(longer))
    return distinct


def split_fraction(hashes: Hash128, salt: str = "") -> np.ndarray:
    """A number in [0, 1) for each record: float64, uniform, fixed by `salt` and the hashes of its id.

    Duplicates that were kept (`…-1`) have the number of their original, whose hashes these are (`hashes_of_ids`).
    """
    salts = seeds(salt)
    mixed = hashes[0] ^ salts[0]
    scratch = np.empty_like(mixed)
    _mix(mixed, _MIXERS[:, 0], scratch)
    mixed ^= hashes[1] ^ salts[1]
    _mix(mixed, _MIXERS[:, 1], scratch)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def partition_of(hash_hi: np.ndarray, count: int) -> np.ndarray:
    """The partition of each key, given by 64 bits of its hash: rows of different blocks meet in it."""
    return ((hash_hi >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)).astype(np.int64)


def write_partitions(frame: pl.DataFrame, partition: np.ndarray, count: int, uri: str) -> None:
    """Write the rows of `frame`, of which `partition` holds the number, from 0 and below `count`.

    The file is Arrow's, with one record batch for each partition: a partition is read without the others.
    """
    rows_in_order = frame[np.argsort(partition, kind="stable")] if count > 1 else frame
    ends = np.cumsum(np.bincount(partition, minlength=count))
    arrays = [column.to_arrow(compat_level=pl.CompatLevel.oldest()) for column in rows_in_order]
    rows = pa.RecordBatch.from_arrays(arrays, names=frame.columns)
    with storage.open_output(uri) as file, pa.ipc.new_file(file, rows.schema) as writer:
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            writer.write_batch(rows.slice(start, end - start))


def read_partition(uris: Sequence[str], number: int) -> Iterator[pl.DataFrame]:
    """The rows of partition `number` of each file, in the order in which they were written."""
    for uri in uris:
        with storage.open_input(uri) as file:
            yield pl.DataFrame(pa.ipc.open_file(file).get_batch(number))


@dataclass(frozen=True)
class RowSetDigest:
    """Number of records, and the sums of both halves of their hashes: whatever their order and division into files."""

    rows: int = 0
    sums: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, record: Hash128, frame: pl.DataFrame, columns: Sequence[str]) -> RowSetDigest:
        """Of the records whose ids have the hashes `record`, and whose content `columns` of `frame` are."""
        no_time = np.zeros(frame.height, np.int64)
        return cls(frame.height, hash_sums(event_hashes(record, no_time, content_hashes(frame, columns))))

    def merge(self, other: RowSetDigest) -> RowSetDigest:
        """Of the records of both, which have none in common."""
        return RowSetDigest(self.rows + other.rows, add_sums(self.sums, other.sums))

    def hexdigest(self, schema: str) -> str:
        """SHA-256, in hexadecimal, of the sums and a description of the columns."""
        return hashlib.sha256(f"{schema}\0{self.rows}\0{self.sums[0]}\0{self.sums[1]}".encode()).hexdigest()


@cache
def seeds(name: str) -> np.ndarray:
    """Two numbers that a text stands for, one for each half."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64).reshape(2, 1)


def _mix(values: np.ndarray, mixers: np.ndarray, scratch: np.ndarray) -> None:
    """Mix the bits of each value (uint64), in place. Bijective. `scratch` has the same shape."""
    first, multiplier, second, other_multiplier, third = mixers
    values ^= np.right_shift(values, first, out=scratch)
    values *= multiplier
    values ^= np.right_shift(values, second, out=scratch)
    values *= other_multiplier
    values ^= np.right_shift(values, third, out=scratch)


def _blocks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _BLOCK_ROWS):
        yield slice(start, start + _BLOCK_ROWS)


def _mix_in(hashes: Hash128, columns: Sequence[np.ndarray]) -> None:
    """Mix the bits of each column into the hashes, in place, one column after the other."""
    for block in _blocks(hashes.shape[1]):
        values = hashes[:, block]
        scratch = np.empty_like(values)
        for bits in columns:
            values ^= bits[..., block]
            values += _STEPS
            _mix(values, _MIXERS, scratch)


def _column_bits(column: pl.Series) -> np.ndarray:
    """64 bits a value: uint64, shape (rows,), for texts and where there are nulls (2, rows)."""
    if column.dtype == pl.String:
        bits = _text_bits(column.fill_null(""))
    elif column.dtype.is_float():
        numbers = column.cast(pl.Float64).fill_null(0.0).to_numpy() + 0.0  # turns -0.0 into 0.0
        numbers[np.isnan(numbers)] = np.nan
        bits = numbers.view(np.uint64)
    elif column.dtype == pl.UInt64:
        bits = column.fill_null(0).to_numpy()
    elif column.dtype.is_integer() or column.dtype == pl.Boolean:
        bits = column.cast(pl.Int64).fill_null(0).to_numpy().view(np.uint64)
    elif isinstance(column.dtype, pl.Datetime):
        bits = column.dt.timestamp("us").fill_null(0).to_numpy().view(np.uint64)
    else:
        raise ValueError(f"column {column.name}: type {column.dtype} cannot be part of a record id")
    # No value has both of these bit patterns: a value's are the same in both halves.
    return np.where(column.is_null().to_numpy(), _NULLS, bits) if column.null_count() else bits


def _text_bits(column: pl.Series) -> Hash128:
    """Both halves over the length and the UTF-8 bytes of each text, eight at a time."""
    lengths = column.str.len_bytes().to_numpy().astype(np.uint64)
    hashes = np.stack([lengths, lengths])
    for here, words in _words(column):
        if len(here) == len(lengths):
            _mix_in(hashes, [words])
        else:
            part = hashes.take(here, axis=1)
            _mix_in(part, [words])
            for half, mixed in zip(hashes, part, strict=True):
                half[here] = mixed
    return hashes


def _words(column: pl.Series) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The texts' bytes, eight at a time: which texts go on so far, and their next bytes as little-endian numbers."""
    array = column.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.large_string())
    _, offsets_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    padded = np.concatenate([data, np.zeros(_WORD_BYTES, np.uint8)])
    at: np.ndarray = np.ndarray(len(padded) - _WORD_BYTES + 1, "<u8", buffer=padded, strides=(1,))
    starts, lengths = offsets[:-1], np.diff(offsets)
    for done in range(0, int(lengths.max(initial=0)), _WORD_BYTES):
        here = np.flatnonzero(lengths > done)
        unused = _WORD_BYTES - np.minimum(lengths[here] - done, _WORD_BYTES)
        words = at[starts[here] + done].astype(np.uint64)
        yield here, words & (np.uint64(_MODULUS - 1) >> (unused * 8).astype(np.uint64))
