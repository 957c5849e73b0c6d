"""The bytes of a fragment of a CSV file."""

from __future__ import annotations

from itertools import accumulate
from operator import xor

from hypothesis import given
from hypothesis import strategies as st

from step_scripts.data.csv_text import count_byte, record_end


@given(st.binary(max_size=50), st.integers(0, 20_000), st.sampled_from(b'\n,"'))
def test_bytes_are_counted(data: bytes, times: int, byte: int) -> None:
    text = data * times + bytes([byte])
    assert count_byte(text, byte) == text.count(bytes([byte]))


@given(st.text(alphabet='a,"\r\n', max_size=40), st.booleans())
def test_the_end_of_a_record_is_the_next_line_end_outside_of_quotes(text: str, quoted: bool) -> None:
    inside = list(accumulate((character == '"' for character in text), xor, initial=quoted))
    ends = [
        i + 1
        for i, character in enumerate(text)
        if not inside[i] and (character == "\n" or (character == "\r" and text[i + 1 : i + 2] != "\n"))
    ]
    for position in range(len(text)):
        expected = next((end for end in ends if end > position), -1)
        assert record_end(text.encode(), position, quoted=inside[position], complete=True) == expected
