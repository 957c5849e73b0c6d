"""Polars' CSV reader, without its panics."""

from __future__ import annotations

from typing import Any

import polars as pl


def read_csv(source: Any, **options: Any) -> pl.DataFrame:
    """`polars.read_csv`. Raises `polars.exceptions.ComputeError` also where Polars panics.

    A panic, as on a last field that is one quote, is no `Exception`, and would end whatever the reader is part of.
    """
    try:
        return pl.read_csv(source, **options)
    except pl.exceptions.PanicException as panic:
        raise pl.exceptions.ComputeError(f"Polars cannot read it: {panic}") from panic
