"""Gives assets, checks and jobs access to all definitions without a circular import.

`housing_assets.definitions` imports them all, so they cannot import it. When it is complete it calls `hand_in`, and
they call `whole`.
"""

from __future__ import annotations

import dagster as dg

_complete: list[dg.Definitions] = []  # the latest; tests load the code location again with other variables


def hand_in(definitions: dg.Definitions) -> dg.Definitions:
    """Make `definitions` known as the code location. Returns them."""
    _complete[:] = [definitions]
    return definitions


def whole() -> dg.Definitions:
    """All definitions. Raises `RuntimeError` before `housing_assets.definitions` has been imported."""
    if not _complete:
        raise RuntimeError("the code location is not loaded: import housing_assets.definitions first")
    return _complete[0]


def asset_keys() -> list[dg.AssetKey]:
    """All assets, in order of their keys."""
    return sorted(whole().resolve_asset_graph().get_all_asset_keys())
