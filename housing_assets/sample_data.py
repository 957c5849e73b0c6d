"""Generated house sales: the schema's columns, realistic values, prices that no linear model explains.

`python -m housing_assets.sample_data --rows 10000 --seed 42 --out house_sales.csv [--invalid-fraction 0.001]`

The same seed gives the same bytes; a file with fewer rows is the beginning of one with more. The file's modification
time is set to `MODIFIED`, so that event times, which come from it, are the same everywhere.
"""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from step_scripts.runner.contract import StepError
from step_scripts.runner.local_files import explain_full_disk, replacing

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

MODIFIED = datetime(2024, 1, 1, tzinfo=UTC)
NOISE = 0.015
_BATCH_ROWS = 50_000
_YEAR_OF_SALE = 2020
# What the schema rejects: column and text of the cell.
_INVALID_CELLS = (
    ("PRICE", "-1200"),
    ("YEAR_BUILT", "unknown"),
    ("SQUARE_FEET", ""),
    ("NUM_BEDROOMS", "2.5"),
    ("DECK", "2"),
    ("PRICE", "NaN"),
)


def write_sample(path: Path, *, rows: int = 10_000, seed: int = 42, invalid_fraction: float = 0.001) -> Path:
    """Write `rows` generated sales to the CSV file `path`, atomically, a batch at a time.

    About `invalid_fraction` of the rows violate the schema. Raises `ValueError` for a number of rows below 1 or a
    fraction outside 0 to 1, and `StepError` if the disk is full.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, not {rows}")
    if not 0 <= invalid_fraction <= 1:
        raise ValueError(f"invalid_fraction must be between 0 and 1, not {invalid_fraction}")
    try:
        with replacing(path) as file:
            for number, first in enumerate(range(0, rows, _BATCH_ROWS)):
                batch = _batch(seed, number, invalid_fraction)
                batch.head(rows - first).write_csv(file, include_header=number == 0, quote_style="never")
            file.flush()  # writing changes the time
            os.utime(file.fileno(), (MODIFIED.timestamp(), MODIFIED.timestamp()))
    except Exception as error:
        if full := explain_full_disk(error, [path.parent]):
            raise StepError(full) from error
        raise
    return path


def _batch(seed: int, number: int, invalid_fraction: float) -> pl.DataFrame:
    """A batch of sales; as texts, with what the schema rejects in one cell each, where some are to be invalid."""
    import numpy as np
    import polars as pl

    sales = generate_sales(np.random.default_rng([seed, number]), _BATCH_ROWS)
    if not invalid_fraction:
        return sales
    chosen = np.flatnonzero(np.random.default_rng([seed, number, 1]).random(_BATCH_ROWS) < invalid_fraction)
    texts = sales.cast(pl.String)
    for kind, (column, text) in enumerate(_INVALID_CELLS):
        texts = texts.with_columns(texts[column].scatter(chosen[kind :: len(_INVALID_CELLS)], text))
    return texts


def generate_sales(random: np.random.Generator, rows: int) -> pl.DataFrame:
    """`rows` sales with prices: US dollars, square feet, acres. Mean price about 430,000.

    Size sells at a falling price a square foot, more in newer houses; value falls with age and rises again for houses
    older than about 80 years; a second bathroom is worth more than a fourth; so it goes with garage spaces and acres; a
    porch counts on old houses, a deck on large lots. Noise: 1.5 percent of the price.
    """
    import numpy as np
    import polars as pl

    age = np.clip(np.round(random.gamma(1.8, 22.0, rows)), 1, 148)
    year = (_YEAR_OF_SALE - age).astype(np.int64)
    size = np.round(np.clip(random.lognormal(np.log(2150) - 0.0025 * age, 0.34), 450, 7500), 2)
    bedrooms = np.clip(np.round(size / 800 + random.normal(0.6, 0.8, rows)), 0, 8).astype(np.int64)
    baths = np.clip(np.round(2 * (size / 1300 + random.normal(0.3, 0.4, rows))) / 2, 1, 5)
    lot = np.round(np.clip(random.lognormal(np.log(0.35), 0.75, rows), 0.03, 6.0), 2)
    garage = np.clip(np.round(size / 1500 + random.normal(0.3, 0.7, rows) - (age > 70)), 0, 4).astype(np.int64)
    porch = (random.random(rows) < 0.25 + 0.35 * (age > 50)).astype(np.int64)
    deck = (random.random(rows) < 0.3 + 0.3 * (lot > 0.4)).astype(np.int64)

    wear = np.exp(-age / 45.0)
    condition = 0.62 + 0.38 * wear + 0.22 / (1 + np.exp(-(age - 88.0) / 7.0))
    crowding = 1 - 0.035 * np.clip(bedrooms - size / 620, 0, 4)
    building = 1_350 * size**0.745 * condition * crowding
    comfort = 52_000 * (1 - 0.55 ** (baths - 1)) * (0.5 + size / 4_400) + 34_000 * (1 - 0.5**garage)
    land = 58_000 * np.log1p(2.2 * lot)
    extras = porch * (5_000 + 13_000 * (age > 60)) + deck * (4_000 + 9_000 * np.minimum(lot, 1.5))
    price = np.round((building + comfort + land + extras + 20_000) * np.exp(random.normal(0.0, NOISE, rows)))
    return pl.DataFrame(
        {
            "PRICE": price.astype(np.int64),
            "YEAR_BUILT": year,
            "SQUARE_FEET": size,
            "NUM_BEDROOMS": bedrooms,
            "NUM_BATHROOMS": baths,
            "LOT_ACRES": lot,
            "GARAGE_SPACES": garage,
            "FRONT_PORCH": porch,
            "DECK": deck,
        }
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m housing_assets.sample_data", description="Generate house sales.")
    parser.add_argument("--rows", type=int, default=10_000, help="number of rows (default 10000)")
    parser.add_argument("--seed", type=int, default=42, help="another seed gives other rows (default 42)")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file to write")
    parser.add_argument(
        "--invalid-fraction", type=float, default=0.001, help="share of rows that violate the schema (default 0.001)"
    )
    options = parser.parse_args(arguments)
    try:
        write_sample(options.out, rows=options.rows, seed=options.seed, invalid_fraction=options.invalid_fraction)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
