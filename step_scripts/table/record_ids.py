"""Record ids: a 128-bit hash of chosen columns of a table, the same on every machine and with every library version.

Two independent 64-bit lanes mix one column after the other (lane 1: splitmix64; lane 2: the finalizer of MurmurHash3),
in numpy. Nothing here uses a library's own hash function: those change between versions. The hash tells records apart;
it is no protection against somebody who constructs collisions.
"""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from step_scripts.table.event_hash import text_hashes

ID_DIGITS = 32
_BLOCK_ROWS = 1 << 14  # intermediate arrays stay in the CPU's cache
_SEEDS = (np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344))  # digits of pi
_NULLS = (np.uint64(0xA4093822299F31D0), np.uint64(0x082EFA98EC4E6C89))
# Shift, multiplier, shift, multiplier, shift.
_MIXERS = (
    tuple(map(np.uint64, (30, 0xBF58476D1CE4E5B9, 27, 0x94D049BB133111EB, 31))),
    tuple(map(np.uint64, (33, 0xFF51AFD7ED558CCD, 33, 0xC4CEB9FE1A85EC53, 33))),
)
_STEPS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03))


def record_lanes(frame: pl.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Hashes of the rows over `columns`, in that order: uint64, shape (2, rows).

    Equal values of one column type hash equally: 0.0 and -0.0, all NaNs, one instant in any time unit or zone. Null
    differs from every value. Raises `ValueError` for a column whose type is none of integer, float, bool, string,
    datetime, and `polars.exceptions.ColumnNotFoundError` for one that is not there.
    """
    bits = [_column_bits(frame[name]) for name in columns]
    lanes = np.empty((2, frame.height), np.uint64)
    for start in range(0, frame.height, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, frame.height)
        scratch = np.empty(stop - start, np.uint64)
        for lane in (0, 1):
            hashes = lanes[lane, start:stop]
            hashes[:] = _SEEDS[lane]
            for column in bits:
                hashes ^= column[lane][start:stop]
                hashes += _STEPS[lane]
                _mix(hashes, lane, scratch)
    return lanes


def record_ids(frame: pl.DataFrame, columns: Sequence[str]) -> pl.Series:
    """Ids of the rows over `columns`: 32 hexadecimal digits each, name `record_id`. See `record_lanes`."""
    return ids_of_lanes(record_lanes(frame, columns))


def ids_of_lanes(lanes: np.ndarray) -> pl.Series:
    """The two lanes as 32 hexadecimal digits, the first lane first."""
    rows = lanes.shape[1]
    digits = binascii.hexlify(lanes.T.astype(">u8", order="C").data)
    offsets = np.arange(0, ID_DIGITS * rows + 1, ID_DIGITS, dtype=np.int64)
    texts = pa.LargeStringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(digits))
    return pl.Series("record_id", texts, dtype=pl.String)


def lanes_of_ids(ids: pl.Series) -> np.ndarray:
    """The inverse of `ids_of_lanes`; what follows the 32nd digit is ignored. Raises `ValueError` for any other text."""
    lengths = ids.str.len_bytes()
    texts = ids.str.slice(0, ID_DIGITS) if (lengths > ID_DIGITS).any() else ids
    no_ids = f"column {ids.name!r} holds texts that do not begin with {ID_DIGITS} hexadecimal digits"
    if ids.null_count() or (lengths < ID_DIGITS).any():
        raise ValueError(no_ids)
    array = texts.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.large_string())
    _, _, data = array.buffers()
    start = array.offset * ID_DIGITS
    digits = memoryview(data)[start : start + len(array) * ID_DIGITS] if len(array) else b""
    try:
        numbers = binascii.unhexlify(digits)
    except binascii.Error as error:
        raise ValueError(no_ids) from error
    return np.frombuffer(numbers, ">u8").reshape(-1, 2).T.astype(np.uint64)


def distinct_lanes(ids: pl.Series, lanes: np.ndarray) -> np.ndarray:
    """The lanes of ids, other where digits are followed by more: duplicates that were kept differ from the original."""
    longer = (ids.str.len_bytes() > ID_DIGITS).to_numpy()
    if not longer.any():
        return lanes
    lanes = lanes.copy()
    lanes[:, longer] ^= np.stack(text_hashes(ids.filter(longer)))
    return lanes


def split_fraction(ids: pl.Series, salt: str = "") -> np.ndarray:
    """A number in [0, 1) for each record id: float64, uniform, fixed by the id and `salt`.

    Only the first 32 digits count: duplicates that were kept (`…-1`) get the number of their original.
    """
    return split_fraction_of_lanes(lanes_of_ids(ids), salt)


def split_fraction_of_lanes(lanes: np.ndarray, salt: str = "") -> np.ndarray:
    """`split_fraction` of the ids whose lanes these are."""
    salts = np.frombuffer(hashlib.blake2b(salt.encode(), digest_size=16).digest(), "<u8").astype(np.uint64)
    hashes = lanes[0] ^ salts[0]
    scratch = np.empty_like(hashes)
    _mix(hashes, 0, scratch)
    hashes ^= lanes[1] ^ salts[1]
    _mix(hashes, 1, scratch)
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: np.ndarray, lane: int, scratch: np.ndarray) -> None:
    """Mix the bits of each value, in place. Bijective."""
    first, multiplier, second, other_multiplier, third = _MIXERS[lane]
    values ^= np.right_shift(values, first, out=scratch)
    values *= multiplier
    values ^= np.right_shift(values, second, out=scratch)
    values *= other_multiplier
    values ^= np.right_shift(values, third, out=scratch)


def _column_bits(column: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """For each lane, 64 bits a value. The same for both, other than for texts and nulls."""
    if column.dtype == pl.String:
        return _text_bits(column)
    if column.dtype.is_float():
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
    if not column.null_count():
        return bits, bits
    null = column.is_null().to_numpy()
    # No value has both of these bit patterns: a value's are the same in both lanes.
    return np.where(null, _NULLS[0], bits), np.where(null, _NULLS[1], bits)


def _text_bits(column: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Both lanes over the length and the UTF-8 bytes of each text, eight at a time."""
    array = column.fill_null("").to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.large_string())
    _, offsets_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([data, np.zeros(8, np.uint8)]), 8)
    starts, lengths = offsets[:-1], np.diff(offsets)
    lanes = (lengths.astype(np.uint64), lengths.astype(np.uint64))
    for offset in range(0, int(lengths.max(initial=0)), 8):
        longer = np.flatnonzero(lengths > offset)
        words = windows[starts[longer] + offset].view("<u8").ravel().astype(np.uint64)
        unused = 8 - np.minimum(lengths[longer] - offset, 8)
        words &= np.uint64(2**64 - 1) >> (unused * 8).astype(np.uint64)
        for lane, hashes in enumerate(lanes):
            mixed = (hashes[longer] ^ words) + _STEPS[lane]
            _mix(mixed, lane, np.empty_like(mixed))
            hashes[longer] = mixed
    if column.null_count():
        null = column.is_null().to_numpy()
        return np.where(null, _NULLS[0], lanes[0]), np.where(null, _NULLS[1], lanes[1])
    return lanes
