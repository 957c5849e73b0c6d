"""The table: columns, types, ranges, target. They are declared only here; everything else is derived from it.

To use the project for another table, edit `HouseSale` and `HOUSING_TABLE`, and the slices in `housing_assets.config`.
This module imports pandera (0.7 s): import it inside functions, so that the code location loads fast.
"""

import pandera.polars as pa

from step_scripts.table.column_types import table_from_pandera


class HouseSale(pa.DataFrameModel):
    """One sale of a house. Ranges are wide: they reject impossible values, not unusual ones."""

    PRICE: float = pa.Field(ge=0, le=1e9, description="Sale price, US dollars.")
    YEAR_BUILT: int = pa.Field(ge=1600, le=2100, description="Year the house was built.")
    SQUARE_FEET: float = pa.Field(gt=0, le=1e6, description="Living area, square feet.")
    NUM_BEDROOMS: int = pa.Field(ge=0, le=100, description="Bedrooms.")
    NUM_BATHROOMS: float = pa.Field(ge=0, le=100, description="Bathrooms; a half has no bath.")
    LOT_ACRES: float = pa.Field(ge=0, le=1e5, description="Size of the lot, acres.")
    GARAGE_SPACES: int = pa.Field(ge=0, le=100, description="Cars that fit into the garage.")
    FRONT_PORCH: int = pa.Field(isin=[0, 1], description="1 if the house has a front porch.")
    DECK: int = pa.Field(isin=[0, 1], description="1 if the house has a deck.")


HOUSING_TABLE = table_from_pandera(HouseSale, name="house_sales", target="PRICE")
