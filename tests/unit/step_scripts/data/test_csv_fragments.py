"""The bytes of a fragment of a CSV file."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from step_scripts.data.csv_fragments import has_odd_quotes
from step_scripts.data.csv_text import count_byte


@given(st.binary(max_size=50), st.integers(0, 20_000), st.sampled_from(b'\n,"'))
def test_bytes_are_counted(data: bytes, times: int, byte: int) -> None:
    text = data * times + bytes([byte])
    assert count_byte(text, byte) == text.count(bytes([byte]))
    assert has_odd_quotes(text, 1 << 20) == (text.count(b'"') % 2 == 1)
