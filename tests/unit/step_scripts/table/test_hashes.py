"""Hashes of contents, texts and events, and digests of sets of them. Record ids: `test_record_ids`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from step_scripts.table.hashes import RowSetDigest, content_hashes, event_hashes, text_hashes

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


def test_hashes_never_change() -> None:
    """Digests are stored: these values must stay what they are, on every machine and with every version."""
    frame = pl.DataFrame(
        {"a": [1, None], "b": [0.5, -0.0], "c": ["ä" * 9, ""], "d": [True, None], "e": [NOON, NOON]},
    )
    record = text_hashes(pl.Series(["0" * 31 + "1", "short"]))
    events = event_hashes(record, np.array([-1, 10**15]), content_hashes(frame, "abcde"), np.array([False, True]))
    assert [[int(v) for v in lane] for lane in events] == GOLDEN


GOLDEN = [[10206927493761548384, 1876364968294426186], [14339418805122133352, 7744465667331591254]]
_texts = st.text(max_size=20)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(_texts, _texts | st.none(), st.floats() | st.none()), min_size=1, max_size=8))
def test_a_rows_hash_depends_on_the_row_alone(rows: list[tuple[Any, ...]]) -> None:
    frame = pl.DataFrame(rows, schema={"id": pl.String, "text": pl.String, "number": pl.Float64}, orient="row")
    ids, content = text_hashes(frame["id"]), content_hashes(frame, ["text", "number"])
    swapped = content_hashes(frame.select("number", "text"), ["number", "text", "absent"])
    for n in range(frame.height):
        one = frame[n : n + 1]
        assert [int(v[n]) for v in ids] == [int(v[0]) for v in text_hashes(one["id"])]
        assert [int(v[n]) for v in content] == [int(v[0]) for v in content_hashes(one, ["text", "number"])]
        assert [int(v[n]) for v in content] == [int(v[n]) for v in swapped]
    keys = [tuple(r[1:]) if r[2] == r[2] else (r[1], "nan") for r in rows]
    keys = [(a, b + 0.0 if isinstance(b, float) else b) for a, b in keys]
    assert len({int(v) for v in content[0]}) == len({int(v) for v in content[1]}) == len(set(keys))
    assert len({int(v) for v in ids[0]}) == len({r[0] for r in rows})


ROWS = st.lists(
    st.tuples(
        st.text("0123456789abcdef", min_size=32, max_size=32),
        st.one_of(st.none(), st.floats()),
        st.one_of(st.none(), st.integers(-(2**62), 2**62)),
        st.one_of(st.none(), st.text(max_size=12)),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda row: row[0],
)
SCHEMA = {"record_id": pl.String, "a": pl.Float64, "b": pl.Int64, "c": pl.String}


def digest(rows: list[tuple[object, ...]]) -> RowSetDigest:
    frame = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    return RowSetDigest.of(text_hashes(frame["record_id"]), frame, ["a", "b", "c"])


@given(rows=ROWS, order=st.randoms(use_true_random=False), cut=st.integers(0, 12))
def test_digest_depends_on_the_rows_alone(rows: list[tuple[object, ...]], order: object, cut: int) -> None:
    shuffled = list(rows)
    order.shuffle(shuffled)  # pyright: ignore[reportAttributeAccessIssue]  # hypothesis' Random
    assert digest(rows[:cut]).merge(digest(rows[cut:])) == digest(shuffled)


@given(rows=ROWS, row=st.integers(0, 11), value=st.floats(allow_nan=False), other=st.integers(0, 11))
def test_digest_sees_changed_and_exchanged_values(
    rows: list[tuple[object, ...]], row: int, value: float, other: int
) -> None:
    row, other = row % len(rows), other % len(rows)
    changed = [(r[0], value, *r[2:]) if i == row else r for i, r in enumerate(rows)]
    assert (digest(changed) == digest(rows)) == (rows[row][1] == value)
    assert digest(rows[:-1]) != digest(rows)
    swapped = list(rows)
    swapped[row] = (rows[row][0], *rows[other][1:])
    swapped[other] = (rows[other][0], *rows[row][1:])
    same = str(rows[row][1:]).replace("-0.0", "0.0") == str(rows[other][1:]).replace("-0.0", "0.0")
    assert (digest(swapped) == digest(rows)) == same
