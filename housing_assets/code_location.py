"""The code location as a whole, for its own parts: `housing_assets.definitions` hands it in when it is complete.

So assets, checks and jobs may ask what else there is without importing what imports them.
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
