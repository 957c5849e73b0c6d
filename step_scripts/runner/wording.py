"""Numbers in messages and in what the UI shows: counts with their noun, significant digits instead of decimals."""

from __future__ import annotations

from collections.abc import Sequence

_DIGITS = 6


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun: `1 row`, `2,000 rows`."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def listed(names: Sequence[str], most: int = 20, sign: str = ", ") -> str:
    """Names for a message, not too many: `a, b and 3 more`."""
    return sign.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def are(count: int) -> str:
    """The verb behind a count: `is` or `are`."""
    return "is" if count == 1 else "are"


def rounded(value: float) -> float:
    """A number for people: six significant digits; whole numbers, which are mostly counts, stay what they are."""
    return value if value == value // 1 else float(f"{value:.{_DIGITS}g}")


def number(value: float) -> str:
    """A number in text: six significant digits, thousands separated."""
    short = rounded(value)
    return f"{short:,.0f}" if short == short // 1 and abs(short) < 1e15 else f"{short:,}"


def percent(fraction: float) -> str:
    """A fraction as per cent, however small: `0.00012%`."""
    return f"{number(100 * fraction)}%"


def megabytes(size: int) -> str:
    """Bytes as megabytes, however few: `0.000412 MB`."""
    return f"{number(float(f'{size / 1e6:.3g}'))} MB"
