"""Errors of predictions: of all rows, of slices, and of baselines that a model has to beat.

Begin with `report`. Imports `model`, `step_scripts.parameters`, `table` and `runner`; step `evaluate_model` uses it.
"""
