"""A digest of a set of records that does not depend on their order, nor on how they are divided into files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from step_scripts.table.event_hash import Lanes, add_sums, content_hashes, event_hashes, lane_sums, text_hashes


@dataclass(frozen=True)
class RowSetDigest:
    """Number of records, and the sums of both halves of their 128-bit hashes, modulo 2^64."""

    rows: int = 0
    sums: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, frame: pl.DataFrame, columns: Sequence[str], ids: Lanes | None = None) -> RowSetDigest:
        """Of the column `record_id` and `columns`, in any order.

        `ids`: numbers that stand for the record ids, if there are any; else the ids are hashed.
        """
        no_time = np.zeros(frame.height, np.int64)
        record = text_hashes(frame["record_id"]) if ids is None else ids
        hashes = event_hashes(record, no_time, content_hashes(frame, columns))
        return cls(frame.height, lane_sums(hashes))

    def merge(self, other: RowSetDigest) -> RowSetDigest:
        """Of the records of both, which have none in common."""
        return RowSetDigest(self.rows + other.rows, add_sums(self.sums, other.sums))

    def hexdigest(self, schema: str) -> str:
        """SHA-256, in hexadecimal, of the sums and a description of the columns."""
        return hashlib.sha256(f"{schema}\0{self.rows}\0{self.sums[0]}\0{self.sums[1]}".encode()).hexdigest()
