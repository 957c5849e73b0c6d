"""Record ids: fixed values, and the rules that hold for all tables."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_scripts.table.hashes import (
    distinct_hashes,
    hashes_of_ids,
    ids_of_hashes,
    row_hashes,
    split_fraction,
)
from tests.feature_rows import record_ids

TYPES: dict[str, Any] = {
    "price": pl.Float64,
    "year": pl.Int64,
    "sold": pl.Boolean,
    "city": pl.String,
    "at": pl.Datetime("us", "UTC"),
}
COLUMNS = list(TYPES)

cells = st.fixed_dictionaries(
    {
        "price": st.none() | st.floats(allow_nan=False),
        "year": st.none() | st.integers(-(2**63), 2**63 - 1),
        "sold": st.none() | st.booleans(),
        "city": st.none() | st.text(max_size=30),
        "at": st.none() | st.datetimes(timezones=st.just(UTC), min_value=datetime(1700, 1, 1)),
    }
)


def frame_of(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=TYPES)


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return record_ids(frame_of(rows), COLUMNS).to_list()


def test_fixed_values() -> None:
    """These never change: feature stores hold them."""
    rows = [
        {"price": 2.0, "year": 1999, "sold": True, "city": "Köln", "at": datetime(2024, 5, 1, 12, tzinfo=UTC)},
        {"price": -0.1, "year": -1, "sold": False, "city": "", "at": datetime(1969, 12, 31, 23, 59, 59, 1, UTC)},
        {"price": None, "year": None, "sold": None, "city": None, "at": None},
        {"price": 1e300, "year": 2**62, "sold": True, "city": "a text of more than sixteen bytes", "at": None},
    ]
    assert ids(rows) == GOLDEN_IDS
    golden = hashes_of_ids(pl.Series(GOLDEN_IDS))
    assert split_fraction(golden).tolist() == GOLDEN_FRACTIONS
    assert split_fraction(golden, "salt").tolist() == GOLDEN_SALTED


def test_type_of_the_schema_decides_not_the_spelling() -> None:
    whole = pl.DataFrame({"price": [2, 3]}).cast({"price": pl.Float64})
    assert (
        record_ids(whole, ["price"]).to_list() == record_ids(pl.DataFrame({"price": [2.0, 3.0]}), ["price"]).to_list()
    )


def test_equal_values_of_other_forms() -> None:
    berlin = datetime(2024, 5, 1, 14, tzinfo=timezone(timedelta(hours=2)))
    zero = [{**dict.fromkeys(COLUMNS), "price": x, "at": berlin} for x in (0.0, -0.0)]
    assert len(set(ids(zero))) == 1
    milliseconds = frame_of(zero).with_columns(pl.col("at").dt.cast_time_unit("ms"))
    assert record_ids(milliseconds, COLUMNS).to_list() == ids(zero)


def test_null_is_not_its_stand_in() -> None:
    rows = [dict.fromkeys(COLUMNS)]
    for name, value in {
        "price": 0.0,
        "year": 0,
        "sold": False,
        "city": "",
        "at": datetime(1970, 1, 1, tzinfo=UTC),
    }.items():
        rows.append({**dict.fromkeys(COLUMNS), name: value})
    assert len(set(ids(rows))) == len(rows)


@given(st.lists(cells, max_size=40), st.randoms(use_true_random=False))
def test_id_belongs_to_the_row_not_to_its_place(rows: list[dict[str, Any]], rng: random.Random) -> None:
    order = list(range(len(rows)))
    rng.shuffle(order)
    expected = ids(rows)
    assert ids([rows[i] for i in order]) == [expected[i] for i in order]


@given(st.lists(cells, min_size=1, max_size=40), st.integers(0, 40))
def test_cutting_the_table_changes_nothing(rows: list[dict[str, Any]], cut: int) -> None:
    frame = frame_of(rows)
    pieces = pl.concat([record_ids(frame[:cut], COLUMNS), record_ids(frame[cut:], COLUMNS)])
    assert pieces.to_list() == ids(rows)


@given(cells, cells)
def test_equal_rows_and_only_those_have_equal_ids(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second, again = ids([one, other, dict(one)])
    assert (first == second) == (one == other)
    assert first == again


@given(cells, cells, st.sampled_from(COLUMNS))
def test_every_changed_cell_changes_the_id(row: dict[str, Any], other: dict[str, Any], column: str) -> None:
    changed = {**row, column: other[column]}
    first, second = ids([row, changed])
    assert (first == second) == (row == changed)


def test_values_of_two_columns_are_not_interchangeable() -> None:
    frame = pl.DataFrame({"a": [1, 2], "b": [2, 1]})
    assert record_ids(frame, ["a", "b"]).n_unique() == 2


def test_blocks_of_large_tables_agree_with_single_rows() -> None:
    frame = pl.DataFrame({"a": np.arange(40_000), "b": np.arange(40_000) % 7 / 2})
    whole = record_ids(frame, ["a", "b"])
    assert whole.n_unique() == 40_000
    for row in (0, 16_383, 16_384, 39_999):
        assert record_ids(frame[row], ["a", "b"]).item() == whole[row]


def test_unsupported_type_is_named() -> None:
    with pytest.raises(ValueError, match="column tags: type List"):
        record_ids(pl.DataFrame({"tags": [[1]]}), ["tags"])


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=20))
def test_ids_and_hashes_are_inverse(pairs: list[tuple[int, int]]) -> None:
    hashes = np.array(pairs, dtype=np.uint64).reshape(-1, 2).T
    ids = ids_of_hashes(hashes)
    assert hashes_of_ids(ids).tolist() == hashes.tolist()
    assert ids.to_list() == [f"{a:016x}{b:016x}" for a, b in pairs]


@pytest.mark.parametrize("bad", ["abc", "z" * 32, None])
def test_other_texts_are_no_ids(bad: str | None) -> None:
    with pytest.raises(ValueError):
        hashes_of_ids(pl.Series("record_id", [bad], dtype=pl.String))


def test_fractions_are_uniform_and_ignore_suffixes() -> None:
    record = record_ids(pl.DataFrame({"a": np.arange(100_000)}), ["a"])
    fractions = split_fraction(hashes_of_ids(record))
    assert fractions.dtype == np.float64
    assert fractions.min() >= 0
    assert fractions.max() < 1
    counts, _ = np.histogram(fractions, bins=20, range=(0, 1))
    # Five standard deviations of a binomial count; the data are fixed, so this passes always or never.
    assert abs(counts - 5000).max() < 5 * np.sqrt(5000)
    assert (split_fraction(hashes_of_ids(record + "-12")) == fractions).all()
    assert abs(np.corrcoef(fractions, split_fraction(hashes_of_ids(record), "other"))[0, 1]) < 0.02


def test_a_suffix_makes_another_record() -> None:
    record = pl.Series("record_id", [GOLDEN_IDS[0], GOLDEN_IDS[0] + "-1", GOLDEN_IDS[0] + "-2", GOLDEN_IDS[1]])
    hashes = distinct_hashes(record, hashes_of_ids(record))
    assert all(len(set(half.tolist())) == 4 for half in hashes)
    alone = record[1:2]
    for half, of_one, of_ids in zip(
        hashes, distinct_hashes(alone, hashes_of_ids(alone)), hashes_of_ids(record), strict=True
    ):
        assert of_one[0] == half[1]
        assert half[[0, 3]].tolist() == of_ids[[0, 3]].tolist()


def test_both_halves_are_independent() -> None:
    hashes = row_hashes(pl.DataFrame({"a": np.arange(100_000)}), ["a"])
    first, second = (half.astype(np.float64) / 2.0**64 for half in hashes)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


GOLDEN_IDS = [
    "17fe18d06cae27ab31acb554f7a90b5e",
    "a8fd98e010c39e71050dbe2166d93d65",
    "646c1826e3743a4d6c140010a1ab69dd",
    "7511d10729a7cb217437bfcf6bdc49ca",
]
GOLDEN_FRACTIONS = [
    0.03531266899637109,
    0.3046427171732987,
    0.23362877511128388,
    0.9994448470504673,
]
GOLDEN_SALTED = [
    0.33353294719159055,
    0.7618451179816776,
    0.8921579100642923,
    0.2780403472941745,
]
