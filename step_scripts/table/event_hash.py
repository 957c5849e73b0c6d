"""128-bit hashes of record ids, contents and events, computed in columns.

They are the same on every machine and with every version of the libraries, because digests made of them are stored. A
null adds nothing to a content's hash, so a column that is added later, and is null in older rows, changes no hash.
Hashes tell different records apart; they are no protection against forgery.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import polars as pl

Lanes = tuple[np.ndarray, np.ndarray]  # the two 64-bit halves of 128-bit hashes, uint64, one value a row

_MODULUS = 1 << 64
_BLOCK_ROWS = 1 << 14  # intermediate arrays stay in the CPU's cache
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORD_BYTES = 8


def content_hashes(frame: pl.DataFrame, columns: Sequence[str]) -> Lanes:
    """Hashes of the values of `columns`. Their order, and columns that the frame lacks, make no difference."""
    present = [name for name in columns if name in frame.columns]
    lanes = _empty_lanes(frame.height)
    _add_columns(lanes, [part for name in present for part in _columns(frame[name], _seed(name))])
    return lanes


def text_hashes(column: pl.Series) -> Lanes:
    """Hashes of texts without nulls, by their UTF-8 bytes."""
    lanes = _empty_lanes(len(column))
    _add_texts(lanes, column, _seed("text"))
    return lanes


def event_hashes(record: Lanes, event_time: np.ndarray, content: Lanes, deleted: np.ndarray | None = None) -> Lanes:
    """Hashes of events: record id, time (int64, microseconds since 1970), content, and whether it is a deletion."""
    lanes = _empty_lanes(len(event_time))
    if deleted is not None and not deleted.any():
        deleted = None
    for block in _blocks(len(event_time)):
        moment = event_time[block].view(np.uint64) ^ _seed("event time")
        if deleted is not None:
            moment[deleted[block]] ^= _seed("deleted")
        _mix(moment)
        for lane, (hashes, ids, contents) in enumerate(zip(lanes, record, content, strict=True)):
            mixed = _mix(ids[block] ^ _seed(f"record {lane}"))
            mixed += moment
            mixed ^= _mix(contents[block] ^ _seed(f"content {lane}"))
            hashes[block] = _mix(mixed)
    return lanes


def lane_sums(lanes: Lanes) -> tuple[int, int]:
    """Sums modulo 2^64 of each half: a digest of a set of events that does not depend on their order."""
    return int(lanes[0].sum(dtype=np.uint64)), int(lanes[1].sum(dtype=np.uint64))


def add_sums(*sums: Sequence[int]) -> tuple[int, int]:
    """Digests of disjoint sets to the digest of all."""
    return sum(s[0] for s in sums) % _MODULUS, sum(s[1] for s in sums) % _MODULUS


def subtract_sums(whole: Sequence[int], part: Sequence[int]) -> tuple[int, int]:
    """The digest of a set without one of its subsets."""
    return (whole[0] - part[0]) % _MODULUS, (whole[1] - part[1]) % _MODULUS


@cache
def _seed(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))


def _empty_lanes(rows: int) -> Lanes:
    return np.zeros(rows, np.uint64), np.zeros(rows, np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Splitmix64's finalizer (Steele, Lea, Flood 2014), in place: a bijection."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _blocks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _BLOCK_ROWS):
        yield slice(start, min(start + _BLOCK_ROWS, rows))


class _Column(NamedTuple):
    """One value a row: uint64, int64 or float64. Where `null` is true there is none."""

    values: np.ndarray
    seed: np.uint64
    null: np.ndarray | None = None


def _add_columns(lanes: Lanes, columns: Sequence[_Column]) -> None:
    """Add the hash of each value. The second half is made from the first by another nonlinear function."""
    for values, seed, null in columns:
        floats = values.dtype == np.float64
        any_nan = floats and bool(np.isnan(values.sum()))  # or infinities of both signs
        for block in _blocks(len(values)):
            words = values[block]
            if floats:
                words = words + 0.0  # turns -0.0 into 0.0, which equals it
            if any_nan:
                words[np.isnan(words)] = np.nan  # all NaN are alike
            mixed = _mix(words.view(np.uint64) ^ seed)
            if null is not None:
                mixed[null[block]] = 0
            lanes[0][block] += mixed
            mixed ^= mixed >> np.uint64(32)
            mixed *= np.uint64(0xD1B54A32D192ED03)
            mixed ^= mixed >> np.uint64(29)
            lanes[1][block] += mixed


def _columns(column: pl.Series, seed: np.uint64) -> list[_Column]:
    null = column.is_null().to_numpy() if column.null_count() else None
    if column.dtype == pl.String:
        first, second = text_hashes(column.fill_null(""))
        return [_Column(first, seed, null), _Column(second, seed ^ _GOLDEN, null)]
    numbers = column.cast(pl.Float64) if column.dtype.is_float() else column.to_physical().cast(pl.Int64)
    return [_Column(numbers.fill_null(0).to_numpy(), seed, null)]


def _text_bytes(column: pl.Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes of all texts, where each text begins, and how many it has."""
    array = column.to_arrow(compat_level=pl.CompatLevel.oldest())
    _, offsets_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    return data, offsets[:-1], np.diff(offsets)


def _words_of_equal_lengths(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
    """Texts of one length, a positive multiple of 8 bytes, as little-endian numbers of shape (texts, length / 8)."""
    longest = int(lengths.max(initial=0))
    if not longest or longest % _WORD_BYTES or longest != lengths.min():
        return None
    return data[starts[0] : starts[-1] + longest].view("<u8").reshape(len(lengths), longest // _WORD_BYTES)


def _padded(data: np.ndarray) -> np.ndarray:
    """The bytes, and 8 more, so that a word can be read at each of them."""
    return np.concatenate([data, np.zeros(_WORD_BYTES, np.uint8)])


def _words_at(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Up to 8 bytes from each start as a little-endian number. `data` is padded."""
    windows: np.ndarray = np.ndarray(len(data) - _WORD_BYTES + 1, "<u8", buffer=data, strides=(1,))
    words = windows[starts].astype(np.uint64)
    used = np.minimum(lengths, _WORD_BYTES).astype(np.uint64)
    bits = (np.uint64(_WORD_BYTES) - used) * np.uint64(8)
    # A shift by 64 is undefined; texts that have ended have no bits.
    return np.where(used > 0, words & (np.uint64(_MODULUS - 1) >> np.minimum(bits, np.uint64(63))), np.uint64(0))


def _add_texts(lanes: Lanes, column: pl.Series, seed: np.uint64) -> None:
    """Add the lengths, then the k-th eight bytes of all texts that are long enough, for k = 0, 1, ..."""
    data, starts, lengths = _text_bytes(column)
    equal = _words_of_equal_lengths(data, starts, lengths)
    if equal is not None:
        _add_columns(
            lanes, [_Column(lengths, seed), *(_Column(w, _position_seed(seed, k)) for k, w in enumerate(equal.T))]
        )
        return
    _add_columns(lanes, [_Column(lengths, seed)])
    data = _padded(data)
    for position in range(-(-int(lengths.max(initial=0)) // _WORD_BYTES)):
        done = position * _WORD_BYTES
        here = np.flatnonzero(lengths > done)
        words = _words_at(data, starts[here] + done, lengths[here] - done)
        part = lanes[0][here], lanes[1][here]
        _add_columns(part, [_Column(words, _position_seed(seed, position))])
        lanes[0][here], lanes[1][here] = part


def _position_seed(seed: np.uint64, position: int) -> np.uint64:
    return np.uint64((int(seed) + (position + 1) * int(_GOLDEN)) % _MODULUS)
