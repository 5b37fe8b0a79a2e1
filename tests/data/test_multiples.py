"""Sizes that divide: those that a message names do, and none between them does."""

import pytest
from ddetr.data.multiples import multiples_around, nearest
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(1, 5000), st.integers(1, 600), st.none() | st.integers(1, 5000))
def test_those_named_divide_and_none_between_does(number: int, divisor: int, most: int | None) -> None:
    named = multiples_around(number, divisor, most)
    valid = [size for size in range(1, number + 2 * divisor) if size % divisor == 0 and (most is None or size <= most)]
    below, above = [size for size in valid if size <= number], [size for size in valid if size > number]
    if most is None or number <= most:
        assert named == below[-1:] + above[:1]
    else:
        assert named == valid[-1:]


@pytest.mark.parametrize(
    ("number", "divisor", "most", "said"),
    [
        (32, 3, None, "nearest: 30 and 33"),
        (2, 3, None, "nearest: 3"),
        (4090, 32, 4096, "nearest: 4064 and 4096"),
        (4095, 96, 4096, "nearest: 4032"),
        (19, 1, 18, "nearest: 18"),
        (24, 24, 18, "no multiple of 24 is at most 18"),
    ],
)
def test_what_a_message_says(number: int, divisor: int, most: int | None, said: str) -> None:
    assert nearest(number, divisor, most) == said
