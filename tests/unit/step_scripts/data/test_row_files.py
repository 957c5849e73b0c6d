"""Ids of different blocks that meet in partitions, and the duplicates that are found there."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from step_scripts.data.row_files import find_duplicates, first_duplicates, without_duplicates, write_ids
from step_scripts.table.hashes import ids_of_hashes, read_partition, row_hashes, write_partitions

BLOCKS = st.lists(st.lists(st.integers(0, 6), max_size=12), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(blocks=BLOCKS, count=st.integers(7, 9))
def test_every_row_is_in_its_partition_in_the_order_of_the_blocks(blocks: list[list[int]], count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        uris = [f"{folder}/{number}.arrow" for number in range(len(blocks))]
        for block, (uri, keys) in enumerate(zip(uris, blocks, strict=True)):
            rows = pl.DataFrame(
                {"block": [block] * len(keys), "row": range(len(keys))}, schema_overrides={"row": pl.UInt32}
            )
            write_partitions(rows, np.array(keys, np.int64), count, uri)
        for number in range(count):
            found = [row for frame in read_partition(uris, number) for row in frame.rows()]
            assert found == [(b, r) for b, keys in enumerate(blocks) for r, key in enumerate(keys) if key == number]


@settings(max_examples=50, deadline=None)
@given(blocks=BLOCKS.filter(any), partitions=st.integers(1, 5))
def test_all_but_the_first_of_equal_rows_are_duplicates(blocks: list[list[int]], partitions: int) -> None:
    frames = [pl.DataFrame({"value": values}, schema={"value": pl.Int64}) for values in blocks]
    with tempfile.TemporaryDirectory() as folder:
        ids = []
        for fragment, frame in enumerate(frames):
            lines = pl.Series(range(10, 10 + frame.height), dtype=pl.UInt32)
            ids.append(f"{folder}/ids-{fragment}.arrow")
            write_ids(ids[-1], fragment, row_hashes(frame, ["value"]), lines, partitions)
        uris = [f"{folder}/duplicates-{number}.parquet" for number in range(partitions)]
        counts = sum((Counter(find_duplicates(ids, n, uri)) for n, uri in enumerate(uris)), Counter[int]())
        seen: dict[int, list[tuple[int, int]]] = {}
        expected = []
        for fragment, values in enumerate(blocks):
            for row, value in enumerate(values):
                before = seen.setdefault(value, [])
                if before:
                    expected.append((fragment, row, row + 10, len(before), before[0][0], before[0][1] + 10))
                before.append((fragment, row))
        assert counts == Counter(fragment for fragment, *_ in expected)
        written = [uri for uri in uris if Path(uri).exists()]
        if not expected:
            assert written == []
            return
        assert first_duplicates(written, 1000).rows() == expected
        assert first_duplicates(written, 2).rows() == expected[:2]
        stored = [frame.with_columns(ids_of_hashes(row_hashes(frame, ["value"]))) for frame in frames]
        kept = pl.concat(without_duplicates(f, written, n, keep=True) for n, f in enumerate(stored))
        assert kept.height == kept["record_id"].n_unique() == sum(map(len, blocks))
        unique = pl.concat(without_duplicates(f, written, n, keep=False) for n, f in enumerate(stored))
        assert unique["value"].to_list() == list(seen)
