"""Record ids: the 128-bit hash of chosen columns of a row (`row_hashes`), in 32 hexadecimal digits."""

from __future__ import annotations

import binascii
from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from step_scripts.table.hashes import Hash128, mix, row_hashes, seeds, text_hashes

ID_DIGITS = 32


def record_ids(frame: pl.DataFrame, columns: Sequence[str]) -> pl.Series:
    """Ids of the rows over `columns`, name `record_id`. See `row_hashes`."""
    return ids_of_hashes(row_hashes(frame, columns))


def ids_of_hashes(hashes: Hash128) -> pl.Series:
    """The hashes as 32 hexadecimal digits, `hash_hi` first."""
    rows = len(hashes[0])
    digits = binascii.hexlify(np.column_stack(hashes).astype(">u8", order="C").data)
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
    array = texts.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.large_string())
    _, _, data = array.buffers()
    start = array.offset * ID_DIGITS
    digits = memoryview(data)[start : start + len(array) * ID_DIGITS] if len(array) else b""
    try:
        numbers = np.frombuffer(binascii.unhexlify(digits), ">u8").reshape(-1, 2)
    except binascii.Error as error:
        raise ValueError(no_ids) from error
    return numbers[:, 0].astype(np.uint64), numbers[:, 1].astype(np.uint64)


def distinct_hashes(ids: pl.Series, hashes: Hash128) -> Hash128:
    """The hashes of ids, other where more follows the digits: duplicates that were kept differ from the original."""
    longer = (ids.str.len_bytes() > ID_DIGITS).to_numpy()
    if not longer.any():
        return hashes
    distinct = hashes[0].copy(), hashes[1].copy()
    for half, suffixed in zip(distinct, text_hashes(ids.filter(longer)), strict=True):
        half[longer] ^= suffixed
    return distinct


def split_fraction(ids: pl.Series, salt: str = "") -> np.ndarray:
    """A number in [0, 1) for each record id: float64, uniform, fixed by the id and `salt`.

    Only the first 32 digits count: duplicates that were kept (`…-1`) get the number of their original.
    """
    return split_fraction_of_hashes(hashes_of_ids(ids), salt)


def split_fraction_of_hashes(hashes: Hash128, salt: str = "") -> np.ndarray:
    """`split_fraction` of the ids that these are the hashes of."""
    salts = seeds(salt)
    mixed = hashes[0] ^ salts[0]
    scratch = np.empty_like(mixed)
    mix(mixed, 0, scratch)
    mixed ^= hashes[1] ^ salts[1]
    mix(mixed, 1, scratch)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
