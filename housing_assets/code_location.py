"""Gives assets, checks and jobs access to all definitions without a circular import.

`housing_assets.definitions` imports them all, so they cannot import it. When it is complete it calls `register`, and
they call `definitions`.
"""

from __future__ import annotations

import dagster as dg

_registered: list[dg.Definitions] = []  # the latest; tests load the code location again with other variables


def register(definitions: dg.Definitions) -> None:
    """Make `definitions` known as the code location."""
    _registered[:] = [definitions]


def definitions() -> dg.Definitions:
    """All definitions. Raises `RuntimeError` before `housing_assets.definitions` has been imported."""
    if not _registered:
        raise RuntimeError("the code location is not loaded: import housing_assets.definitions first")
    return _registered[0]


def asset_keys() -> list[dg.AssetKey]:
    """All assets, in order of their keys."""
    return sorted(definitions().resolve_asset_graph().get_all_asset_keys())
