"""What people see of a run: metadata and plots of assets, lines on a terminal, where a model comes from.

Begin with `metadata` (what several assets show alike) and `summary` (a terminal). Commands: `summary`, `lineage`.
Imports `checks`.
"""
